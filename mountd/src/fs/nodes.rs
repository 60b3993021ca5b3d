//! Nodeids, and the table on disk that keeps them the same for ever.
//!
//! A nodeid, which is the inode number too, belongs to one entry of one store object: `object number << 24 | entry`.
//! Entries are numbered by their manifest. Objects are numbered by this table, in the order in which they were first
//! shown, one row each:
//!
//! ```text
//! header  "NLNODES1", then 24 zero bytes
//! row     8  object number, counting from 1, little endian
//!        20  hash part of the store path
//!         1  length of its name
//!       211  the name, padded with zeros
//!        32  ManifestId
//!        32  TableId
//!        32  BLAKE3 of the row so far
//! ```
//!
//! Invariant: a row is on disk before the kernel hears its number, and is never changed. So a daemon that is started
//! again answers for every nodeid that the kernel remembers. Content never decides a nodeid: two files of equal bytes
//! under one nodeid would be one file to an overlay above (docs/semantics.md).
//!
//! A row that fails its checksum is refused, with its place: renumbering under live mounts would show one file under
//! the name of another. Only what no mount can know is dropped: a row that was cut short, and a bad row with all after
//! it when the host has been booted since.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use narlake_format::id::{ID_LEN, ManifestId, TableId};
use narlake_format::limits::{ENTRIES_MAX, STORE_NAME_MAX};
use narlake_format::nix::store_path::{STORE_HASH_LEN, StorePath, StorePathHash};

use crate::fs::tree::EntryNumber;
use crate::trust::TrustedRecord;

/// Bits of a nodeid that number the entry.
const ENTRY_BITS: u32 = 24;
const ENTRY_MASK: u64 = (1 << ENTRY_BITS) - 1;
const _: () = assert!(ENTRIES_MAX <= ENTRY_MASK, "entries of the largest object have numbers");

/// Most objects that one table can number: what is left of a positive 63-bit inode number.
const OBJECTS_MAX: u64 = 1 << (63 - ENTRY_BITS);

const MAGIC: &[u8; 8] = b"NLNODES1";
const HEADER_LEN: usize = 32;
const NAME_AT: usize = 8 + STORE_HASH_LEN + 1;
const MANIFEST_AT: usize = NAME_AT + STORE_NAME_MAX;
const TABLE_AT: usize = MANIFEST_AT + ID_LEN;
const CHECK_AT: usize = TABLE_AT + ID_LEN;
const ROW_LEN: usize = CHECK_AT + 32;

/// A nodeid.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root of the mount. Object numbers start at 1, so it is nobody else's.
    pub const ROOT: Self = Self(1);

    /// The nodeid of an entry.
    #[must_use]
    pub const fn new(object: ObjectNumber, entry: EntryNumber) -> Self {
        Self(object.0 << ENTRY_BITS | entry as u64)
    }

    /// The object and entry of a nodeid; `None` for the root, and for what is no nodeid.
    #[must_use]
    pub fn split(self) -> Option<(ObjectNumber, EntryNumber)> {
        let object = self.0 >> ENTRY_BITS;
        let entry = u32::try_from(self.0 & ENTRY_MASK).ok()?;
        (object > 0 && object < OBJECTS_MAX).then_some((ObjectNumber(object), entry))
    }
}

/// The number of a store object in the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectNumber(u64);

/// What a row numbers: a store path with one content. A path that is published anew with other content is another
/// object, with nodeids of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObjectKey {
    /// The store path.
    pub path: StorePath,
    /// Its tree.
    pub manifest: ManifestId,
    /// The strings that were scrubbed out of it.
    pub table: TableId,
}

impl ObjectKey {
    /// The object that a record describes.
    #[must_use]
    pub fn of(record: &TrustedRecord) -> Self {
        Self { path: record.info().store_path.clone(), manifest: record.manifest(), table: record.table() }
    }
}

/// Why the table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeTableError {
    /// The file system does not do what it should.
    #[error("{operation} {path}", path = path.display())]
    Io {
        /// The operation, as a verb.
        operation: &'static str,
        /// The table.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not a node table of this version.
    #[error("{path} is not a node table that this build reads; move it away if no mount of it is left", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A row is damaged.
    #[error(
        "{path} is damaged at offset {offset}: refusing to renumber files that mounts may still show; unmount every \
         overlay over this mount, remove the file, and start again",
        path = path.display()
    )]
    Damaged {
        /// The table.
        path: PathBuf,
        /// Where the row starts, in bytes.
        offset: u64,
    },
    /// No numbers are left.
    #[error("{path} is full", path = path.display())]
    Full {
        /// The table.
        path: PathBuf,
    },
}

/// The table. Its methods block on the disk; callers on a runtime thread hand them to a blocking one.
pub struct NodeTable {
    path: PathBuf,
    file: File,
    // Held across write and sync, so that rows lie in the order of their numbers. Only ever on a blocking thread.
    append: Mutex<()>,
    // Rows that are on disk. Held for a look, or to add what has been synced; never across I/O.
    rows: RwLock<Rows>,
}

#[derive(Default)]
struct Rows {
    keys: Vec<ObjectKey>,
    /// The newest object of each hash part.
    newest: HashMap<StorePathHash, ObjectNumber>,
}

impl NodeTable {
    /// Opens the table in this file, making it if there is none. `booted_since` says that the host has been booted
    /// since the table was last open.
    ///
    /// # Errors
    /// When the file cannot be read or written, is no node table, or is damaged.
    pub fn open(path: &Path, booted_since: bool) -> Result<Self, NodeTableError> {
        let io = |operation| move |source| NodeTableError::Io { operation, path: path.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(io("open"))?;
        let length = file.metadata().map_err(io("stat"))?.len();
        let mut header = [0; HEADER_LEN];
        header[..MAGIC.len()].copy_from_slice(MAGIC);
        if length < HEADER_LEN as u64 {
            // Not even a header: nobody was ever told a number.
            file.set_len(0).and_then(|()| file.write_all_at(&header, 0)).map_err(io("write"))?;
            file.sync_all().map_err(io("sync"))?;
            return Ok(Self { path: path.to_owned(), file, append: Mutex::default(), rows: RwLock::default() });
        }
        let mut found = [0; HEADER_LEN];
        file.read_exact_at(&mut found, 0).map_err(io("read"))?;
        if found != header {
            return Err(NodeTableError::Foreign { path: path.to_owned() });
        }
        let whole = (length - HEADER_LEN as u64) / ROW_LEN as u64;
        let mut rows = Rows::default();
        let mut row = [0; ROW_LEN];
        let mut keep = whole;
        for number in 1..=whole {
            let offset = row_offset(number);
            file.read_exact_at(&mut row, offset).map_err(io("read"))?;
            match decode_row(&row, number) {
                Some(key) => drop(rows.push(key)),
                // A power cut may leave several bad rows of one write. It and all after it go: no mount of an earlier
                // boot is left, so no number that is in use can be given to something else.
                None if booted_since => {
                    keep = number - 1;
                    break;
                }
                None => return Err(NodeTableError::Damaged { path: path.to_owned(), offset }),
            }
        }
        let end = row_offset(keep + 1);
        if end != length {
            tracing::warn!(file = %path.display(), offset = end, "dropped a row that was cut short");
            file.set_len(end).and_then(|()| file.sync_all()).map_err(io("truncate"))?;
        }
        Ok(Self { path: path.to_owned(), file, append: Mutex::default(), rows: RwLock::new(rows) })
    }

    /// The number of an object, if it has one.
    #[must_use]
    pub fn number(&self, key: &ObjectKey) -> Option<ObjectNumber> {
        self.rows().number(key)
    }

    /// The object of a number.
    #[must_use]
    pub fn object(&self, number: ObjectNumber) -> Option<ObjectKey> {
        self.rows().key(number).cloned()
    }

    /// Whether an object of this path has ever been shown.
    #[must_use]
    pub fn has_path(&self, path: &StorePath) -> bool {
        self.rows().newest_of(&path.hash).is_some_and(|key| key.path == *path)
    }

    /// Number of objects.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows().keys.len()
    }

    /// No object has a number yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers of these objects, new ones where they have none. New rows are on disk when this returns; many share
    /// one sync.
    ///
    /// # Errors
    /// When the rows cannot be written. None of the numbers may be given out then.
    pub fn register(&self, keys: &[ObjectKey]) -> Result<Vec<ObjectNumber>, NodeTableError> {
        let _turn = self.append.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.len();
        let mut numbers = Vec::with_capacity(keys.len());
        let mut bytes = Vec::new();
        let mut fresh: Vec<ObjectKey> = Vec::new();
        // The newest of each hash part among those.
        let mut newest: HashMap<StorePathHash, usize> = HashMap::new();
        for key in keys {
            let known = match newest.get(&key.path.hash) {
                Some(&at) => fresh.get(at).filter(|row| *row == key).map(|_| number_at(before + at)),
                None => self.number(key),
            };
            let number = known.unwrap_or_else(|| {
                let number = number_at(before + fresh.len());
                newest.insert(key.path.hash, fresh.len());
                bytes.extend_from_slice(&encode_row(key, number));
                fresh.push(key.clone());
                number
            });
            numbers.push(number);
        }
        if bytes.is_empty() {
            return Ok(numbers);
        }
        let written = if (before + fresh.len()) as u64 >= OBJECTS_MAX {
            Err(NodeTableError::Full { path: self.path.clone() })
        } else {
            let start = row_offset(before as u64 + 1);
            let synced = self.file.write_all_at(&bytes, start).and_then(|()| self.file.sync_data());
            synced.map_err(|source| NodeTableError::Io { operation: "append to", path: self.path.clone(), source })
        };
        if let Err(error) = written {
            // Nobody has seen the numbers. What reached the disk is overwritten by the next rows, or cut off here.
            let _ = self.file.set_len(row_offset(before as u64 + 1));
            return Err(error);
        }
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        for key in fresh {
            rows.push(key);
        }
        Ok(numbers)
    }

    fn rows(&self) -> RwLockReadGuard<'_, Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    fn number(&self, key: &ObjectKey) -> Option<ObjectNumber> {
        let number = *self.newest.get(&key.path.hash)?;
        self.key(number).filter(|row| *row == key).map(|_| number)
    }

    fn newest_of(&self, hash: &StorePathHash) -> Option<&ObjectKey> {
        self.key(*self.newest.get(hash)?)
    }

    fn key(&self, number: ObjectNumber) -> Option<&ObjectKey> {
        self.keys.get(usize::try_from(number.0).ok()?.checked_sub(1)?)
    }

    fn push(&mut self, key: ObjectKey) -> ObjectNumber {
        let number = number_at(self.keys.len());
        self.newest.insert(key.path.hash, number);
        self.keys.push(key);
        number
    }
}

/// The number of the object in this place of the table.
const fn number_at(place: usize) -> ObjectNumber {
    ObjectNumber(place as u64 + 1)
}

const fn row_offset(number: u64) -> u64 {
    HEADER_LEN as u64 + (number - 1) * ROW_LEN as u64
}

fn encode_row(key: &ObjectKey, number: ObjectNumber) -> [u8; ROW_LEN] {
    let name = key.path.name.as_str().as_bytes();
    assert!(name.len() <= STORE_NAME_MAX, "store path names are bounded by their type");
    let mut row = [0; ROW_LEN];
    row[..8].copy_from_slice(&number.0.to_le_bytes());
    row[8..8 + STORE_HASH_LEN].copy_from_slice(key.path.hash.as_bytes());
    row[NAME_AT - 1] = u8::try_from(name.len()).unwrap_or(u8::MAX);
    row[NAME_AT..NAME_AT + name.len()].copy_from_slice(name);
    row[MANIFEST_AT..TABLE_AT].copy_from_slice(key.manifest.as_bytes());
    row[TABLE_AT..CHECK_AT].copy_from_slice(key.table.as_bytes());
    let check = blake3::hash(&row[..CHECK_AT]);
    row[CHECK_AT..].copy_from_slice(check.as_bytes());
    row
}

/// The object that row `number` describes, if the row is what `encode_row` wrote for it.
fn decode_row(row: &[u8; ROW_LEN], number: u64) -> Option<ObjectKey> {
    if blake3::hash(&row[..CHECK_AT]).as_bytes() != &row[CHECK_AT..] {
        return None;
    }
    let hash = StorePathHash::from_bytes(row[8..8 + STORE_HASH_LEN].try_into().ok()?);
    let name = row.get(NAME_AT..NAME_AT + usize::from(row[NAME_AT - 1]))?;
    let name = std::str::from_utf8(name).ok()?.parse().ok()?;
    let manifest = ManifestId::from_bytes(row[MANIFEST_AT..TABLE_AT].try_into().ok()?);
    let table = TableId::from_bytes(row[TABLE_AT..CHECK_AT].try_into().ok()?);
    let key = ObjectKey { path: StorePath { hash, name }, manifest, table };
    (encode_row(&key, ObjectNumber(number)) == *row).then_some(key)
}

#[cfg(test)]
mod tests;
