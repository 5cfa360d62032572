//! Against a real registry: what is pushed comes back, and what a registry does wrong is told.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_client::RegistryOperation;
use tokio::sync::Notify;

use super::format::{Blob, CHUNK, Chunk, Document, MAX_LAYERS};
use super::push::push_signature;
use super::remote::Remote;
use super::testing::{Registry, TestStore, anything, noise};
use super::*;
use crate::image::generation::{DISK, Manifest};
use crate::image::source::testing::Signer;
use crate::image::testing::bytes_at;
use crate::image::{Contents, Generation};

const LATER: Trust<'static> = Trust::Later;

fn silent(_progress: TransferProgress) {}

async fn pushed(registry: &Registry, generation: &Generation, tag: &str) -> Pushed {
    let name = registry.name(&format!("image:{tag}"));
    push(&name, generation, None, &registry.access(), &silent)
        .await
        .unwrap()
}

async fn pulled(
    registry: &Registry,
    name: &RegistryName,
    to: &TestStore,
    trust: Trust<'_>,
) -> Result<Generation, RegistryError> {
    pulled_for(registry, name, to, trust, &anything()).await
}

async fn pulled_for(
    registry: &Registry,
    name: &RegistryName,
    to: &TestStore,
    trust: Trust<'_>,
    expected: &Expected,
) -> Result<Generation, RegistryError> {
    match pull(
        name,
        &to.store,
        trust,
        expected,
        &registry.access(),
        &silent,
    )
    .await?
    {
        Pulled::Present(generation) => Ok(*generation),
        Pulled::Fetched(fetched) => fetched.adopt_unasked(&to.store),
    }
}

/// The manifest as the registry has it.
async fn document(registry: &Registry, name: &RegistryName) -> Vec<u8> {
    let access = registry.access();
    let remote = Remote::open(name, RegistryOperation::Pull, &access).await;
    let (bytes, _) = remote
        .unwrap()
        .manifest(&name.wanted(), 1 << 20)
        .await
        .unwrap();
    bytes
}

fn blobs(document: &[u8]) -> Vec<Digest> {
    let document: serde_json::Value = serde_json::from_slice(document).unwrap();
    let layers = document["layers"].as_array().unwrap();
    let digests = layers.iter().map(|layer| layer["digest"].as_str().unwrap());
    digests.map(|digest| digest.parse().unwrap()).collect()
}

fn same_files(a: &Generation, b: &Generation) {
    for file in ["vmlinux", "vmlinuz", "initrd"] {
        let read = |g: &Generation| fs::read(g.dir.join(file)).unwrap();
        assert!(read(a) == read(b), "{file} differs");
    }
    // Where there is data; what is beside it would take storage.
    for (offset, len) in [(0, 2 << 20), (96 << 20, 1 << 20), ((1 << 30) - 4096, 4096)] {
        let read = |g: &Generation| bytes_at(&g.disk, offset, len);
        assert!(read(a) == read(b), "the disk differs at {offset}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_comes_back_the_same_and_sparse() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let generation = from.generation(7);
    let sent = pushed(&registry, &generation, "1").await;
    assert!(sent.sent_bytes > 1_300_000, "{sent:?}");
    let name = registry.name("image:1");
    let came = pulled(&registry, &name, &to, LATER).await.unwrap();
    same_files(&generation, &came);
    let meta = fs::metadata(&came.disk).unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
    assert_eq!(came.key.as_str(), sent.digest.as_hex());
    assert_eq!(to.names("generations"), [sent.digest.as_hex()]);
    assert!(to.names("pulls").is_empty());
    // What no machine came up from and nobody asked for stands in for nothing.
    assert!(!came.tested && !came.lineage.same_config(&generation.lineage));
    assert!(came.lineage.same_login(&generation.lineage));
    assert_eq!(
        (came.root, came.warnings),
        (generation.root, generation.warnings)
    );
    // A digest is enough once it is here, without a registry.
    let named = registry.named(&sent.digest);
    drop(registry);
    let gone = Registry::start();
    pulled(&gone, &named, &to, Trust::Shown(None))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_already_is_not_sent_again() {
    let (registry, from) = (Registry::start(), TestStore::new());
    let first = pushed(&registry, &from.generation(1), "1").await;
    let again = pushed(&registry, &from.generation_again(1), "2").await;
    assert_eq!((again.sent_bytes, &again.digest), (0, &first.digest));
    assert_eq!(again.there_bytes, first.sent_bytes + first.there_bytes);
    let other = pushed(&registry, &from.generation(2), "3").await;
    assert!((300_000..400_000).contains(&other.sent_bytes), "{other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pull_goes_on_where_it_was() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let generation = from.generation(7);
    pushed(&registry, &generation, "1").await;
    let name = registry.name("image:1");
    let first = blobs(&document(&registry, &name).await).remove(0);
    let first_bytes = fs::metadata(registry.blob_file(&first)).unwrap().len();
    let came = Notify::new();
    let tell = |progress: TransferProgress| {
        if progress.done_bytes > first_bytes {
            came.notify_one();
        }
    };
    let (access, expected) = (registry.access(), anything());
    tokio::select! {
        biased;
        () = came.notified() => {}
        _ = pull(&name, &to.store, LATER, &expected, &access, &tell) => panic!("not interrupted"),
    }
    assert_eq!(to.names("pulls").len(), 1);
    assert!(to.names("generations").is_empty());
    // What has come is not asked for again.
    fs::remove_file(registry.blob_file(&first)).unwrap();
    let came = pulled(&registry, &name, &to, LATER).await.unwrap();
    same_files(&generation, &came);
    assert!(to.names("pulls").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_is_refused_wherever_it_is() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let sent = pushed(&registry, &from.generation(7), "1").await;
    let name = registry.named(&sent.digest);
    let mut digests = blobs(&document(&registry, &name).await);
    digests.push(sent.digest.clone());
    for digest in digests {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(registry.blob_file(&digest))
            .unwrap();
        let flip = || {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 9).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 9).unwrap();
        };
        flip();
        let error = pulled(&registry, &name, &to, LATER).await.unwrap_err();
        let damaged = matches!(
            &error,
            // The registry itself may notice a manifest that it cannot read any more.
            RegistryError::WrongDigest { .. } | RegistryError::Status { .. }
        );
        assert!(damaged, "{digest}: {error}");
        assert!(to.is_empty(), "{digest}");
        flip();
    }
    pulled(&registry, &name, &to, LATER).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_believed_for_a_signature_only() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let (ours, theirs) = (Signer::new(), Signer::new());
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = from.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let keyring = file("keyring", &ours.public());
    let shown = Trust::Shown(Some(keyring.as_path()));
    let name = registry.name("image:1");
    let access = registry.access();

    let sent = pushed(&registry, &from.generation(1), "1").await;
    let error = pulled(&registry, &name, &to, Trust::Shown(None))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("write {name}@{}", sent.digest)),
        "{error}"
    );
    let error = pulled(&registry, &name, &to, shown).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Unsigned { .. }), "{error}");

    let key = file("theirs", &theirs.secret());
    let generation = from.generation_again(1);
    push(&name, &generation, Some(&key), &access, &silent)
        .await
        .unwrap();
    let error = pulled(&registry, &name, &to, shown).await.unwrap_err();
    assert!(
        matches!(&error, RegistryError::BadSignature { .. }),
        "{error}"
    );
    assert!(error.to_string().contains(&theirs.fingerprint()), "{error}");
    assert!(to.is_empty());

    let key = file("ours", &ours.secret());
    push(&name, &generation, Some(&key), &access, &silent)
        .await
        .unwrap();
    let came = pulled(&registry, &name, &to, shown).await.unwrap();
    assert_eq!(came.key.as_str(), sent.digest.as_hex());

    // The tag moves on: what was signed before says nothing of what is there now.
    let moved = pushed(&registry, &from.generation(2), "1").await;
    let error = pulled(&registry, &name, &to, shown)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains(&moved.digest.to_string()), "{error}");
    assert!(error.contains(&format!("({} when", sent.digest)), "{error}");
    // Nor does that signature under the new one's name.
    let document = document(&registry, &name).await;
    let remote = Remote::open(&name, RegistryOperation::Push, &access)
        .await
        .unwrap();
    let of = Blob::of(&document);
    let other = ours.sign(b"another manifest", 1_700_000_000);
    push_signature(&remote, &name, &of, &other).await.unwrap();
    let error = pulled(&registry, &name, &to, shown).await.unwrap_err();
    assert!(
        matches!(&error, RegistryError::BadSignature { .. }),
        "{error}"
    );
    // And one that is older than the last leads back.
    let old = ours.sign(&document, 1_700_000_000);
    push_signature(&remote, &name, &of, &old).await.unwrap();
    let error = pulled(&registry, &name, &to, shown).await.unwrap_err();
    assert!(matches!(&error, RegistryError::WentBack { .. }), "{error}");
    assert_eq!(to.names("generations"), [sent.digest.as_hex()]);
    // By its digest it is what the operator wants, whoever signed it.
    let by_digest = registry.named(&moved.digest);
    pulled(&registry, &by_digest, &to, Trust::Shown(None))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_fit_is_refused_by_both_names() {
    type Change = fn(&mut Contents, &mut ExpectedMachines);
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let cases: [(Change, [&str; 2]); 6] = [
        (
            |image, _| image.architecture = "pdp11".into(),
            ["for pdp11", "host is x86_64"],
        ),
        (
            |_, ours| ours.speaks = |_| false,
            ["protocol 1", "this program 1"],
        ),
        (
            |image, _| image.username = "ann".into(),
            ["\"ann\"", "\"ubuntu\""],
        ),
        (
            |_, ours| ours.disk_gib = 3,
            ["1024 MiB", "vm_disk_size_gb is 3"],
        ),
        (
            |image, _| image.runner = Some("abc".into()),
            ["SHA-256 abc", "vendor's package"],
        ),
        (
            |_, ours| ours.lineage = with_password(&ours.lineage),
            ["another password", "\"ubuntu\""],
        ),
    ];
    for (number, (change, both)) in (10..).zip(cases) {
        let mut machines = from.expected();
        let generation = from.generation_with(number, |contents| change(contents, &mut machines));
        let sent = pushed(&registry, &generation, "1").await;
        let mut expected = anything();
        expected.machines = Some(machines);
        let name = registry.named(&sent.digest);
        let trust = Trust::Shown(None);
        let error = pulled_for(&registry, &name, &to, trust, &expected).await;
        let error = error.unwrap_err().to_string();
        for side in both {
            assert!(error.contains(side), "{side}: {error}");
        }
        assert!(to.is_empty(), "{error}");
    }
    // One that is here already is looked at as well.
    let generation = from.generation(1);
    let sent = pushed(&registry, &generation, "1").await;
    let name = registry.named(&sent.digest);
    let mut expected = anything();
    expected.machines = Some(from.expected());
    pulled_for(&registry, &name, &to, LATER, &expected)
        .await
        .unwrap();
    expected.machines.as_mut().unwrap().username = "ann".to_owned();
    let error = pulled_for(&registry, &name, &to, LATER, &expected)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::OtherUsername { .. }),
        "{error}"
    );
}

fn with_password(lineage: &crate::image::Lineage) -> crate::image::Lineage {
    let mut value = serde_json::to_value(lineage).unwrap();
    value["login"] = "another".into();
    serde_json::from_value(value).unwrap()
}

/// Puts what somebody else made there.
async fn forged(
    registry: &Registry,
    manifest: &Manifest,
    chunks: &[(Chunk, Vec<u8>)],
) -> RegistryName {
    let name = registry.name("image:forged");
    let access = registry.access();
    let remote = Remote::open(&name, RegistryOperation::Push, &access)
        .await
        .unwrap();
    for (chunk, packed) in chunks {
        remote.put_blob(&chunk.blob, packed).await.unwrap();
    }
    let config = serde_json::to_vec(manifest).unwrap();
    let blob = Blob::of(&config);
    remote.put_blob(&blob, &config).await.unwrap();
    let chunks: Vec<Chunk> = chunks.iter().map(|(chunk, _)| chunk.clone()).collect();
    let document = Document::generation(&blob, &chunks).write().unwrap();
    remote.put_manifest(&name, &document).await.unwrap();
    name
}

fn chunk(offset: u64, bytes: u64, content: &[u8]) -> (Chunk, Vec<u8>) {
    let packed = zstd::bulk::compress(content, 3).unwrap();
    let blob = Blob::of(&packed);
    let file = DISK;
    (
        Chunk {
            file,
            offset,
            bytes,
            blob,
        },
        packed,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_unpacks_to_something_else_is_refused() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let (_, manifest) = from.generation(1).manifest().unwrap();
    let bomb = vec![0; usize::try_from(CHUNK).unwrap() * 8];
    let whole = noise(1, 1 << 20);
    let mut cut = chunk(0, CHUNK, &whole);
    cut.1.truncate(1 << 19);
    cut.0.blob = Blob::of(&cut.1);
    let mut none = chunk(0, CHUNK, &[]);
    none.1 = b"no zstd".to_vec();
    none.0.blob = Blob::of(&none.1);
    for (what, chunk) in [
        ("bomb", chunk(0, CHUNK, &bomb)),
        ("short", chunk(0, CHUNK, &whole)),
        ("cut", cut),
        ("none", none),
    ] {
        let name = forged(&registry, &manifest, &[chunk]).await;
        let error = pulled(&registry, &name, &to, LATER).await.unwrap_err();
        assert!(
            matches!(error, RegistryError::Unpack { .. }),
            "{what}: {error}"
        );
        assert!(to.is_empty(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_layers_are_refused() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let (_, manifest) = from.generation(1).manifest().unwrap();
    let one = chunk(0, CHUNK, b"x");
    let mut many = vec![one.clone()];
    many.resize_with(MAX_LAYERS + 1, || (one.0.clone(), Vec::new()));
    many.truncate(MAX_LAYERS + 1);
    let name = forged_with(&registry, &manifest, &one, &many).await;
    let error = pulled(&registry, &name, &to, LATER).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("4097 layers, more than the 4096"),
        "{error}"
    );
    assert!(to.is_empty());
}

/// As [`forged`], with one blob for all chunks.
async fn forged_with(
    registry: &Registry,
    manifest: &Manifest,
    one: &(Chunk, Vec<u8>),
    many: &[(Chunk, Vec<u8>)],
) -> RegistryName {
    let name = forged(registry, manifest, std::slice::from_ref(one)).await;
    let access = registry.access();
    let remote = Remote::open(&name, RegistryOperation::Push, &access)
        .await
        .unwrap();
    let config = Blob::of(&serde_json::to_vec(manifest).unwrap());
    let chunks: Vec<Chunk> = many.iter().map(|(chunk, _)| chunk.clone()).collect();
    let document = Document::generation(&config, &chunks).write().unwrap();
    remote.put_manifest(&name, &document).await.unwrap();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_of_ours_is_refused() {
    let (registry, to) = (Registry::start(), TestStore::new());
    let name = registry.name("image:other");
    let access = registry.access();
    let error = pulled(&registry, &name, &to, LATER).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotThere { .. }), "{error:?}");
    let remote = Remote::open(&name, RegistryOperation::Push, &access)
        .await
        .unwrap();
    let config = Blob::of(b"{}");
    remote.put_blob(&config, b"{}").await.unwrap();
    let signature = Document::signature(&config, &config).write().unwrap();
    remote.put_manifest(&name, &signature).await.unwrap();
    let error = pulled(&registry, &name, &to, LATER).await.unwrap_err();
    assert!(error.to_string().contains("artifact type"), "{error}");
    let error = remote.manifest("other", 10).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::TooLarge { limit: 10, .. }),
        "{error}"
    );
    assert!(to.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_login_is_used_with_that_of_this_host() {
    let (registry, from, to) = (Registry::with_login(), TestStore::new(), TestStore::new());
    let sent = pushed(&registry, &from.generation(1), "1").await;
    let name = registry.named(&sent.digest);
    pulled(&registry, &name, &to, LATER).await.unwrap();
    let nobody = Access::with(Vec::new(), crate::image::source::http::Patience::SHORT);
    let elsewhere = TestStore::new();
    let denied = pull(
        &name,
        &elsewhere.store,
        LATER,
        &anything(),
        &nobody,
        &silent,
    )
    .await;
    let denied = denied.unwrap_err();
    assert!(matches!(denied, RegistryError::Denied { .. }), "{denied:?}");
    let tag = registry.name("image:1");
    let denied = push(&tag, &from.generation_again(1), None, &nobody, &silent).await;
    let denied = denied.unwrap_err();
    assert!(
        denied.to_string().contains("REGISTRY_AUTH_FILE"),
        "{denied}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_want_the_same_fetch_it_once() {
    let (registry, from, to) = (Registry::start(), TestStore::new(), TestStore::new());
    let sent = pushed(&registry, &from.generation(1), "1").await;
    let name = registry.name("image:1");
    let (a, b) = tokio::join!(
        pulled(&registry, &name, &to, LATER),
        pulled(&registry, &name, &to, LATER)
    );
    assert_eq!(a.unwrap().key, b.unwrap().key);
    assert_eq!(to.names("generations"), [sent.digest.as_hex()]);
    assert!(to.names("pulls").is_empty());
}

#[test]
fn what_nobody_went_on_with_is_removed_in_the_end() {
    let to = TestStore::new();
    let pulls = to.store.pulls().unwrap();
    let (old, new, used) = (Digest::of(b"old"), Digest::of(b"new"), Digest::of(b"used"));
    for digest in [&old, &new, &used] {
        pulls.sub(digest.as_hex()).unwrap();
    }
    let age = |digest: &Digest| {
        let path: &Path = &pulls.at(digest.as_hex());
        let week = std::time::Duration::from_secs(8 * 24 * 60 * 60);
        let then = std::time::SystemTime::now() - week;
        fs::File::open(path).unwrap().set_modified(then).unwrap();
    };
    age(&old);
    age(&used);
    let _fetcher = staging::Staging::open(&pulls, &used).unwrap().unwrap();
    staging::tidy(&pulls).unwrap();
    let mut left = to.names("pulls");
    left.sort();
    let mut expected = [new.as_hex(), used.as_hex()];
    expected.sort_unstable();
    assert_eq!(left, expected);
}
