//! A spool on disk: how entries come, are listed and go. [`narlake_format::api::spool`] has the layout.
//!
//! Any number of hooks may add entries while one pusher takes them. An entry that is listed is whole: it was written
//! under a hidden name and renamed. Nothing is synced: what a power cut leaves half written is refused by name, and the
//! build whose push is lost was lost with its upper store's last seconds too.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use narlake_format::api::spool::{DROPPED, ENTRY_MAX, Entry, FAILED, LOCK, QUEUE, SUFFIX, entry_name, entry_of};
use rustix::fs::{FlockOperation, flock};

/// Most entries that are kept of those given up; the oldest go first.
const FAILED_MAX: usize = 1000;

/// Why a spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A file of it.
    #[error("{operation} {}", .path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An entry that is none.
    #[error("{} is no entry of a spool", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// An entry that is too long.
    #[error("{} has more than {ENTRY_MAX} bytes", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The queue is full.
    #[error("{} has {entries} entries already", .path.display())]
    Full {
        /// The queue.
        path: PathBuf,
        /// How many there may be.
        entries: usize,
    },
    /// Another pusher is at work.
    #[error("another pusher has locked {}", .path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
}

fn io_at<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SpoolError + use<'a> {
    move |source| SpoolError::Io { operation, path: path.to_owned(), source }
}

/// A spool.
#[derive(Debug, Clone)]
pub struct Spool {
    dir: PathBuf,
}

impl Spool {
    /// Opens a spool; its directories are made where they are missing, for their owner alone.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open(dir: &Path) -> Result<Self, SpoolError> {
        let spool = Self { dir: dir.to_owned() };
        for part in [QUEUE, FAILED] {
            let path = spool.dir.join(part);
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(io_at("make", &path))?;
        }
        Ok(spool)
    }

    /// Adds an entry under a name that sorts behind those before it.
    ///
    /// # Errors
    /// When the queue has `entries_max` entries, or the disk does not take it. The queue is as it was.
    pub fn add(&self, name: &str, entry: &Entry, entries_max: usize) -> Result<(), SpoolError> {
        let queue = self.dir.join(QUEUE);
        if names(&queue)?.len() >= entries_max {
            return Err(SpoolError::Full { path: queue, entries: entries_max });
        }
        let (temporary, path) = (queue.join(format!(".{name}")), self.entry(name));
        let written = (|| {
            let text = serde_json::to_vec(entry)?;
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?.write_all(&text)?;
            fs::rename(&temporary, &path)
        })();
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            io_at("write", &path)(error)
        })
    }

    /// Counts a push that was dropped.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn count_dropped(&self) -> Result<(), SpoolError> {
        let path = self.dir.join(DROPPED);
        let counted = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).and_then(|mut file| {
            // One byte at the end is one write, whoever else writes.
            file.write_all(b".")
        });
        counted.map_err(io_at("write", &path))
    }

    /// Names of the entries that wait, oldest first.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>, SpoolError> {
        names(&self.dir.join(QUEUE))
    }

    /// An entry; none if it is gone.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub fn read(&self, name: &str) -> Result<Option<Entry>, SpoolError> {
        let path = self.entry(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io_at("open", &path))?,
        };
        let mut text = Vec::new();
        file.take(ENTRY_MAX + 1).read_to_end(&mut text).map_err(io_at("read", &path))?;
        if text.len() as u64 > ENTRY_MAX {
            return Err(SpoolError::TooLong { path });
        }
        serde_json::from_slice(&text).map(Some).map_err(|source| SpoolError::Malformed { path, source })
    }

    /// Removes an entry that is done with, and then what kept its paths from the garbage collector.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, name: &str, entry: &Entry) -> Result<(), SpoolError> {
        let path = self.entry(name);
        absent(fs::remove_file(&path)).map_err(io_at("remove", &path))?;
        remove_roots(&entry.roots)
    }

    /// Puts an entry aside for good. Its paths are the garbage collector's again.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn give_up(&self, name: &str, entry: Option<&Entry>) -> Result<(), SpoolError> {
        let failed = self.dir.join(FAILED);
        let path = self.entry(name);
        absent(fs::rename(&path, failed.join(format!("{name}{SUFFIX}")))).map_err(io_at("move", &path))?;
        if let Some(entry) = entry {
            remove_roots(&entry.roots)?;
        }
        let kept = names(&failed)?;
        for name in kept.iter().take(kept.len().saturating_sub(FAILED_MAX)) {
            let path = failed.join(format!("{name}{SUFFIX}"));
            absent(fs::remove_file(&path)).map_err(io_at("remove", &path))?;
        }
        Ok(())
    }

    /// Makes this process the spool's only pusher, as long as the lock is held.
    ///
    /// # Errors
    /// [`SpoolError::Locked`] when there is one.
    pub fn lock(&self) -> Result<File, SpoolError> {
        let path = self.dir.join(LOCK);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(io_at("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(SpoolError::Locked { path }),
            Err(error) => Err(io_at("lock", &path)(error.into())),
        }
    }

    fn entry(&self, name: &str) -> PathBuf {
        self.dir.join(QUEUE).join(format!("{name}{SUFFIX}"))
    }
}

/// A name for an entry of this process now.
#[must_use]
pub fn fresh_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    entry_name(now.as_nanos(), std::process::id())
}

/// Names of entries in a directory, oldest first.
fn names(dir: &Path) -> Result<Vec<String>, SpoolError> {
    let mut names = Vec::new();
    for file in fs::read_dir(dir).map_err(io_at("list", dir))? {
        let name = file.map_err(io_at("list", dir))?.file_name();
        names.extend(name.to_str().and_then(entry_of).map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

fn remove_roots(roots: &[PathBuf]) -> Result<(), SpoolError> {
    roots.iter().try_for_each(|root| match fs::symlink_metadata(root) {
        // An entry names its own links; a file that it names by mistake stays.
        Ok(metadata) if metadata.is_symlink() => absent(fs::remove_file(root)).map_err(io_at("remove", root)),
        _ => Ok(()),
    })
}

fn absent(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn entry(roots: &[PathBuf]) -> Entry {
        let paths = vec!["/nix/store/x".to_owned()];
        Entry { paths, drv: None, store: None, real: None, roots: roots.to_vec(), queued_at: 1 }
    }

    #[test]
    fn entries_come_and_go_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(&dir.path().join("a/b")).unwrap();
        for name in ["2", "1", "3"] {
            spool.add(name, &entry(&[]), 3).unwrap();
        }
        assert!(matches!(spool.add("4", &entry(&[]), 3), Err(SpoolError::Full { entries: 3, .. })));
        assert_eq!(spool.names().unwrap(), ["1", "2", "3"]);
        assert_eq!(spool.read("1").unwrap(), Some(entry(&[])));
        spool.remove("1", &entry(&[])).unwrap();
        spool.remove("1", &entry(&[])).unwrap();
        assert_eq!(spool.read("1").unwrap(), None);
        spool.give_up("2", Some(&entry(&[]))).unwrap();
        assert_eq!(spool.names().unwrap(), ["3"]);
        assert!(dir.path().join("a/b/failed/2.json").exists());
    }

    #[test]
    fn what_is_no_entry_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        for (name, text) in [("torn", &b"{\"paths\""[..]), ("long", &vec![b' '; 2 << 20][..]), ("empty", b"")] {
            fs::write(spool.entry(name), text).unwrap();
            let error = spool.read(name).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            spool.give_up(name, None).unwrap();
        }
        assert!(spool.names().unwrap().is_empty());
        // A file that is being written, and one that is not ours.
        fs::write(dir.path().join("queue/.hidden.json"), "").unwrap();
        fs::write(dir.path().join("queue/readme"), "").unwrap();
        assert!(spool.names().unwrap().is_empty());
    }

    #[test]
    fn links_go_with_their_entry_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(&dir.path().join("spool")).unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        symlink("/nix/store/x", &link).unwrap();
        fs::write(&file, "").unwrap();
        let entry = entry(&[link.clone(), file.clone(), dir.path().join("gone")]);
        spool.add("1", &entry, 1).unwrap();
        spool.remove("1", &entry).unwrap();
        assert!(fs::symlink_metadata(&link).is_err() && file.exists());
    }

    #[test]
    fn one_pusher_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        let held = spool.lock().unwrap();
        assert!(matches!(spool.lock(), Err(SpoolError::Locked { .. })));
        drop(held);
        spool.lock().unwrap();
    }

    #[test]
    fn dropped_pushes_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        for _ in 0..3 {
            spool.count_dropped().unwrap();
        }
        assert_eq!(fs::metadata(dir.path().join(DROPPED)).unwrap().len(), 3);
    }

    #[test]
    fn the_failed_do_not_pile_up() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        for number in 0..FAILED_MAX + 2 {
            let name = format!("{number:06}");
            spool.add(&name, &entry(&[]), 1).unwrap();
            spool.give_up(&name, None).unwrap();
        }
        let failed = names(&dir.path().join(FAILED)).unwrap();
        assert_eq!((failed.len(), failed[0].as_str()), (FAILED_MAX, "000002"));
    }
}
