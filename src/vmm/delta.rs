//! The file behind a disk's private delta: nameless, so that it is gone with the process.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

/// Makes an empty, nameless file in `dir`, which must be a directory itself and not a link to one.
pub fn create(dir: &Path) -> io::Result<File> {
    let handle = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(CWD, dir, handle, Mode::empty())?;
    let access = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let owner_only = Mode::RUSR | Mode::WUSR;
    match openat(&dir, ".", access | OFlags::TMPFILE, owner_only) {
        Ok(file) => return Ok(file.into()),
        // 9p, NFS and old overlayfs have no nameless files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let name = format!(".delta-{:016x}", random()?);
    let file = openat(
        &dir,
        &name,
        access | OFlags::CREATE | OFlags::EXCL,
        owner_only,
    )?;
    unlinkat(&dir, &name, AtFlags::empty())?;
    Ok(file.into())
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    fill_random(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Fills `bytes` from the kernel's generator; a few bytes come at once or not at all.
pub fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let got = rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())?;
    if got == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_delta_has_no_name_and_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let delta = create(dir.path()).unwrap();
        delta.set_len(1 << 30).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let link = dir.path().join("link");
        symlink(dir.path(), &link).unwrap();
        assert!(create(&link).is_err());
        assert!(create(&dir.path().join("absent")).is_err());
    }
}
