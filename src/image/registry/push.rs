//! A generation on its way into a registry.
//!
//! Chunk by chunk: read, packed, and sent unless it is there already. The manifest comes last, so
//! nobody sees half of one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oci_client::RegistryOperation;
use rustix::fs::SeekFrom;

use super::format::{Blob, CHUNK, Chunk, Document, EMPTY_CONFIG, MAX_LAYERS};
use super::name::{Digest, RegistryName};
use super::remote::{Access, Remote};
use super::sign::Signer;
use super::{RegistryError, Tell, TransferProgress, blocking, not_ours, signature_tag};
use crate::image::generation::FILES;
use crate::image::{Generation, ImageError};

/// Good enough for disks, and faster than most lines.
const LEVEL: i32 = 3;

/// What a push came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The manifest's: what the image is called wherever it is pulled.
    pub digest: Digest,
    pub sent_bytes: u64,
    /// Packed bytes that were there already.
    pub there_bytes: u64,
}

/// Puts a generation under a tag, signed by a secret key where one is named.
pub async fn push(
    name: &RegistryName,
    generation: &Generation,
    sign_key: Option<&Path>,
    access: &Access,
    tell: Tell<'_>,
) -> Result<Pushed, RegistryError> {
    if name.digest().is_some() {
        return Err(not_ours(name, "a push needs a tag, not a digest"));
    }
    let signer = sign_key.map(Signer::read).transpose()?;
    let (config, manifest) = generation.manifest()?;
    if manifest.contents.is_none() {
        let key = generation.key.to_string();
        return Err(RegistryError::NoContents { key });
    }
    let remote = Remote::open(name, RegistryOperation::Push, access).await?;
    let mut pushed = Pushed {
        digest: Digest::of(&[]),
        sent_bytes: 0,
        there_bytes: 0,
    };
    let chunks = push_files(&remote, name, generation, &mut pushed, tell).await?;
    let config_blob = Blob::of(&config);
    remote.put_blob(&config_blob, &config).await?;
    let document = Document::generation(&config_blob, &chunks);
    let bytes = document.write().map_err(|flaw| flaw.of(name))?;
    remote.put_manifest(name, &bytes).await?;
    let whole = Blob::of(&bytes);
    pushed.digest = whole.digest.clone();
    if let Some(signer) = signer {
        push_signature(&remote, name, &whole, &signer.sign(&bytes)?).await?;
    }
    Ok(pushed)
}

async fn push_files(
    remote: &Remote,
    name: &RegistryName,
    generation: &Generation,
    pushed: &mut Pushed,
    tell: Tell<'_>,
) -> Result<Vec<Chunk>, RegistryError> {
    let total_bytes = generation.stored_bytes()?;
    let mut done_bytes = 0;
    let mut chunks = Vec::new();
    let (_, manifest) = generation.manifest()?;
    for file in &manifest.files {
        let Some(file_name) = FILES.iter().find(|known| **known == file.name) else {
            continue;
        };
        let mut offset = 0;
        while offset < file.bytes {
            let bytes = CHUNK.min(file.bytes - offset);
            let (held, place) = (generation.clone(), (*file_name, offset, bytes));
            if let Some(packed) = blocking(move || pack(&held, place)).await? {
                if chunks.len() >= MAX_LAYERS {
                    return Err(RegistryError::TooManyLayers {
                        name: name.to_string(),
                        count: chunks.len() + 1,
                        limit: MAX_LAYERS,
                    });
                }
                let blob = Blob::of(&packed);
                match remote.put_blob(&blob, &packed).await? {
                    true => pushed.sent_bytes += blob.bytes,
                    false => pushed.there_bytes += blob.bytes,
                }
                chunks.push(Chunk {
                    file: file_name,
                    offset,
                    bytes,
                    blob,
                });
                done_bytes += bytes;
                tell(TransferProgress {
                    // Holes within a chunk count here but not in the total.
                    done_bytes: done_bytes.min(total_bytes),
                    total_bytes,
                });
            }
            offset += bytes;
        }
    }
    Ok(chunks)
}

pub(super) async fn push_signature(
    remote: &Remote,
    name: &RegistryName,
    of: &Blob,
    signature: &[u8],
) -> Result<(), RegistryError> {
    let blob = Blob::of(signature);
    remote.put_blob(&blob, signature).await?;
    let config = Blob::of(EMPTY_CONFIG);
    remote.put_blob(&config, EMPTY_CONFIG).await?;
    let document = Document::signature(of, &blob).write();
    let document = document.map_err(|flaw| flaw.of(name))?;
    let place = name.tagged(&signature_tag(&of.digest));
    remote.put_manifest(&place, &document).await
}

/// A piece of a file, packed; `None` if there are only zeroes. Blocks.
fn pack(
    generation: &Generation,
    (name, offset, len): (&'static str, u64, u64),
) -> Result<Option<Vec<u8>>, RegistryError> {
    let path = generation.dir.join(name);
    let read = ImageError::file("read", &path);
    let file = generation.open_file(name)?;
    let packed = if next_data(&file, offset)?.is_none_or(|data| data >= offset + len) {
        Ok(None)
    } else {
        read_piece(&file, offset, len).and_then(|bytes| {
            let empty = bytes.iter().all(|byte| *byte == 0);
            (!empty)
                .then(|| zstd::bulk::compress(&bytes, LEVEL))
                .transpose()
        })
    };
    Ok(packed.map_err(read)?)
}

fn read_piece(file: &File, offset: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).map_err(std::io::Error::other)?];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Where the next bytes that are no hole begin.
fn next_data(file: &File, offset: u64) -> Result<Option<u64>, ImageError> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        // A file system that knows no holes.
        Err(_unknown) => Ok(Some(offset)),
    }
}
