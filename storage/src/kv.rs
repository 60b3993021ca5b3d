//! Small mutable state on this host, in sled: which packs the index covers and the path records seen. All of it is
//! derived from the bucket and may be deleted at any time.
//!
//! sled 0.34 can panic or take long on a directory that was damaged, so it is opened on a thread of its own, under
//! `catch_unwind` and a time limit. A directory that does not open, belongs to another lake or has another schema is
//! moved aside, never deleted, and a new one takes its place; the caller rebuilds from the bucket.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use narlake_format::id::LakeId;

use crate::error::Error;

/// Raised when what the trees hold changes meaning.
const SCHEMA: u32 = 1;
/// Memory that sled may use for its page cache, in bytes. Its use grows with the number of keys as well.
const CACHE_BYTES: u64 = 32 << 20;
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// The state database.
#[derive(Clone)]
pub(crate) struct Kv {
    db: sled::Db,
    /// Pack (`domain/ulid`) -> bytes, blobs.
    pub(crate) packs: Tree,
    /// Cache ulid and store path hash -> path record.
    pub(crate) records: Tree,
}

/// One tree of the database.
#[derive(Clone)]
pub(crate) struct Tree(sled::Tree);

impl Kv {
    /// Opens the database below `directory`, or makes a new one. The flag says whether it is new.
    ///
    /// # Errors
    /// Where even a new one cannot be made.
    pub(crate) fn open(directory: &Path, lake: LakeId) -> Result<(Self, bool), Error> {
        std::fs::create_dir_all(directory).map_err(|e| Error::state("create state directory", directory, e))?;
        let at = directory.join("sled");
        let existed = at.exists();
        match guarded_open(&at).and_then(|db| Self::claim(db, lake)) {
            Ok((kv, fresh)) => Ok((kv, fresh)),
            Err(reason) if existed => {
                let aside = set_aside(directory, "sled")?;
                tracing::error!(path = %at.display(), aside = %aside.display(), reason,
                    "local state does not open; set aside, rebuilding from the bucket");
                let (kv, _) = guarded_open(&at).and_then(|db| Self::claim(db, lake)).map_err(|e| failed(&at, e))?;
                Ok((kv, true))
            }
            Err(reason) => Err(failed(&at, reason)),
        }
    }

    /// Checks that the database is this lake's, or makes it so if it is empty.
    fn claim(db: sled::Db, lake: LakeId) -> Result<(Self, bool), String> {
        let owner = format!("narlake state {SCHEMA} of lake {lake}");
        let fresh = match db.get("owner").map_err(|e| e.to_string())? {
            Some(found) if found == owner.as_bytes() => false,
            Some(found) => return Err(format!("it says {:?}, not {owner:?}", String::from_utf8_lossy(&found))),
            None if db.was_recovered() && !db.is_empty() => return Err("it is another program's".to_owned()),
            None => {
                db.insert("owner", owner.as_bytes()).map_err(|e| e.to_string())?;
                true
            }
        };
        let tree = |name: &str| db.open_tree(name).map(Tree).map_err(|e| e.to_string());
        let (packs, records) = (tree("packs")?, tree("records")?);
        Ok((Self { db, packs, records }, fresh))
    }

    /// Writes everything to disk. Losing it costs a rebuild, so nobody waits for this but a shutdown.
    ///
    /// # Errors
    /// Where the disk refuses.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        self.db.flush().map(|_| ()).map_err(state_error)
    }
}

impl Tree {
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.0.get(key).map(|value| value.map(|value| value.to_vec())).map_err(state_error)
    }

    pub(crate) fn put(&self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.0.insert(key, value).map(|_| ()).map_err(state_error)
    }

    pub(crate) fn remove(&self, key: &[u8]) -> Result<(), Error> {
        self.0.remove(key).map(|_| ()).map_err(state_error)
    }

    /// All keys and values, in the keys' order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), Error>> {
        self.0.iter().map(|pair| pair.map(|(key, value)| (key.to_vec(), value.to_vec())).map_err(state_error))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Moves an entry of the state directory out of the way and says where to.
pub(crate) fn set_aside(directory: &Path, name: &str) -> Result<PathBuf, Error> {
    let from = directory.join(name);
    let aside = (0..1000u32)
        .map(|n| directory.join(format!("{name}.aside-{n}")))
        .find(|path| !path.exists())
        .unwrap_or_else(|| directory.join(format!("{name}.aside")));
    std::fs::rename(&from, &aside).map_err(|e| Error::state("set aside", &from, e))?;
    Ok(aside)
}

fn guarded_open(path: &Path) -> Result<sled::Db, String> {
    let (done, wait) = std::sync::mpsc::sync_channel(1);
    let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(Some(1000));
    std::thread::Builder::new()
        .name("sled-open".to_owned())
        .spawn(move || {
            let opened = catch_unwind(AssertUnwindSafe(|| config.open()));
            let _ = done.send(match opened {
                Ok(Ok(db)) => Ok(db),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("sled panicked on it".to_owned()),
            });
        })
        .map_err(|e| e.to_string())?;
    wait.recv_timeout(OPEN_TIMEOUT).map_err(|_| format!("it did not open within {} s", OPEN_TIMEOUT.as_secs()))?
}

fn failed(path: &Path, reason: String) -> Error {
    Error::state("open state database", path, std::io::Error::other(reason))
}

fn state_error(error: sled::Error) -> Error {
    let source = match error {
        sled::Error::Io(io) => io,
        other => std::io::Error::other(other.to_string()),
    };
    Error::State { operation: "use state database", path: "sled".to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use narlake_format::id::Ulid;

    fn lake(n: u128) -> LakeId {
        LakeId(Ulid::from(n))
    }

    #[test]
    fn reopens_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (kv, fresh) = Kv::open(dir.path(), lake(1)).unwrap();
        assert!(fresh);
        kv.packs.put(b"k", b"v").unwrap();
        kv.flush().unwrap();
        drop(kv);
        let (kv, fresh) = Kv::open(dir.path(), lake(1)).unwrap();
        assert!(!fresh);
        assert_eq!(kv.packs.get(b"k").unwrap().as_deref(), Some(&b"v"[..]));
    }

    /// A directory restored from another lake's backup must not give dedup hits in this one.
    #[test]
    fn sets_a_foreign_lake_aside() {
        let dir = tempfile::tempdir().unwrap();
        drop(Kv::open(dir.path(), lake(1)).unwrap());
        let (kv, fresh) = Kv::open(dir.path(), lake(2)).unwrap();
        assert!(fresh && kv.packs.len() == 0);
        assert!(dir.path().join("sled.aside-0").exists());
    }

    #[test]
    fn sets_garbage_aside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sled")).unwrap();
        for (name, bytes) in [("conf", &b"not a sled configuration"[..]), ("db", &[0x5a; 70_000][..])] {
            std::fs::write(dir.path().join("sled").join(name), bytes).unwrap();
        }
        let (kv, fresh) = Kv::open(dir.path(), lake(1)).unwrap();
        assert!(fresh && kv.records.len() == 0);
    }
}
