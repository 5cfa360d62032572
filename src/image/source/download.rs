//! One image file into the store: continued after an interruption, whole or not there at all.
//!
//! ```text
//!  .<checksum>.part ── flock: its downloader lives ── grows by ranges ──> checksums right
//!       │ interrupted: stays, and the next one continues it                   │ fsync, rename
//!       └ wrong, or no room: removed                                          v
//!                                                                       <sha256>.img
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode, Url};
use rustix::fs::{FlockOperation, flock};
use tokio::io::{AsyncSeekExt, AsyncWriteExt, BufWriter};

use super::checksum::{Checksum, Sums};
use super::http::{Client, is_web_page, looks_like_web_page, next_piece};
use super::{SourceError, SourceProgress, TellProgress};
use crate::image::ImageError;
use crate::image::dir::Dir;

/// No cloud image comes near it.
const MAX_IMAGE: u64 = 64 << 30;
/// Bytes written at once.
const PIECE: usize = 1 << 20;
/// How often a download of another process is looked at.
const POLL: Duration = Duration::from_millis(500);
const TELL: Duration = Duration::from_secs(30);
pub const PART_SUFFIX: &str = ".part";

/// A file to be had.
#[derive(Debug)]
pub struct Wanted<'a> {
    pub url: &'a Url,
    pub checksum: &'a Checksum,
    /// Its size, where somebody said it beforehand.
    pub bytes: Option<u64>,
}

/// A file that is being downloaded, by nobody else as long as this lives.
#[derive(Debug)]
pub struct Partial {
    images: Arc<Dir>,
    name: String,
    file: File,
}

impl Partial {
    /// Waits until nobody else downloads this file.
    pub async fn open(images: &Arc<Dir>, checksum: &Checksum) -> Result<Self, SourceError> {
        let mut told: Option<Instant> = None;
        loop {
            if let Some(partial) = Self::try_open(images, checksum)? {
                return Ok(partial);
            }
            if told.is_none_or(|at| at.elapsed() > TELL) {
                tracing::info!("somebody else of this host downloads the same image; waiting");
                told = Some(Instant::now());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn try_open(images: &Arc<Dir>, checksum: &Checksum) -> Result<Option<Self>, SourceError> {
        let name = format!(".{}{PART_SUFFIX}", checksum.short());
        let file = images.open_or_create(&name)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(ImageError::file("lock", &images.at(&name))(e.into()).into()),
        }
        // Its last owner may have renamed or removed it between our open and our lock.
        if !is_named(images, &name, &file)? {
            return Ok(None);
        }
        Ok(Some(Self {
            images: Arc::clone(images),
            name,
            file,
        }))
    }

    pub fn len(&self) -> Result<u64, SourceError> {
        let meta = self.file.metadata();
        Ok(meta.map_err(|e| self.failed("stat", e))?.len())
    }

    /// Forgets what came.
    pub fn clear(&self) -> Result<(), SourceError> {
        self.file.set_len(0).map_err(|e| self.failed("empty", e))
    }

    /// Checks what came and gives it its name; what is wrong is thrown away. Blocks.
    pub fn finish(&self, wanted: &Wanted<'_>) -> Result<(File, Checksum), SourceError> {
        let sums = Sums::of(&self.file, wanted.checksum).map_err(|e| self.failed("read", e))?;
        let found = sums.like(wanted.checksum);
        if found != wanted.checksum {
            self.clear()?;
            return Err(SourceError::WrongChecksum {
                url: wanted.url.to_string(),
                expected: wanted.checksum.clone(),
                found: found.clone(),
            });
        }
        self.file.sync_all().map_err(|e| self.failed("sync", e))?;
        let file = self.file.try_clone().map_err(|e| self.failed("open", e))?;
        // In use rather than being made; somebody who waited for it finds it under its name.
        flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|e| self.failed("lock", e.into()))?;
        self.images.rename(&self.name, &image_name(&sums.sha256))?;
        self.images.sync()?;
        Ok((file, sums.sha256))
    }

    /// Names a failure of the file system.
    fn failed(&self, act: &'static str, error: io::Error) -> SourceError {
        if error.kind() == io::ErrorKind::StorageFull
            || error.kind() == io::ErrorKind::QuotaExceeded
        {
            return self.no_room("not all of it was written".to_owned());
        }
        ImageError::file(act, &self.images.at(&self.name))(error).into()
    }

    /// What came is given up: it would only keep the disk full.
    fn no_room(&self, needed: String) -> SourceError {
        if let Err(e) = self.clear() {
            return e;
        }
        SourceError::DiskFull {
            path: self.images.path().to_owned(),
            needed,
        }
    }

    /// Refuses before the first byte what would not fit.
    fn check_room(&self, more: u64) -> Result<(), SourceError> {
        let stat = rustix::fs::fstatvfs(&self.file).map_err(|e| self.failed("stat", e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if more <= free {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        Err(self.no_room(format!("{} MiB of {} are free", mib(free), mib(more))))
    }
}

impl Drop for Partial {
    /// An empty file is worth nothing to whoever comes next.
    fn drop(&mut self) {
        let is_ours = is_named(&self.images, &self.name, &self.file).unwrap_or(false);
        if is_ours && self.len().is_ok_and(|len| len == 0) {
            // It stays, then; the next download uses it.
            let _ = self.images.remove(&self.name);
        }
    }
}

/// What the store calls an image.
pub fn image_name(sha256: &Checksum) -> String {
    format!("{sha256}.img")
}

/// Whether `name` is this very file.
pub fn is_named(images: &Dir, name: &str, file: &File) -> Result<bool, ImageError> {
    let Some(there) = images.open(name)? else {
        return Ok(false);
    };
    let identity = |file: &File| {
        let meta = file
            .metadata()
            .map_err(ImageError::file("stat", &images.at(name)))?;
        Ok::<_, ImageError>((meta.dev(), meta.ino()))
    };
    Ok(identity(&there)? == identity(file)?)
}

/// Fetches what is missing of a file, again and again while that brings something new.
pub async fn download(
    client: &Client,
    wanted: &Wanted<'_>,
    partial: &Partial,
    tell: TellProgress<'_>,
) -> Result<(), SourceError> {
    let mut etag = None;
    let mut tries = 0;
    loop {
        let before = partial.len()?;
        let Err(error) = receive(client, wanted, partial, &mut etag, tell).await else {
            return Ok(());
        };
        if !error.is_passing() {
            return Err(error);
        }
        tries = if partial.len()? > before {
            1
        } else {
            tries + 1
        };
        client.back_off(tries, error).await?;
    }
}

/// One request and its body.
async fn receive(
    client: &Client,
    wanted: &Wanted<'_>,
    partial: &Partial,
    etag: &mut Option<HeaderValue>,
    tell: TellProgress<'_>,
) -> Result<(), SourceError> {
    let mut have = partial.len()?;
    if wanted.bytes.is_some_and(|all| have > all) {
        partial.clear()?;
        have = 0;
    }
    if have > 0 && wanted.bytes == Some(have) {
        return Ok(());
    }
    let response = client
        .request(wanted.url, range(have, etag.as_ref()))
        .await?;
    if is_web_page(response.headers()) {
        let url = wanted.url.to_string();
        return Err(SourceError::WebPage { url });
    }
    let Some((start, total)) = place(&response, have) else {
        partial.clear()?;
        return Err(truncated(wanted, have));
    };
    if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
        // There is nothing behind what we have: it is all.
        return Ok(());
    }
    check_size(wanted, total)?;
    *etag = strong_etag(response.headers());
    if start == 0 {
        partial.clear()?;
    }
    if let Some(all) = total.or(wanted.bytes) {
        partial.check_room(all.saturating_sub(start))?;
    }
    let end = copy(response, wanted, partial, (start, total), tell).await?;
    match total.or(wanted.bytes) {
        Some(all) if end < all => Err(truncated(wanted, end)),
        _ => Ok(()),
    }
}

/// Appends a body to the file and says where it ended. What came before an error stays.
async fn copy(
    mut response: Response,
    wanted: &Wanted<'_>,
    partial: &Partial,
    (start, total): (u64, Option<u64>),
    tell: TellProgress<'_>,
) -> Result<u64, SourceError> {
    let write_failed = |e| partial.failed("write", e);
    let file = partial.file.try_clone().map_err(write_failed)?;
    let mut file = BufWriter::with_capacity(PIECE, tokio::fs::File::from_std(file));
    file.seek(io::SeekFrom::Start(start))
        .await
        .map_err(write_failed)?;
    let limit = wanted.bytes.unwrap_or(MAX_IMAGE);
    let mut at = start;
    let result = loop {
        let piece = match next_piece(&mut response, wanted.url, at).await {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(at),
            Err(e) => break Err(e),
        };
        if at == 0 && looks_like_web_page(&piece) {
            let url = wanted.url.to_string();
            return Err(SourceError::WebPage { url });
        }
        at = at.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        if at > limit {
            partial.clear()?;
            let url = wanted.url.to_string();
            return Err(SourceError::TooLarge { url, limit });
        }
        file.write_all(&piece).await.map_err(write_failed)?;
        tell(SourceProgress::Downloading {
            done_bytes: at,
            total_bytes: total.or(wanted.bytes),
        });
    };
    file.flush().await.map_err(write_failed)?;
    result
}

/// Asks for what is missing, and for all of it if the file is another one by now.
fn range(have: u64, etag: Option<&HeaderValue>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if have > 0
        && let Ok(range) = HeaderValue::from_str(&format!("bytes={have}-"))
    {
        headers.insert(RANGE, range);
        if let Some(etag) = etag {
            headers.insert(IF_RANGE, etag.clone());
        }
    }
    headers
}

/// Where an answer's body belongs, and how large the file is; `None`: nowhere.
fn place(response: &Response, have: u64) -> Option<(u64, Option<u64>)> {
    let content_range = || {
        let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
        let (place, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        Some((place.to_owned(), total.parse::<u64>().ok()))
    };
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let (place, total) = content_range()?;
            let start: u64 = place.split_once('-')?.0.parse().ok()?;
            (start == have).then_some((start, total))
        }
        StatusCode::RANGE_NOT_SATISFIABLE => {
            let (_, total) = content_range()?;
            (total == Some(have)).then_some((have, total))
        }
        _ => Some((0, response.content_length())),
    }
}

fn check_size(wanted: &Wanted<'_>, total: Option<u64>) -> Result<(), SourceError> {
    let url = || wanted.url.to_string();
    match (total, wanted.bytes) {
        (Some(bytes), Some(expected)) if bytes != expected => Err(SourceError::WrongSize {
            url: url(),
            bytes,
            expected,
        }),
        (Some(bytes), None) if bytes > MAX_IMAGE => Err(SourceError::TooLarge {
            url: url(),
            limit: MAX_IMAGE,
        }),
        _ => Ok(()),
    }
}

/// A weak one does not promise the same bytes.
fn strong_etag(headers: &HeaderMap) -> Option<HeaderValue> {
    let etag = headers.get(ETAG)?;
    etag.as_bytes().starts_with(b"\"").then(|| etag.clone())
}

fn truncated(wanted: &Wanted<'_>, bytes: u64) -> SourceError {
    SourceError::Truncated {
        url: wanted.url.to_string(),
        bytes,
    }
}
