//! What stands for prebuild and test machine in a pool that boots nothing: the first word of the
//! image's content says how they go.

use std::fs;

use super::builder::BuildError;
use super::host::Host;
use super::machine::MachineError;
use crate::image::{BuildInputs, BuildLock, Generation, ImageError, ImageName};

/// Makes a generation, unless the image begins with `unbuildable`.
pub fn build(
    host: &Host,
    lock: &BuildLock,
    inputs: &BuildInputs,
) -> Result<Generation, BuildError> {
    let store = host.store().ok_or(BuildError::Closing)?;
    if says(host, "unbuildable") {
        return Err(BuildError::Image(ImageError::PrebuildFailed {
            reason: "the test says so".to_owned(),
            console: store.console_path("fleetingd0"),
        }));
    }
    Ok(store.forge(lock, inputs)?)
}

/// A machine comes up, unless the image begins with `unbootable`.
pub fn smoke_test(host: &Host) -> Result<(), BuildError> {
    match says(host, "unbootable") {
        true => Err(BuildError::Smoke(MachineError::Link)),
        false => Ok(()),
    }
}

fn says(host: &Host, word: &str) -> bool {
    let ImageName::Path(path) = &host.spec().image.image else {
        return false;
    };
    fs::read(path).is_ok_and(|content| content.starts_with(word.as_bytes()))
}
