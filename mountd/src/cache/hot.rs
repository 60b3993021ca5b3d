//! Complete files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use narlake_format::id::{ContentId, FileId};

use super::departed::Departed;
use super::{Cache, bytes_on_disk, synced, verify};

/// Mode of complete files: nobody writes to them. Who may get at them is for the directory to say.
const MODE: u32 = 0o444;

/// Digits of an id that name its directory in `hot/`; the others name the file. An overlay's redirect has this form too.
const SHARD_DIGITS: usize = 2;

impl Cache {
    /// The complete file of this content, if it is here with this size.
    pub fn open_hot(&self, id: &ContentId, size: u64) -> Option<File> {
        let known = self.ledger().get(id).is_some_and(|entry| !entry.partial);
        // What the scan has not come to may be there all the same.
        if !known && !self.is_scanning() {
            return None;
        }
        let opened = File::open(path(&self.dir, id)).and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((length, file)) if length == size => {
                let mut ledger = self.ledger();
                if !known && let Ok(metadata) = file.metadata() {
                    ledger.found(*id, bytes_of(&metadata), false);
                }
                ledger.touch(id);
                drop(ledger);
                Some(file)
            }
            // Somebody cut it, or removed it: a miss, and filled anew. The file itself may be open elsewhere.
            Ok((length, _)) => {
                if let Some(times) = self.count_damaged() {
                    tracing::warn!(file = %id, length, size, times, "cached file has the wrong length, dropped");
                }
                self.drop_hot(id);
                None
            }
            // Evicted since the look-up.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.drop_hot(id);
                None
            }
            Err(error) => {
                if let Some(times) = self.count_damaged() {
                    tracing::warn!(file = %id, %error, times, "open cached file");
                }
                self.drop_hot(id);
                None
            }
        }
    }

    /// Keeps a complete file, whose content the caller has verified. Returns it opened, or `None` when it is not kept.
    pub fn put_hot(&self, id: &ContentId, content: &[u8]) -> Option<File> {
        // What it will take, rounded up as file systems do.
        let _room = self.room((content.len() as u64).next_multiple_of(4096))?;
        match self.write_hot(id, content).or_else(|error| {
            // The directory may have been removed under us.
            if self.is_recreated(&error) { self.write_hot(id, content) } else { Err(error) }
        }) {
            Ok(file) => Some(file),
            Err(error) => {
                self.not_kept(id, &error);
                None
            }
        }
    }

    fn write_hot(&self, id: &ContentId, content: &[u8]) -> io::Result<File> {
        let temporary = self.temporary_path();
        let written = self.write_and_rename(&temporary, id, content);
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn write_and_rename(&self, temporary: &Path, id: &ContentId, content: &[u8]) -> io::Result<File> {
        let mut file = File::options().read(true).write(true).create_new(true).mode(MODE).open(temporary)?;
        file.write_all(content)?;
        verify::remember(&file, id, FileId::of(content));
        self.become_hot(temporary, id, &file)?;
        Ok(file)
    }

    /// Gives a complete file its final name.
    pub(super) fn become_hot(&self, from: &Path, id: &ContentId, file: &File) -> io::Result<()> {
        file.set_permissions(fs::Permissions::from_mode(MODE))?;
        let to = path(&self.dir, id);
        // Held until it has its name: a sync that ends this period comes after.
        let period = self.period.read().unwrap_or_else(PoisonError::into_inner);
        synced::stamp(file, *period)?;
        self.unsynced.store(true, Ordering::Relaxed);
        if let Err(error) = fs::rename(from, &to) {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            // The first of its directory.
            if let Some(parent) = to.parent() {
                fs::create_dir(parent).or_else(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => Ok(()),
                    _ => Err(error),
                })?;
                self.ledger().directories += fs::metadata(parent)?.blocks() * 512;
            }
            fs::rename(from, &to)?;
        }
        drop(period);
        let mut ledger = self.ledger();
        ledger.put(*id, bytes_of(&file.metadata()?), false);
        self.show(&ledger);
        Ok(())
    }

    /// Drops a complete file whose content turned out to be wrong.
    pub fn drop_damaged(&self, id: &ContentId) {
        if let Some(times) = self.count_damaged() {
            tracing::warn!(file = %id, times, "cached file is damaged, dropped");
        }
        self.drop_hot(id);
    }

    /// Counts a file that is not as it was put; the count if it is to be logged. A disk that goes bad has very many: it is
    /// said now and then, and always counted.
    fn count_damaged(&self) -> Option<u64> {
        self.metrics.cache_damaged.inc();
        Some(self.metrics.cache_damaged.get()).filter(|times| times.is_power_of_two())
    }

    pub(super) fn drop_hot(&self, id: &ContentId) {
        let mut ledger = self.ledger();
        let bytes = ledger.get(id).map_or(0, |entry| entry.bytes);
        remove(&self.dir, id, bytes, &mut self.departed());
        ledger.forget(id);
        self.show(&ledger);
    }
}

/// Where a complete file lies.
pub(super) fn path(dir: &Path, id: &ContentId) -> PathBuf {
    let name = id.to_string();
    let (shard, rest) = name.split_at_checked(SHARD_DIGITS).unwrap_or_default();
    let mut path = dir.join("hot");
    path.push(shard);
    path.push(rest);
    path
}

/// What a complete file takes, also where the file system has not yet given it all its blocks.
fn bytes_of(metadata: &fs::Metadata) -> u64 {
    bytes_on_disk(metadata).max(metadata.len().next_multiple_of(4096))
}

/// Unlinks a file that takes this many bytes; true if it is gone.
pub(super) fn remove(dir: &Path, id: &ContentId, bytes: u64, departed: &mut Departed) -> bool {
    departed.unlink(&path(dir, id), bytes)
}

/// The directories of complete files.
pub(super) fn shards(hot: &Path) -> Vec<PathBuf> {
    fs::read_dir(hot).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Ids of the complete files in one of them.
pub(super) fn ids(shard: &Path) -> Vec<ContentId> {
    let files = fs::read_dir(shard).into_iter().flatten().flatten();
    files.filter_map(|file| id_of(shard, &file.file_name())).collect()
}

fn id_of(shard: &Path, name: &std::ffi::OsStr) -> Option<ContentId> {
    let shard = shard.file_name()?.to_str().filter(|shard| shard.len() == SHARD_DIGITS)?;
    // Names of 64 digits are of an older layout, and strays like any other.
    format!("{shard}{}", name.to_str()?).parse().ok()
}

/// Finds what is there. What has no business there is removed. With `doubted`, a period, those that are not known to
/// have been on disk with it are named in `suspects`.
pub(super) fn scan(cache: &Cache, shard: &Path, doubted: Option<u64>, suspects: &mut Vec<ContentId>) -> io::Result<()> {
    if !fs::symlink_metadata(shard)?.is_dir() {
        return fs::remove_file(shard);
    }
    for file in fs::read_dir(shard)? {
        let file = file?;
        // Evicted or removed since the directory was read.
        let Ok(metadata) = file.metadata() else { continue };
        match id_of(shard, &file.file_name()) {
            Some(id) if metadata.is_file() => {
                cache.ledger().found(id, bytes_of(&metadata), false);
                if doubted.is_some_and(|period| !synced::covers(period, metadata.mtime())) {
                    suspects.push(id);
                }
            }
            _ => {
                tracing::warn!(file = %file.path().display(), "removed a stray file from the cache");
                if metadata.is_dir() { fs::remove_dir_all(file.path())? } else { fs::remove_file(file.path())? }
            }
        }
    }
    Ok(())
}
