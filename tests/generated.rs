//! Keeps `src/plugin/generated/` equal to what `proto/` says.
//!
//! After a change of a `.proto` file: `cargo test --test generated -- --ignored` writes the files
//! anew. That and the comparison need Debian's `protobuf-compiler`; building does not.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(clippy::print_stdout, reason = "a skip is told")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn generate(out: &Path) {
    let protos = root().join("proto");
    tonic_prost_build::configure()
        .out_dir(out)
        .build_transport(false)
        .file_descriptor_set_path(out.join("descriptors.bin"))
        .compile_protos(
            &[
                protos.join("fleeting.proto"),
                protos.join("go_plugin.proto"),
            ],
            &[protos],
        )
        .unwrap();
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn generated_code_is_what_the_protos_say() {
    if Command::new("protoc").arg("--version").output().is_err() {
        println!("skipped: no protoc (apt install protobuf-compiler)");
        return;
    }
    let fresh = tempfile::tempdir().unwrap();
    generate(fresh.path());
    let mut committed = files(&root().join("src/plugin/generated"));
    for (name, content) in files(fresh.path()) {
        let ours = committed.remove(&name);
        assert!(
            ours.as_ref() == Some(&content),
            "src/plugin/generated/{name} differs from proto/; hint: cargo test --test generated -- --ignored"
        );
    }
    assert!(
        committed.is_empty(),
        "not generated: {:?}",
        committed.keys()
    );
}

#[test]
#[ignore = "a command, not a test: writes src/plugin/generated anew"]
fn regenerate() {
    generate(&root().join("src/plugin/generated"));
}
