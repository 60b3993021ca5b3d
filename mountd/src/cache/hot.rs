//! Complete files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use narlake_format::id::ContentId;

use super::{Cache, Ledger, bytes_on_disk};

/// Digits of an id that name its directory in `hot/`; the others name the file. An overlay's redirect has this form too.
const SHARD_DIGITS: usize = 2;

impl Cache {
    /// The complete file of this content, if it is here with this size.
    pub fn open_hot(&self, id: &ContentId, size: u64) -> Option<File> {
        let known = self.ledger().get(id).is_some_and(|entry| !entry.partial);
        if !known {
            return None;
        }
        let opened = File::open(path(&self.dir, id)).and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((length, file)) if length == size => {
                self.ledger().touch(id);
                Some(file)
            }
            // Somebody cut it, or removed it: a miss, and filled anew. The file itself may be open elsewhere.
            Ok((length, _)) => {
                tracing::warn!(file = %id, length, size, "cached file has the wrong length, dropped");
                self.metrics.cache_damaged.inc();
                self.drop_hot(id);
                None
            }
            // Evicted since the look-up.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.drop_hot(id);
                None
            }
            Err(error) => {
                tracing::warn!(file = %id, %error, "open cached file");
                self.metrics.cache_damaged.inc();
                self.drop_hot(id);
                None
            }
        }
    }

    /// Keeps a complete file, whose content the caller has verified. Returns it opened, or `None` when it is not kept.
    pub fn put_hot(&self, id: &ContentId, content: &[u8]) -> Option<File> {
        // What it will take, rounded up as file systems do.
        if !self.make_room((content.len() as u64).next_multiple_of(4096)) {
            return None;
        }
        match self.write_hot(id, content) {
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
        let mut file = File::options().read(true).write(true).create_new(true).open(temporary)?;
        file.write_all(content)?;
        self.become_hot(temporary, id, &file)?;
        Ok(file)
    }

    /// Gives a complete file its final name.
    pub(super) fn become_hot(&self, from: &Path, id: &ContentId, file: &File) -> io::Result<()> {
        let to = path(&self.dir, id);
        if let Err(error) = fs::rename(from, &to) {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            // The first of its directory.
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::rename(from, &to)?;
        }
        let bytes = bytes_on_disk(&file.metadata()?).max(file.metadata()?.len().next_multiple_of(4096));
        let mut ledger = self.ledger();
        ledger.put(*id, bytes, false);
        self.show(&ledger);
        Ok(())
    }

    /// Drops a complete file whose content turned out to be wrong.
    pub fn drop_damaged(&self, id: &ContentId) {
        tracing::warn!(file = %id, "cached file is damaged, dropped");
        self.metrics.cache_damaged.inc();
        self.drop_hot(id);
    }

    fn drop_hot(&self, id: &ContentId) {
        let mut ledger = self.ledger();
        remove(&self.dir, id);
        ledger.forget(id);
        self.show(&ledger);
    }
}

/// Where a complete file lies.
fn path(dir: &Path, id: &ContentId) -> PathBuf {
    let name = id.to_string();
    let (shard, rest) = name.split_at_checked(SHARD_DIGITS).unwrap_or_default();
    let mut path = dir.join("hot");
    path.push(shard);
    path.push(rest);
    path
}

/// Unlinks a file; true if it is gone.
pub(super) fn remove(dir: &Path, id: &ContentId) -> bool {
    match fs::remove_file(path(dir, id)) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Finds what is there. What has no business there is removed.
pub(super) fn scan(hot: &Path, ledger: &mut Ledger) -> io::Result<()> {
    for shard in fs::read_dir(hot)? {
        let shard = shard?;
        if !shard.file_type()?.is_dir() {
            fs::remove_file(shard.path())?;
            continue;
        }
        for file in fs::read_dir(shard.path())? {
            let file = file?;
            // Names of 64 digits are of an older layout, and strays like any other.
            let name = [shard.file_name(), file.file_name()].map(|part| part.into_string().unwrap_or_default());
            let id = Some(name.concat()).filter(|_| name[0].len() == SHARD_DIGITS);
            let id = id.and_then(|name| name.parse::<ContentId>().ok());
            let metadata = file.metadata()?;
            match id {
                Some(id) if metadata.is_file() => {
                    ledger.put(id, bytes_on_disk(&metadata).max(metadata.len().next_multiple_of(4096)), false);
                }
                _ => {
                    tracing::warn!(file = %file.path().display(), "removed a stray file from the cache");
                    if metadata.is_dir() { fs::remove_dir_all(file.path())? } else { fs::remove_file(file.path())? }
                }
            }
        }
    }
    Ok(())
}
