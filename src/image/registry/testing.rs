//! A real registry for tests, and a small generation to push.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::name::{Digest, RegistryName};
use super::remote::Access;
use super::{Expected, ExpectedMachines};
use crate::image::generation::{DISK, GuestFacts, INITRD, Manifest, VMLINUX, VMLINUZ};
use crate::image::source::http::Patience;
use crate::image::{Contents, Generation, GenerationKey, Store, testing as image};

const PROGRAM: &str = "docker-registry";
/// `ann` with the password `secret`, hashed as cheaply as bcrypt allows.
const USERS: &str = "ann:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";

/// A running `docker-registry`; killed when dropped.
pub struct Registry {
    process: Child,
    dir: tempfile::TempDir,
    pub port: u16,
    logins: Vec<PathBuf>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// One that lets in only `ann`, whose login is on this host.
    pub fn with_login() -> Self {
        let mut registry = Self::start_with(Some(USERS));
        let auth = registry.dir.path().join("auth.json");
        let host = format!("127.0.0.1:{}", registry.port);
        let text = format!(r#"{{"auths": {{"{host}": {{"auth": "YW5uOnNlY3JldA=="}}}}}}"#);
        fs::write(&auth, text).unwrap();
        registry.logins.push(auth);
        registry
    }

    fn start_with(users: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let more = users.map_or(String::new(), |users| {
            let path = dir.path().join("users");
            fs::write(&path, users).unwrap();
            let path = path.display();
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {path}\n")
        });
        loop {
            // Somebody may take the port before it does; then it ends and another one is tried.
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            let storage = dir.path().join("storage");
            let storage = storage.display();
            let config = dir.path().join("config.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    \
                 rootdirectory: {storage}\nhttp:\n  addr: 127.0.0.1:{port}\n{more}"
            );
            fs::write(&config, text).unwrap();
            let started = Command::new(PROGRAM)
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(dir.path().join("log")).unwrap())
                .spawn();
            let mut process = match started {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    panic!("{PROGRAM} is not installed; hint: ./dev setup")
                }
                started => started.unwrap(),
            };
            let mut listens = false;
            crate::testing::eventually("the registry answers", || {
                listens = answers(port);
                listens || process.try_wait().unwrap().is_some()
            });
            if listens && process.try_wait().unwrap().is_none() {
                let logins = Vec::new();
                return Self {
                    process,
                    dir,
                    port,
                    logins,
                };
            }
        }
    }

    pub fn name(&self, rest: &str) -> RegistryName {
        format!("oci://127.0.0.1:{}/ci/{rest}", self.port)
            .parse()
            .unwrap()
    }

    /// Everything in one repository, by its digest.
    pub fn named(&self, digest: &Digest) -> RegistryName {
        self.name(&format!("image@{digest}"))
    }

    pub fn access(&self) -> Access {
        let patience = Patience {
            tries: 2,
            first_wait: Duration::from_millis(1),
            ..Patience::LONG
        };
        Access::with(self.logins.clone(), patience)
    }

    /// Where the registry keeps the bytes of a blob.
    pub fn blob_file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.as_hex();
        let blobs = "storage/docker/registry/v2/blobs/sha256";
        let folder = format!("{blobs}/{}/{hex}/data", hex.get(..2).unwrap());
        self.dir.path().join(folder)
    }
}

/// Whether a server of HTTP is there: a connection alone may be one to itself.
fn answers(port: u16) -> bool {
    let mut answer = [0; 5];
    TcpStream::connect(("127.0.0.1", port))
        .and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
            stream.read_exact(&mut answer)
        })
        .is_ok_and(|()| answer == *b"HTTP/")
}

/// A store in a folder of its own.
pub struct TestStore {
    pub dir: tempfile::TempDir,
    pub store: Store,
}

impl TestStore {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    /// What lies in a folder of the store, but for records.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.store.path().join(folder)) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| !name.starts_with("accepted-"))
            .collect()
    }

    pub fn is_empty(&self) -> bool {
        self.names("generations").is_empty() && self.names("pulls").is_empty()
    }

    /// A generation with data in three places of its disk, one of them `seed`'s own.
    pub fn generation(&self, seed: u8) -> Generation {
        self.generation_with(seed, |_contents| {})
    }

    /// One that was made already.
    pub fn generation_again(&self, seed: u8) -> Generation {
        let key = GenerationKey::from_digest(Digest::of(&[seed]).as_hex());
        self.store.find(&key).unwrap().unwrap()
    }

    pub fn generation_with(&self, seed: u8, change: impl FnOnce(&mut Contents)) -> Generation {
        let name = Digest::of(&[seed]);
        let key = GenerationKey::from_digest(name.as_hex());
        let dir = self.store.generations.sub(key.as_str()).unwrap();
        let disk = dir.create_new(DISK).unwrap();
        disk.set_len(1 << 30).unwrap();
        disk.write_all_at(&noise(1, 1 << 20), 0).unwrap();
        disk.write_all_at(&noise(seed, 300_000), (96 << 20) + 12_345)
            .unwrap();
        disk.write_all_at(b"end", (1 << 30) - 3).unwrap();
        for (name, text) in [(VMLINUZ, "packed"), (VMLINUX, "unpacked"), (INITRD, "")] {
            let mut file = dir.create_new(name).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }
        let inputs = image::inputs(self.dir.path(), Path::new("/nowhere"));
        let mut contents = inputs.contents(&self.store).unwrap();
        change(&mut contents);
        let guest = GuestFacts {
            root: "PARTUUID=1".to_owned(),
            kernel_release: "6.1".to_owned(),
            warnings: vec!["w".to_owned()],
        };
        let made = (inputs.lineage(), contents);
        let manifest = Manifest::describe(&dir, &key, made, guest).unwrap();
        manifest.write(&dir).unwrap();
        drop(dir);
        self.store.find(&key).unwrap().unwrap()
    }

    /// What a configuration asks for that fits [`generation`](Self::generation).
    pub fn expected(&self) -> ExpectedMachines {
        let inputs = image::inputs(self.dir.path(), Path::new("/nowhere"));
        let contents = inputs.contents(&self.store).unwrap();
        ExpectedMachines {
            username: contents.username,
            lineage: inputs.lineage(),
            disk_gib: 1,
            runner: None,
            agent: contents.agent,
            speaks: |protocol| protocol == 1,
        }
    }
}

/// Whatever the configuration.
pub fn anything() -> Expected {
    Expected::of_host()
}

/// Bytes that do not pack.
pub fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}
