//! A generation as a registry holds it.
//!
//! ```text
//!  manifest ── config: manifest.json of the generation
//!           ├─ layer: bytes 0 to 32 MiB of disk.raw, one zstd frame
//!           ├─ layer: bytes 96 to 128 MiB of disk.raw    (what lies between is a hole)
//!           └─ layer: bytes 0 to 32 MiB of vmlinux, ...
//! ```
//!
//! The same bytes make the same layer, so a registry that has an older image has most of a newer
//! one. Here is what is read of all that. A registry may say anything: nothing is believed until
//! it was held against a limit, and no length of its choice is ever reserved.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::name::Digest;
use crate::image::generation::{DISK, INITRD, MAX_MANIFEST, Manifest, VMLINUX, VMLINUZ};

/// What one layer holds at most, unpacked.
pub const CHUNK: u64 = 32 << 20;
/// Registries take about as much.
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// 128 GiB of data; also what the strictest registries take.
pub const MAX_LAYERS: usize = 4096;
/// A signature's layers.
pub const MAX_SIGNATURE: u64 = 64 << 10;
const MAX_DISK: u64 = 16 << 40;
const MAX_BOOT_FILE: u64 = 1 << 30;

const DOCUMENT: &str = "application/vnd.oci.image.manifest.v1+json";
const GENERATION: &str = "application/vnd.fleetingd.generation.v1+json";
const SIGNATURE: &str = "application/vnd.fleetingd.signature.v1";
const PGP: &str = "application/pgp-signature";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const OFFSET: &str = "vnd.fleetingd.offset";
/// What a config that nobody reads must be.
pub const EMPTY_CONFIG: &[u8] = b"{}";

/// Files by the media type of their layers.
const LAYERS: [(&str, &str); 4] = [
    (DISK, "application/vnd.fleetingd.disk.v1+zstd"),
    (VMLINUZ, "application/vnd.fleetingd.vmlinuz.v1+zstd"),
    (VMLINUX, "application/vnd.fleetingd.vmlinux.v1+zstd"),
    (INITRD, "application/vnd.fleetingd.initrd.v1+zstd"),
];

/// An OCI image manifest, as far as it concerns us.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// A blob of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    pub digest: Digest,
    pub bytes: u64,
}

/// A piece of a file, and the blob that holds it packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub file: &'static str,
    pub offset: u64,
    /// Unpacked.
    pub bytes: u64,
    pub blob: Blob,
}

/// What is wrong with what a registry says.
#[derive(Debug, PartialEq, Eq)]
pub enum Flaw {
    TooManyLayers(usize),
    Other(String),
}

impl Flaw {
    fn other(text: impl Into<String>) -> Self {
        Self::Other(text.into())
    }
}

impl Blob {
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            digest: Digest::of(bytes),
            bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        }
    }

    fn described(&self, media_type: &str) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: self.digest.to_string(),
            size: self.bytes,
            annotations: BTreeMap::new(),
        }
    }
}

impl Descriptor {
    fn blob(&self, limit: u64) -> Result<Blob, Flaw> {
        if self.size > limit {
            let (size, kind) = (self.size, &self.media_type);
            let text = format!("a {kind} of {size} bytes, more than the {limit} that we take");
            return Err(Flaw::other(text));
        }
        Ok(Blob {
            digest: self.digest.parse().map_err(Flaw::Other)?,
            bytes: self.size,
        })
    }
}

/// What a chunk may take when it cannot be packed.
fn packed_limit() -> u64 {
    CHUNK + (CHUNK >> 7) + 1024
}

impl Document {
    /// A generation of these blobs.
    pub fn generation(config: &Blob, chunks: &[Chunk]) -> Self {
        let layers = chunks.iter().map(|chunk| {
            let kind = LAYERS.iter().find(|(file, _)| *file == chunk.file);
            let mut layer = chunk.blob.described(kind.map_or("", |(_, kind)| kind));
            let offset = chunk.offset.to_string();
            layer.annotations.insert(OFFSET.to_owned(), offset);
            layer
        });
        Self {
            schema_version: 2,
            media_type: DOCUMENT.to_owned(),
            artifact_type: GENERATION.to_owned(),
            config: config.described(GENERATION),
            layers: layers.collect(),
            subject: None,
        }
    }

    /// A signature over a manifest.
    pub fn signature(of: &Blob, signature: &Blob) -> Self {
        Self {
            schema_version: 2,
            media_type: DOCUMENT.to_owned(),
            artifact_type: SIGNATURE.to_owned(),
            config: Blob::of(EMPTY_CONFIG).described(EMPTY),
            layers: vec![signature.described(PGP)],
            subject: Some(of.described(DOCUMENT)),
        }
    }

    pub fn media_type() -> &'static str {
        DOCUMENT
    }

    pub fn write(&self) -> Result<Vec<u8>, Flaw> {
        serde_json::to_vec(self).map_err(|e| Flaw::other(e.to_string()))
    }

    fn read(bytes: &[u8], artifact: &str) -> Result<Self, Flaw> {
        let document: Self =
            serde_json::from_slice(bytes).map_err(|e| Flaw::other(e.to_string()))?;
        if document.layers.len() > MAX_LAYERS {
            return Err(Flaw::TooManyLayers(document.layers.len()));
        }
        if document.schema_version != 2 || document.artifact_type != artifact {
            let kind = &document.artifact_type;
            return Err(Flaw::other(format!("its artifact type is {kind:?}")));
        }
        Ok(document)
    }

    /// The manifest of a generation.
    pub fn read_generation(bytes: &[u8]) -> Result<Self, Flaw> {
        Self::read(bytes, GENERATION)
    }

    /// The config of a generation.
    pub fn config(&self) -> Result<Blob, Flaw> {
        self.config.blob(MAX_MANIFEST)
    }

    /// The signature in its manifest.
    pub fn read_signature(bytes: &[u8]) -> Result<Blob, Flaw> {
        let document = Self::read(bytes, SIGNATURE)?;
        let mut layers = document.layers.iter().filter(|l| l.media_type == PGP);
        let layer = layers.next();
        layer
            .ok_or_else(|| Flaw::other("no OpenPGP signature in it"))?
            .blob(MAX_SIGNATURE)
    }

    /// The chunks of the files that `manifest` names, each in its place once.
    pub fn chunks(&self, manifest: &Manifest) -> Result<Vec<Chunk>, Flaw> {
        let sizes = file_sizes(manifest)?;
        let mut seen = BTreeSet::new();
        let mut chunks = Vec::new();
        for layer in &self.layers {
            let known = LAYERS.iter().find(|(_, kind)| *kind == layer.media_type);
            let (file, kind) =
                known.ok_or_else(|| Flaw::other(format!("a layer of {:?}", layer.media_type)))?;
            let offset = layer.annotations.get(OFFSET);
            let offset = offset.and_then(|text| text.parse::<u64>().ok());
            let size = sizes.get(file).copied().unwrap_or_default();
            match offset {
                Some(offset) if offset < size && offset % CHUNK == 0 => {
                    if !seen.insert((*file, offset)) {
                        return Err(Flaw::other(format!("{kind} at {offset} twice")));
                    }
                    chunks.push(Chunk {
                        file,
                        offset,
                        bytes: CHUNK.min(size - offset),
                        blob: layer.blob(packed_limit())?,
                    });
                }
                _ => return Err(Flaw::other(format!("{kind} beyond the {size} of its file"))),
            }
        }
        Ok(chunks)
    }
}

/// What the files are long.
fn file_sizes(manifest: &Manifest) -> Result<BTreeMap<&str, u64>, Flaw> {
    let mut sizes = BTreeMap::new();
    for file in &manifest.files {
        let limit = match file.name.as_str() {
            DISK => MAX_DISK,
            VMLINUX | VMLINUZ | INITRD => MAX_BOOT_FILE,
            other => return Err(Flaw::other(format!("a file {other:?}"))),
        };
        if file.bytes > limit {
            let (name, bytes) = (&file.name, file.bytes);
            return Err(Flaw::other(format!(
                "{name} of {bytes} bytes, more than the {limit} that we take"
            )));
        }
        if sizes.insert(file.name.as_str(), file.bytes).is_some() {
            return Err(Flaw::other(format!("{} twice", file.name)));
        }
    }
    let kernel = sizes.contains_key(VMLINUX) || sizes.contains_key(VMLINUZ);
    match kernel && sizes.contains_key(DISK) {
        true => Ok(sizes),
        false => Err(Flaw::other("no disk or no kernel in it")),
    }
}
