//! The whole way of an image, over HTTPS from a server of our own: in order, and in every disorder.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;

use super::testing::{Fault, Server, Signer};
use super::*;
use crate::image::inputs::hex;
use crate::testing::run;

const IMAGE: &str = "server/releases/noble/release-20260901/ubuntu-24.04-server-cloudimg-amd64.img";
const INDEX: &str = "releases/streams/v1/com.ubuntu.cloud:released:download.json";
const FOLDER: &str = "server/releases/noble/release-20260901";
/// When the vendor signs, unless a test says otherwise.
const SIGNED: u32 = 1_780_000_000;

/// A host with a store, and a vendor.
struct Bench {
    dir: TempDir,
    store: Store,
    server: Server,
    signer: Signer,
}

impl Bench {
    /// The vendor has one image of 24.04.
    async fn new() -> Self {
        let bench = Self::empty().await;
        bench.publish(&picture(1), SIGNED);
        bench
    }

    async fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let signer = Signer::new();
        fs::write(dir.path().join("keys.asc"), signer.public()).unwrap();
        Self {
            store: Store::open(&dir.path().join("store")).unwrap(),
            server: Server::start().await,
            signer,
            dir,
        }
    }

    fn source(&self, name: &str) -> ImageSource {
        ImageSource {
            image: name.parse().unwrap(),
            sha256: None,
            mirror: Some(self.server.base()),
            keyring: Some(self.dir.path().join("keys.asc")),
        }
    }

    /// Index, checksums, signature and image of 24.04.
    fn publish(&self, image: &[u8], signed: u32) {
        self.server.put(IMAGE, image);
        self.list(&sha256(image), image.len());
        self.sums(&sums(image), signed);
    }

    /// An index that says this of the image.
    fn list(&self, sha256: &str, size: usize) {
        let item = json!({ "ftype": "disk1.img", "path": IMAGE, "sha256": sha256, "size": size });
        let product = product("24.04", "noble", true, "24.04 LTS", &[("20260901", item)]);
        self.index(&[("24.04", product)]);
    }

    fn index(&self, products: &[(&str, Value)]) {
        let named = |(name, product): &(&str, Value)| {
            let key = format!("com.ubuntu.cloud:server:{name}:amd64");
            (key, product.clone())
        };
        let products: serde_json::Map<_, _> = products.iter().map(named).collect();
        let index = json!({ "format": "products:1.0", "products": products });
        self.server.put(INDEX, index.to_string());
    }

    fn sums(&self, sums: &str, signed: u32) {
        self.server.put(&format!("{FOLDER}/SHA256SUMS"), sums);
        let signature = self.signer.sign(sums.as_bytes(), signed);
        self.server
            .put(&format!("{FOLDER}/SHA256SUMS.gpg"), signature);
    }

    async fn get(&self, source: &ImageSource) -> Result<LocalImage, SourceError> {
        let client = self.server.client();
        obtain_with(source, &Shelf::of(&self.store), &|_| {}, move |_| {
            Ok(client)
        })
        .await
    }

    async fn ubuntu(&self) -> Result<LocalImage, SourceError> {
        self.get(&self.source("ubuntu:24.04")).await
    }

    /// That there is nothing yet, and this is why; then that the last image stays in use for the
    /// same reason.
    async fn refused(&self, spoil: impl Fn(&Self), why: impl Fn(&SourceError) -> bool) {
        let source = self.source("ubuntu:24.04");
        spoil(self);
        let error = self.get(&source).await.unwrap_err();
        assert!(why(&error), "{error:?}");
        assert_eq!(self.images(), Vec::<String>::new(), "{error}");

        self.publish(&picture(1), SIGNED);
        let before = self.get(&source).await.unwrap();
        assert!(before.outdated.is_none(), "{:?}", before.outdated);
        self.publish(&picture(2), SIGNED + 100);
        spoil(self);
        let after = self.get(&source).await.unwrap();
        let error = after.outdated.unwrap();
        assert!(why(&error), "{error:?}");
        assert_eq!(after.sha256, before.sha256);
        assert_eq!(fs::read(&after.path).unwrap(), picture(1));
        assert_eq!(self.images(), [format!("{}.img", before.sha256)]);
    }

    /// Whole images in the store.
    fn images(&self) -> Vec<String> {
        self.names(".img")
    }

    fn names(&self, end: &str) -> Vec<String> {
        let names = self.store.images().names().unwrap();
        names
            .into_iter()
            .filter(|name| name.ends_with(end))
            .collect()
    }
}

/// 300 kB that say which they are.
fn picture(n: u8) -> Vec<u8> {
    let byte = |at: u32| n ^ u8::try_from((at % 251).pow(2) % 241).unwrap();
    (0..300_000).map(byte).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn sums(image: &[u8]) -> String {
    let name = IMAGE.rsplit('/').next().unwrap();
    format!("{} *other.img\n{} *{name}\n", sha256(b""), sha256(image))
}

fn product(
    version: &str,
    release: &str,
    supported: bool,
    title: &str,
    versions: &[(&str, Value)],
) -> Value {
    let versions: serde_json::Map<_, _> = versions
        .iter()
        .map(|(serial, item)| {
            let items =
                json!({ "disk1.img": item, "manifest": { "ftype": "manifest", "path": "m" } });
            ((*serial).to_owned(), json!({ "items": items }))
        })
        .collect();
    json!({
        "arch": "amd64", "release": release, "version": version, "supported": supported,
        "release_title": title, "versions": versions,
    })
}

#[tokio::test]
async fn an_image_is_verified_once_and_not_downloaded_again() {
    let bench = Bench::new().await;
    let first = bench.ubuntu().await.unwrap();
    assert_eq!(fs::read(&first.path).unwrap(), picture(1));
    assert_eq!(first.sha256, sha256(&picture(1)));
    assert!(first.outdated.is_none());
    let again = bench.ubuntu().await.unwrap();
    assert_eq!((again.path, again.sha256), (first.path, first.sha256));
    assert_eq!(bench.server.asked(".img").len(), 1);
    assert_eq!(bench.names(".part"), Vec::<String>::new());

    // Without asking anybody.
    let asked = bench.server.asked("").len();
    let stored = stored(&bench.source("ubuntu:24.04"), &bench.store).await;
    assert!(stored.unwrap().is_some());
    assert_eq!(bench.server.asked("").len(), asked);
    let other = super::stored(&bench.source("ubuntu:22.04"), &bench.store).await;
    assert!(other.unwrap().is_none());
}

#[tokio::test]
async fn progress_only_grows_and_ends_at_the_whole() {
    let bench = Bench::new().await;
    let told = Mutex::new(Vec::new());
    let tell = |progress| told.lock().unwrap().push(progress);
    let client = bench.server.client();
    let source = bench.source("ubuntu");
    let shelf = Shelf::of(&bench.store);
    let image = obtain_with(&source, &shelf, &tell, move |_| Ok(client)).await;
    image.unwrap();
    let told = told.into_inner().unwrap();
    assert_eq!(told.first(), Some(&SourceProgress::Looking));
    assert_eq!(told.last(), Some(&SourceProgress::Verifying));
    let mut last = 0;
    for progress in &told {
        if let SourceProgress::Downloading {
            done_bytes,
            total_bytes,
        } = progress
        {
            assert!(*done_bytes > last && *total_bytes == Some(300_000));
            last = *done_bytes;
        }
    }
    assert_eq!(last, 300_000);
}

#[tokio::test]
async fn ubuntu_is_the_newest_supported_lts_release_and_its_newest_build() {
    let bench = Bench::empty().await;
    let path = |version: &str, serial: &str| {
        format!("server/releases/x/release-{serial}/ubuntu-{version}-server-cloudimg-amd64.img")
    };
    let item = |version: &str, serial: &str| {
        let (path, sum) = (path(version, serial), sha256(serial.as_bytes()));
        (
            json!({ "ftype": "disk1.img", "path": path, "sha256": sum, "size": 8 }),
            (),
        )
    };
    let versions = [
        ("20.04", "focal", false, "20.04 LTS"),
        ("22.04", "jammy", true, "22.04 LTS"),
        ("24.04", "noble", true, "24.04 LTS"),
        ("25.04", "plucky", true, "25.04"),
        ("26.04", "resolute", false, "26.04 LTS"),
    ];
    let products: Vec<(&str, Value)> = versions
        .iter()
        .map(|(version, release, supported, title)| {
            let serials = ["20260901", "20260901.10", "20260901.9"];
            let items = serials.map(|serial| (serial, item(version, serial).0));
            (
                *version,
                product(version, release, *supported, title, &items),
            )
        })
        .collect();
    bench.index(&products);
    for (name, version) in [
        ("ubuntu", "24.04"),
        ("ubuntu:25.04", "25.04"),
        ("ubuntu:jammy", "22.04"),
        ("ubuntu:focal", "20.04"),
    ] {
        // There is nothing beside the index, which says what is asked for next.
        let error = bench.get(&bench.source(name)).await.unwrap_err();
        assert!(matches!(error, SourceError::Status { .. }), "{error}");
        let folder = "server/releases/x/release-20260901.10/SHA256SUMS";
        let asked = bench.server.asked(folder);
        assert!(!asked.is_empty(), "{name}");
        let sums = format!("{} *{}\n", sha256(b"20260901.10"), "image");
        bench.server.put(folder, &sums);
        let signature = bench.signer.sign(sums.as_bytes(), SIGNED);
        bench.server.put(&format!("{folder}.gpg"), signature);
        let error = bench.get(&bench.source(name)).await.unwrap_err();
        let wanted = format!("ubuntu-{version}-server-cloudimg-amd64.img");
        assert!(error.to_string().contains(&wanted), "{error}");
        bench.server.remove(folder);
    }
    let error = bench.get(&bench.source("ubuntu:23.04")).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("no 23.04; hint: there are 22.04, 24.04, 25.04"),
        "{error}"
    );
}

#[tokio::test]
async fn an_index_that_points_elsewhere_is_refused() {
    let bench = Bench::new().await;
    for path in [
        "../../etc/ubuntu-24.04-server-cloudimg-amd64.img",
        "/ubuntu-24.04-server-cloudimg-amd64.img",
        "https://example.org/ubuntu-24.04-server-cloudimg-amd64.img",
        "server/%2e%2e/ubuntu-24.04-server-cloudimg-amd64.img",
        "server/releases/jammy/release/ubuntu-22.04-server-cloudimg-amd64.img",
        "",
    ] {
        let item = json!({ "ftype": "disk1.img", "path": path, "sha256": sha256(b""), "size": 1 });
        let product = product("24.04", "noble", true, "24.04 LTS", &[("20260901", item)]);
        bench.index(&[("24.04", product)]);
        let error = bench.ubuntu().await.unwrap_err();
        assert!(
            matches!(error, SourceError::BadIndex { .. }),
            "{path}: {error}"
        );
    }
    for text in ["", "[]", "{\"products\": 7}"] {
        bench.server.put(INDEX, text);
        let error = bench.ubuntu().await.unwrap_err();
        assert!(
            matches!(error, SourceError::BadIndex { .. }),
            "{text}: {error}"
        );
    }
}

#[tokio::test]
async fn a_bad_signature_is_refused() {
    let bench = Bench::new().await;
    let signature = format!("{FOLDER}/SHA256SUMS.gpg");
    let why = |error: &SourceError| matches!(error, SourceError::BadSignature { .. });
    let other = Signer::new();
    bench
        .refused(
            |bench| {
                let sums = sums(&picture(2));
                bench
                    .server
                    .put(&signature, other.sign(sums.as_bytes(), SIGNED));
            },
            why,
        )
        .await;
    let bench = Bench::new().await;
    bench
        .refused(
            |bench| {
                // Checksums that were changed after they were signed.
                let sums = sums(&picture(2)) + "\n";
                bench.server.put(&format!("{FOLDER}/SHA256SUMS"), sums);
            },
            why,
        )
        .await;
}

#[tokio::test]
async fn a_signature_by_a_key_that_was_not_given_is_refused() {
    let bench = Bench::new().await;
    let mut source = bench.source("ubuntu:24.04");
    source.keyring = None;
    let error = bench.get(&source).await.unwrap_err().to_string();
    assert!(error.contains("no key of ours; hint:"), "{error}");
    assert!(error.contains("vm_image_keyring"), "{error}");
    source.keyring = Some(bench.dir.path().join("nothing"));
    let error = bench.get(&source).await.unwrap_err();
    assert!(matches!(error, SourceError::Keyring { .. }), "{error}");
    fs::write(bench.dir.path().join("nothing"), "no key").unwrap();
    let error = bench.get(&source).await.unwrap_err();
    assert!(matches!(error, SourceError::Keyring { .. }), "{error}");
}

#[tokio::test]
async fn a_wrong_checksum_is_refused() {
    let bench = Bench::new().await;
    bench
        .refused(
            |bench| bench.server.put(IMAGE, picture(9)),
            |error| matches!(error, SourceError::WrongChecksum { .. }),
        )
        .await;
    assert_eq!(bench.names(".part"), Vec::<String>::new());
}

#[tokio::test]
async fn an_index_that_disagrees_with_the_signed_checksums_is_refused() {
    let bench = Bench::new().await;
    bench
        .refused(
            |bench| bench.list(&sha256(&picture(9)), 300_000),
            |error| matches!(error, SourceError::IndexDisagrees { .. }),
        )
        .await;
}

#[tokio::test]
async fn a_truncated_file_is_refused() {
    let bench = Bench::new().await;
    bench
        .refused(
            |bench| bench.server.spoil(IMAGE, &vec![Fault::CutAfter(0); 9]),
            |error| matches!(error, SourceError::Truncated { .. }),
        )
        .await;
    let bench = Bench::new().await;
    bench
        .refused(
            |bench| bench.server.spoil(IMAGE, &[Fault::Shortened(200_000)]),
            |error| matches!(error, SourceError::WrongSize { bytes: 200_000, .. }),
        )
        .await;
}

#[tokio::test]
async fn a_web_page_is_refused_wherever_it_comes() {
    for path in [
        INDEX.to_owned(),
        format!("{FOLDER}/SHA256SUMS"),
        IMAGE.to_owned(),
    ] {
        for fault in [Fault::Page, Fault::PageInDisguise] {
            let bench = Bench::new().await;
            let spoil = |bench: &Bench| {
                let mut faults = vec![fault.clone()];
                // With no size of its own, the page is told by its beginning.
                if path == IMAGE && matches!(fault, Fault::PageInDisguise) {
                    let page = b"<!doctype HTML>log in";
                    bench.server.put(IMAGE, page);
                    faults = vec![Fault::NoSize];
                }
                bench.server.spoil(&path, &faults);
            };
            bench
                .refused(spoil, |error| matches!(error, SourceError::WebPage { .. }))
                .await;
        }
    }
}

#[tokio::test]
async fn a_redirect_to_http_is_refused_and_one_to_https_followed() {
    for path in [INDEX, IMAGE] {
        let bench = Bench::new().await;
        bench
            .refused(
                |bench| {
                    let to = Fault::Redirect("http://localhost:1/image".to_owned());
                    bench.server.spoil(path, &[to]);
                },
                |error| matches!(error, SourceError::RedirectToHttp { .. }),
            )
            .await;
    }
    let bench = Bench::new().await;
    bench.server.put("elsewhere", picture(1));
    bench
        .server
        .spoil(IMAGE, &[Fault::Redirect("/elsewhere".to_owned())]);
    assert!(bench.ubuntu().await.is_ok());

    let round = Fault::Redirect(format!("/{INDEX}"));
    bench.server.spoil(INDEX, &vec![round; 30]);
    let outdated = bench.ubuntu().await.unwrap().outdated.unwrap();
    assert!(
        matches!(outdated, SourceError::TooManyRedirects { .. }),
        "{outdated}"
    );
}

#[tokio::test]
async fn an_older_signature_than_the_last_accepted_is_refused() {
    let bench = Bench::new().await;
    let now = bench.ubuntu().await.unwrap();
    bench.publish(&picture(2), SIGNED - 1);
    let after = bench.ubuntu().await.unwrap();
    let outdated = after.outdated.unwrap();
    assert!(
        matches!(outdated, SourceError::Downgrade { .. }),
        "{outdated}"
    );
    assert_eq!(after.sha256, now.sha256);

    // Also where the image that was accepted is gone.
    fs::remove_file(&now.path).unwrap();
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::Downgrade { .. }), "{error}");
    // What was once accepted is not older than itself, and a newer one is welcome.
    bench.publish(&picture(1), SIGNED);
    assert!(bench.ubuntu().await.unwrap().outdated.is_none());
    bench.publish(&picture(2), SIGNED + 1);
    assert_eq!(bench.ubuntu().await.unwrap().sha256, sha256(&picture(2)));
}

#[tokio::test]
async fn a_record_that_is_damaged_does_not_read_as_never() {
    let bench = Bench::new().await;
    bench.ubuntu().await.unwrap();
    let record = bench.store.images().at("accepted-ubuntu-24.04.json");
    for text in ["", "{}", "{\"version\": 9}"] {
        fs::write(&record, text).unwrap();
        let error = bench.ubuntu().await.unwrap_err();
        assert!(
            matches!(error, SourceError::DamagedRecord { .. }),
            "{error}"
        );
    }
    fs::remove_file(&record).unwrap();
    assert!(bench.ubuntu().await.is_ok());
    assert_eq!(bench.server.asked(".img").len(), 1);
}

#[tokio::test]
async fn an_interrupted_download_goes_on_where_it_was() {
    let bench = Bench::new().await;
    bench
        .server
        .spoil(IMAGE, &[Fault::CutAfter(100_000), Fault::CutAfter(50_000)]);
    assert!(bench.ubuntu().await.is_ok());
    let asked = bench.server.asked(".img");
    let [first, second, third] = asked.as_slice() else {
        panic!("{asked:?}")
    };
    assert_eq!(first.range, None);
    assert_eq!(second.range.as_deref(), Some("bytes=100000-"));
    assert_eq!(third.range.as_deref(), Some("bytes=150000-"));
    assert!(second.if_range.is_some() && third.if_range == second.if_range);
}

#[tokio::test]
async fn a_download_that_was_given_up_goes_on_the_next_time() {
    let bench = Bench::new().await;
    let mut faults = vec![Fault::CutAfter(100_000)];
    faults.extend(vec![Fault::Status(503); 9]);
    bench.server.spoil(IMAGE, &faults);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::Status { .. }), "{error}");
    assert_eq!((bench.images().len(), bench.names(".part").len()), (0, 1));
    bench.server.spoil(IMAGE, &[]);
    assert!(bench.ubuntu().await.is_ok());
    let last = bench.server.asked(".img").pop().unwrap();
    assert_eq!(last.range.as_deref(), Some("bytes=100000-"));
    assert_eq!(bench.names(".part"), Vec::<String>::new());
}

#[tokio::test]
async fn a_file_that_changes_under_a_download_is_fetched_anew() {
    let bench = Bench::new().await;
    // The beginning of something else, as long as it may be.
    for len in [100_000, 300_000, 400_000] {
        let part = format!(".{}.part", sha256(&picture(1)));
        let mut old = vec![7; len];
        old[0] = 8;
        fs::write(bench.store.images().at(&part), old).unwrap();
        let image = bench.ubuntu().await.unwrap();
        assert_eq!(fs::read(&image.path).unwrap(), picture(1), "{len}");
        fs::remove_file(&image.path).unwrap();
    }
}

#[tokio::test]
async fn what_passes_is_waited_for_and_what_does_not_is_not() {
    let bench = Bench::new().await;
    bench
        .server
        .spoil(INDEX, &[Fault::Status(503), Fault::Status(429)]);
    assert!(bench.ubuntu().await.is_ok());
    assert_eq!(bench.server.asked(INDEX).len(), 3);

    let bench = Bench::new().await;
    bench.server.spoil(INDEX, &vec![Fault::Status(404); 9]);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::Status { .. }), "{error}");
    assert_eq!(bench.server.asked(INDEX).len(), 1);

    let bench = Bench::new().await;
    bench.server.spoil(INDEX, &vec![Fault::Silence; 9]);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
    assert_eq!(bench.server.asked(INDEX).len(), 3);
}

#[tokio::test]
async fn without_a_network_the_last_verified_image_is_used() {
    let bench = Bench::new().await;
    let mut source = bench.source("ubuntu:24.04");
    let verified = bench.get(&source).await.unwrap();
    // Nobody listens there.
    source.mirror = Some("https://localhost:1/".parse().unwrap());
    let image = bench.get(&source).await.unwrap();
    assert_eq!(image.path, verified.path);
    let outdated = image.outdated.unwrap();
    assert!(
        matches!(outdated, SourceError::Unreachable { .. }),
        "{outdated}"
    );

    source.image = "ubuntu:22.04".parse().unwrap();
    let error = bench.get(&source).await.unwrap_err().to_string();
    assert!(
        error.starts_with("cannot reach https://localhost:1/"),
        "{error}"
    );
    assert!(
        error.contains("proxy") && error.contains("image_mirror"),
        "{error}"
    );
}

#[tokio::test]
async fn an_image_that_changed_in_the_store_is_fetched_again() {
    let bench = Bench::new().await;
    let image = bench.ubuntu().await.unwrap();
    fs::write(&image.path, "something else").unwrap();
    let again = bench.ubuntu().await.unwrap();
    assert_eq!(fs::read(&again.path).unwrap(), picture(1));
}

#[tokio::test]
async fn a_replaced_image_goes_when_nobody_uses_it() {
    let bench = Bench::new().await;
    let first = bench.ubuntu().await.unwrap();
    bench.publish(&picture(2), SIGNED + 1);
    let second = bench.ubuntu().await.unwrap();
    assert!(first.path.exists() && second.path.exists());

    drop((first, second));
    // Another name for it counts as use.
    bench.get(&bench.source("ubuntu")).await.unwrap();
    bench.publish(&picture(3), SIGNED + 2);
    let third = bench.ubuntu().await.unwrap();
    assert_eq!(bench.images().len(), 2);
    // The first look still held the image that it might have had to fall back on.
    for _look in 0..2 {
        bench.get(&bench.source("ubuntu")).await.unwrap();
    }
    assert_eq!(bench.images(), [format!("{}.img", third.sha256)]);
}

#[tokio::test]
async fn two_that_want_the_same_image_download_it_once() {
    let bench = Bench::new().await;
    let (source, other) = (bench.source("ubuntu"), bench.source("ubuntu:noble"));
    let (one, two) = tokio::join!(bench.get(&source), bench.get(&other));
    assert_eq!(one.unwrap().path, two.unwrap().path);
    assert_eq!(bench.server.asked(".img").len(), 1);
}

#[tokio::test]
async fn an_image_by_url_is_what_its_checksum_says() {
    let bench = Bench::empty().await;
    bench.server.put("my.qcow2", picture(4));
    let mut source = bench.source("ubuntu");
    source.image = ImageName::Url(bench.server.base().join("my.qcow2").unwrap());
    let error = bench.get(&source).await.unwrap_err();
    assert!(matches!(error, SourceError::NoChecksum), "{error}");
    source.sha256 = Some(sha256(&picture(5)).parse().unwrap());
    let error = bench.get(&source).await.unwrap_err();
    assert!(
        matches!(error, SourceError::WrongChecksum { .. }),
        "{error}"
    );
    assert_eq!(bench.images(), Vec::<String>::new());
    source.sha256 = Some(sha256(&picture(4)).parse().unwrap());
    assert!(bench.get(&source).await.is_ok());
    let asked = bench.server.asked("my.qcow2").len();
    assert!(bench.get(&source).await.is_ok());
    assert_eq!(bench.server.asked("my.qcow2").len(), asked);
}

/// Debian's layout: dated folders, each with unsigned checksums.
struct Debian(Bench);

impl Debian {
    async fn new(stamps: &[&str]) -> Self {
        let bench = Bench::empty().await;
        let links: String = stamps
            .iter()
            .map(|stamp| format!("<a href=\"{stamp}/\">{stamp}/</a>\n"))
            .collect();
        let page = format!("<html><a href=\"latest/\">latest/</a>{links}</html>");
        bench.server.put("trixie/", page);
        Self(bench)
    }

    fn path(stamp: &str) -> String {
        format!("trixie/{stamp}/debian-13-genericcloud-amd64-{stamp}.qcow2")
    }

    fn publish(&self, stamp: &str, image: &[u8]) {
        let path = Self::path(stamp);
        let name = path.rsplit('/').next().unwrap();
        let sum = hex(&Sha512::digest(image));
        self.0.server.put(&path, image);
        let sums = format!("{sum}  {name}\n");
        self.0
            .server
            .put(&format!("trixie/{stamp}/SHA512SUMS"), sums);
    }

    async fn get(&self) -> Result<LocalImage, SourceError> {
        self.0.get(&self.0.source("debian:trixie")).await
    }
}

#[tokio::test]
async fn debian_is_its_newest_folder_that_is_whole() {
    let debian = Debian::new(&["20260101-999", "20260101-1000", "20260301-1"]).await;
    debian.publish("20260101-999", &picture(1));
    debian.publish("20260101-1000", &picture(2));
    // The newest folder has no checksums yet.
    let image = debian.get().await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), picture(2));
    let asked = debian.0.server.asked(".qcow2").len();
    assert!(debian.get().await.unwrap().outdated.is_none());
    assert_eq!(debian.0.server.asked(".qcow2").len(), asked);

    debian.publish("20260301-1", &picture(3));
    assert_eq!(debian.get().await.unwrap().sha256, sha256(&picture(3)));
    // A mirror that falls behind.
    debian.0.server.remove("trixie/20260301-1/SHA512SUMS");
    let outdated = debian.get().await.unwrap().outdated.unwrap();
    assert!(
        matches!(outdated, SourceError::Downgrade { .. }),
        "{outdated}"
    );
}

#[tokio::test]
async fn debians_checksums_must_hold_too() {
    let debian = Debian::new(&["20260101-1"]).await;
    let error = debian.get().await.unwrap_err();
    assert!(matches!(error, SourceError::NoRelease { .. }), "{error}");
    debian.publish("20260101-1", &picture(1));
    debian.0.server.put(&Debian::path("20260101-1"), picture(2));
    let error = debian.get().await.unwrap_err();
    assert!(
        matches!(error, SourceError::WrongChecksum { .. }),
        "{error}"
    );
    debian.0.server.put("trixie/20260101-1/SHA512SUMS", "");
    let error = debian.get().await.unwrap_err();
    assert!(matches!(error, SourceError::NotListed { .. }), "{error}");
    assert_eq!(debian.0.images(), Vec::<String>::new());
}

#[tokio::test]
async fn a_download_of_unknown_size_is_complete_when_nothing_follows() {
    let debian = Debian::new(&["20260101-1"]).await;
    debian.publish("20260101-1", &picture(1));
    let part = hex(&Sha512::digest(picture(1)));
    let part = debian
        .0
        .store
        .images()
        .at(&format!(".{}.part", &part[..64]));
    fs::write(part, picture(1)).unwrap();
    assert!(debian.get().await.is_ok());
}

/// What a build finds in an image that was downloaded.
fn kernel_of(bench: &Bench, image: &LocalImage) -> (String, String) {
    use crate::image::testing::{inputs, net};
    let lock = bench.store.try_build_lock().unwrap().unwrap();
    let inputs = inputs(bench.dir.path(), &image.path);
    // As the pool does it: not on a thread that drives tasks.
    let plan = std::thread::scope(|threads| {
        let plan = threads.spawn(|| bench.store.plan(&lock, &inputs, &net(), &|_| {}));
        plan.join().unwrap().unwrap()
    });
    (fs::read_to_string(&plan.kernel).unwrap(), plan.root.clone())
}

#[tokio::test]
async fn the_layouts_that_vendors_publish_become_build_plans() {
    use crate::image::testing::{ROOT_UUID, Text, disk_with, ext4, plain_root};
    let root_argument = format!("PARTUUID={ROOT_UUID}");
    let dir = tempfile::tempdir().unwrap();
    let packed = |disk: &Path, options: &str| {
        let (from, to) = (disk.display(), dir.path().join("packed"));
        let convert = "qemu-img convert -O qcow2 -c";
        run(&format!("{convert} {options} {from} {}", to.display()));
        fs::read(to).unwrap()
    };
    // Ubuntu since 24.04: /boot is a partition of its own.
    let system = [
        ("etc/os-release", Text("ID=ubuntu\n")),
        ("usr/lib/modules/6.8.0-45-generic/modules.dep", Text("")),
        ("var/lib/fleetingd/keep", Text("")),
    ];
    let root = ext4(dir.path(), "cloudimg-rootfs", 16, &system);
    let boot = ext4(
        dir.path(),
        "BOOT",
        16,
        &[("vmlinuz-6.8.0-45-generic", Text("of BOOT"))],
    );
    let image = packed(&disk_with(dir.path(), &root, Some(&boot)), "");
    let bench = Bench::empty().await;
    bench.publish(&image, SIGNED);
    let found = kernel_of(&bench, &bench.ubuntu().await.unwrap());
    assert_eq!(found, ("of BOOT".to_owned(), root_argument.clone()));

    // Before that, and Debian: the root holds it.
    let disk = disk_with(dir.path(), &plain_root(dir.path()), None);
    bench.publish(&packed(&disk, "-o compression_type=zstd"), SIGNED + 1);
    let found = kernel_of(&bench, &bench.ubuntu().await.unwrap());
    assert_eq!(found, ("kernel 9".to_owned(), root_argument.clone()));

    let debian = Debian::new(&["20260101-1"]).await;
    debian.publish("20260101-1", &packed(&disk, ""));
    let found = kernel_of(&debian.0, &debian.get().await.unwrap());
    assert_eq!(found, ("kernel 9".to_owned(), root_argument));
}

/// A file system of one MiB; needs root.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        run(&format!("mount -t tmpfs -o size=1m,mode=700 tmpfs {path}"));
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(&format!("umount -l {}", self.0.path().display()));
    }
}

#[tokio::test]
async fn a_full_disk_is_named_and_left_as_it_was() {
    let disk = SmallDisk::new();
    let image = vec![1; 2 << 20];
    let mut bench = Bench::empty().await;
    bench.store = Store::open(disk.0.path()).unwrap();
    bench.publish(&image, SIGNED);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::DiskFull { .. }), "{error}");
    assert!(
        error.to_string().contains("of 2 are free; hint: free some"),
        "{error}"
    );
    // Not a byte was asked for beyond what the answer's head told.
    assert_eq!(bench.names(".part"), Vec::<String>::new());

    // Where nobody says beforehand how much comes.
    let mut debian = Debian::new(&["20260101-1"]).await;
    debian.publish("20260101-1", &image);
    debian
        .0
        .server
        .spoil(&Debian::path("20260101-1"), &[Fault::NoSize]);
    debian.0.store = bench.store;
    let error = debian.get().await.unwrap_err();
    assert!(matches!(error, SourceError::DiskFull { .. }), "{error}");
    assert_eq!(debian.0.images(), Vec::<String>::new());
    assert_eq!(debian.0.names(".part"), Vec::<String>::new());
}

#[tokio::test]
async fn an_image_beyond_its_announced_size_is_cut_off() {
    let bench = Bench::new().await;
    bench.server.put(IMAGE, vec![1; 400_000]);
    bench.server.spoil(IMAGE, &[Fault::NoSize]);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(
        matches!(error, SourceError::TooLarge { limit: 300_000, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn what_should_be_small_is_not_read_for_ever() {
    let bench = Bench::new().await;
    let signature = format!("{FOLDER}/SHA256SUMS.gpg");
    bench.server.put(&signature, vec![b'x'; 100_000]);
    let error = bench.ubuntu().await.unwrap_err();
    assert!(matches!(error, SourceError::TooLarge { .. }), "{error}");
}

/// Where the next test's child finds its server.
const URL: &str = "FLEETINGD_TEST_URL";

#[test]
#[ignore = "the next test runs it, with an environment of its own"]
fn fetch_by_the_environment() {
    let url = std::env::var(URL).unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let bytes = runtime.unwrap().block_on(async {
        let client = Client::new(super::testing::QUICK).unwrap();
        client.small(&url, 1000, false).await
    });
    assert_eq!(bytes.unwrap(), b"it came");
}

/// Runs the test above with these variables; whether it passed, and what it said.
async fn child(url: &str, environment: &[(&str, &str)]) -> (bool, String) {
    let name = "image::source::tests::fetch_by_the_environment";
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", name]);
    for name in [
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "ssl_cert_file",
        "ssl_cert_dir",
    ] {
        command.env_remove(name).env_remove(name.to_uppercase());
        command.env_remove(name);
    }
    command.env(URL, url).envs(environment.iter().copied());
    let output = command.output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// An HTTP proxy that leads every CONNECT to one address, and counts them.
async fn proxy(to: std::net::SocketAddr) -> (String, std::sync::Arc<AtomicU64>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connects = std::sync::Arc::new(AtomicU64::new(0));
    let counter = std::sync::Arc::clone(&connects);
    tokio::spawn(async move {
        while let Ok((mut stream, _peer)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            assert!(head.starts_with(b"CONNECT images.example:443 "));
            counter.fetch_add(1, Ordering::Relaxed);
            stream.write_all(b"HTTP/1.1 200 Yes\r\n\r\n").await.unwrap();
            let mut server = tokio::net::TcpStream::connect(to).await.unwrap();
            let _closed = copy_bidirectional(&mut stream, &mut server).await;
        }
    });
    (format!("http://{address}"), connects)
}

#[tokio::test]
async fn proxies_and_authorities_come_from_the_environment() {
    let server = Server::start().await;
    server.put("file", "it came");
    let dir = tempfile::tempdir().unwrap();
    let pem = dir.path().join("authority.pem");
    fs::write(&pem, server.authority_pem()).unwrap();
    let pem = pem.to_str().unwrap();
    let direct = server.base().join("file").unwrap().to_string();

    let (passed, text) = child(&direct, &[("SSL_CERT_FILE", pem)]).await;
    assert!(passed, "{text}");
    let (passed, text) = child(&direct, &[]).await;
    assert!(!passed, "{text}");
    let (passed, text) = child(&direct, &[("SSL_CERT_FILE", "/dev/null")]).await;
    assert!(!passed && text.contains("NoAuthorities"), "{text}");

    let (proxy, connects) = proxy(server.address()).await;
    let far = "https://images.example/file";
    let environment = [("SSL_CERT_FILE", pem), ("HTTPS_PROXY", &proxy)];
    let (passed, text) = child(far, &environment).await;
    assert!(passed, "{text}");
    assert_eq!(connects.load(Ordering::Relaxed), 1);
    let environment = [&environment[..], &[("NO_PROXY", "localhost")]].concat();
    let (passed, text) = child(&direct, &environment).await;
    assert!(passed, "{text}");
    assert_eq!(connects.load(Ordering::Relaxed), 1);
}
