//! Files of which some chunks are there.
//!
//! The data file is sparse and has its full length from the start; beside it, the map says which chunks are in it:
//! `"NLPART01"`, file size and number of chunks as little-endian u64, then one byte for each chunk, 1 where it is
//! there. A chunk's byte is written after its data, so that a daemon that dies in between has lost nothing but that
//! chunk. When the last chunk is in, the data file is renamed into `hot/`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use narlake_format::id::ContentId;

use super::departed::Departed;
use super::{Cache, bytes_on_disk, verify};

const MAGIC: &[u8; 8] = b"NLPART01";
const HEADER_LEN: usize = 24;

/// What a map takes on disk, nearly always: one block for up to 4,072 chunks.
const MAP_BYTES: u64 = 4096;

/// An open partial file. While it is open, it is not evicted.
pub struct Partial {
    cache: Arc<Cache>,
    id: ContentId,
    data: Arc<File>,
    map: File,
}

impl Partial {
    /// Opens the partial file of this content, or makes one; and says which chunks are there. `None` when none can be
    /// kept.
    pub fn open(cache: &Arc<Cache>, id: &ContentId, size: u64, chunks: usize) -> Option<(Self, Vec<bool>)> {
        // Room is taken as chunks come in; a file that can never be complete is not begun.
        if size > cache.settings.bytes_max {
            return None;
        }
        // Before there is a file: a scan takes half of a pair that is not in the ledger for a stray.
        let is_new = cache.ledger().get(id).is_none();
        if is_new {
            cache.ledger().put(*id, 2 * MAP_BYTES, true);
        }
        let opened = cache.open_partial(id, size, chunks).or_else(|error| {
            if error.kind() != io::ErrorKind::InvalidData && error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            if error.kind() == io::ErrorKind::InvalidData {
                tracing::warn!(file = %id, %error, "partial file dropped");
                cache.metrics.cache_damaged.inc();
                cache.drop_partial(id);
            }
            cache.make_partial(id, size, chunks).or_else(|error| {
                // The directory may have been removed under us.
                if cache.is_recreated(&error) { cache.make_partial(id, size, chunks) } else { Err(error) }
            })
        });
        match opened {
            Ok((data, map, present)) => {
                let mut ledger = cache.ledger();
                if is_new || ledger.get(id).is_none() {
                    // Both files; what is in them already if the scan has not come to them.
                    ledger.put(*id, data.metadata().map_or(0, |metadata| bytes_on_disk(&metadata)) + MAP_BYTES, true);
                }
                ledger.hold(id, true);
                Some((Self { cache: Arc::clone(cache), id: *id, data: Arc::new(data), map }, present))
            }
            Err(error) => {
                if is_new {
                    cache.ledger().forget(id);
                }
                cache.not_kept(id, &error);
                None
            }
        }
    }

    /// The data, for reading.
    #[must_use]
    pub fn data(&self) -> Arc<File> {
        Arc::clone(&self.data)
    }

    /// Keeps consecutive chunks, the first of number `first`, whose content the caller has verified. False when they
    /// are not kept.
    pub fn put(&self, first: usize, count: usize, offset: u64, content: &[u8]) -> bool {
        let Some(_room) = self.cache.room((content.len() as u64).next_multiple_of(4096)) else { return false };
        let marks = vec![1; count];
        let written = self
            .data
            .write_all_at(content, offset)
            .and_then(|()| self.map.write_all_at(&marks, (HEADER_LEN + first) as u64))
            .and_then(|()| self.data.metadata());
        match written {
            Ok(metadata) => {
                let mut ledger = self.cache.ledger();
                ledger.put(self.id, bytes_on_disk(&metadata) + MAP_BYTES, true);
                self.cache.show(&ledger);
                true
            }
            Err(error) => {
                self.cache.not_kept(&self.id, &error);
                false
            }
        }
    }

    /// All chunks are in: gives the file its final name.
    pub fn complete(&self) {
        let (data, map) = paths(&self.cache.dir, &self.id);
        match verify::hash(&self.data, &mut |_| true) {
            Ok(Some(sum)) => verify::remember(&self.data, &self.id, sum),
            // What cannot be read back is no complete file.
            Ok(None) => return,
            Err(error) => return self.cache.not_kept(&self.id, &error),
        }
        match self.cache.become_hot(&data, &self.id, &self.data) {
            // A map without its data is removed by the next scan.
            Ok(()) => drop(fs::remove_file(map)),
            Err(error) => self.cache.not_kept(&self.id, &error),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.cache.ledger().hold(&self.id, false);
    }
}

impl Cache {
    fn open_partial(&self, id: &ContentId, size: u64, chunks: usize) -> io::Result<(File, File, Vec<bool>)> {
        let (data_path, map_path) = paths(&self.dir, id);
        let map = File::options().read(true).write(true).open(map_path)?;
        let data = File::options().read(true).write(true).open(data_path)?;
        let mut header = [0; HEADER_LEN];
        let mut marks = vec![0; chunks];
        let whole = map.read_exact_at(&mut header, 0).and_then(|()| map.read_exact_at(&mut marks, HEADER_LEN as u64));
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        whole.map_err(|_| invalid("the map is cut short"))?;
        if header != self::header(size, chunks) || marks.iter().any(|mark| *mark > 1) {
            return Err(invalid("the map is not of this file"));
        }
        if data.metadata()?.len() != size {
            return Err(invalid("the data has the wrong length"));
        }
        Ok((data, map, marks.into_iter().map(|mark| mark == 1).collect()))
    }

    fn make_partial(&self, id: &ContentId, size: u64, chunks: usize) -> io::Result<(File, File, Vec<bool>)> {
        let (data_path, map_path) = paths(&self.dir, id);
        let make = |path: &Path| File::options().read(true).write(true).create(true).truncate(true).open(path);
        let made = (|| {
            let data = make(&data_path)?;
            data.set_len(size)?;
            let map = make(&map_path)?;
            let mut bytes = self::header(size, chunks).to_vec();
            bytes.resize(HEADER_LEN + chunks, 0);
            map.write_all_at(&bytes, 0)?;
            Ok((data, map, vec![false; chunks]))
        })();
        if made.is_err() {
            remove(&self.dir, id, 0, &mut self.departed());
        }
        made
    }

    fn drop_partial(&self, id: &ContentId) {
        let mut ledger = self.ledger();
        let bytes = ledger.get(id).map_or(0, |entry| entry.bytes);
        remove(&self.dir, id, bytes, &mut self.departed());
        ledger.forget(id);
        self.show(&ledger);
    }
}

fn header(size: u64, chunks: usize) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&size.to_le_bytes());
    header[16..].copy_from_slice(&(chunks as u64).to_le_bytes());
    header
}

/// Where the data and the map lie.
fn paths(dir: &Path, id: &ContentId) -> (PathBuf, PathBuf) {
    let partial = dir.join("partial");
    (partial.join(id.to_string()), partial.join(format!("{id}.map")))
}

/// Unlinks both files, which take this many bytes together; true if they are gone.
pub(super) fn remove(dir: &Path, id: &ContentId, bytes: u64, departed: &mut Departed) -> bool {
    let (data, map) = paths(dir, id);
    // The map first: data without a map is nothing, a map without data is damage.
    departed.unlink(&map, 0) && departed.unlink(&data, bytes)
}

/// Finds what is there. Halves of a pair are removed, but not of one that is being made: the ledger knows it before.
pub(super) fn scan(partial: &Path, cache: &Cache) -> io::Result<()> {
    for file in fs::read_dir(partial)? {
        let file = file?;
        let name = file.file_name();
        let name = name.to_str().unwrap_or_default();
        let other = match name.strip_suffix(".map") {
            Some(data) => partial.join(data),
            None => partial.join(format!("{name}.map")),
        };
        let id: Option<ContentId> = name.strip_suffix(".map").unwrap_or(name).parse().ok();
        let mut ledger = cache.ledger();
        match id {
            Some(id) if ledger.get(&id).is_some() => {}
            Some(id) if other.try_exists()? => {
                if !name.ends_with(".map")
                    && let Ok(metadata) = file.metadata()
                {
                    ledger.found(id, bytes_on_disk(&metadata) + MAP_BYTES, true);
                }
            }
            _ => {
                let path = file.path();
                tracing::warn!(file = %path.display(), "removed a stray file from the cache");
                if file.file_type()?.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
            }
        }
    }
    Ok(())
}
