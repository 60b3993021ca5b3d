//! Images of closures on this host's disk: made once, used again.
//!
//! ```text
//! <dir>/<id>.erofs   the image
//! <dir>/<id>.index   "NLSEAL01"; number of records 8; BLAKE3 of the image 32; BLAKE3 of the 48 bytes before and of the
//!                    records 32; the records, sorted: ContentId 32, nodeid of an entry with this content 8
//! ```
//!
//! Numbers are little endian. Both files are derived, written aside and renamed, the index last; an image whose index is
//! missing, or that is not what the index says, is made again.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use narlake_format::id::ContentId;
use narlake_storage::map::MappedFile;

use super::erofs::{ImageError, ImageWriter};
use crate::fs::Object;
use crate::fs::contents::Contents;
use crate::fs::nodes::{NodeId, ObjectKey, ObjectNumber};

const MAGIC: &[u8; 8] = b"NLSEAL01";
const IMAGE_AT: usize = 16;
const CHECK_AT: usize = 48;
const HEADER_LEN: usize = 80;
const RECORD_LEN: usize = 40;

/// Most images kept that are not mounted. The one used longest ago goes first.
const KEPT_MAX: usize = 256;

/// What tells a closure from others: its objects, and how images are written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct ImageId([u8; 32]);

impl ImageId {
    /// The id of these objects, sorted by path.
    pub(super) fn of(store_dir: &str, keys: &[ObjectKey]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(MAGIC).update(store_dir.as_bytes());
        for key in keys {
            hasher.update(b"\0").update(key.path.to_string().as_bytes()).update(b"\0");
            hasher.update(key.manifest.as_bytes()).update(key.table.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The id that was written like this.
    pub(super) fn parse(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

impl std::fmt::Display for ImageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

/// An image that can be mounted.
pub(super) struct Image {
    pub(super) path: PathBuf,
    index: MappedFile,
}

/// The images in one directory. Methods block on the disk.
pub(super) struct Images {
    dir: PathBuf,
    // Held for a look or a change.
    open: Mutex<BTreeMap<ImageId, Arc<Image>>>,
}

impl Contents for Images {
    fn find(&self, content: &ContentId) -> Option<NodeId> {
        let open: Vec<Arc<Image>> = self.open().values().cloned().collect();
        open.iter().find_map(|image| image.find(content))
    }
}

impl Images {
    /// The images in this directory, which is made if need be.
    pub(super) fn open_dir(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, open: Mutex::default() })
    }

    /// The image of this id, if it is there and whole.
    pub(super) fn load(&self, id: ImageId) -> io::Result<Option<Arc<Image>>> {
        if let Some(image) = self.open().get(&id) {
            return Ok(Some(Arc::clone(image)));
        }
        let image = match Image::open(&self.dir, id) {
            Ok(Some(image)) => Arc::new(image),
            Ok(None) => {
                tracing::warn!(image = %id, "image is damaged, made again");
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // When it was used last, for whoever makes room.
        let _ = File::options().write(true).open(&image.path).and_then(|file| file.set_modified(SystemTime::now()));
        self.open().insert(id, Arc::clone(&image));
        Ok(Some(image))
    }

    /// Makes the image of these objects, which come in order of their paths.
    pub(super) fn make(
        &self,
        id: ImageId,
        objects: impl Iterator<Item = (ObjectKey, ObjectNumber, Arc<Object>)>,
    ) -> Result<Arc<Image>, ImageError> {
        let aside = self.dir.join(format!("{id}.new"));
        let mut records: Vec<(ContentId, NodeId)> = Vec::new();
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&aside)?;
        let mut writer = ImageWriter::new(BufWriter::with_capacity(1 << 20, file))?;
        for (key, number, object) in objects {
            let name = key.path.to_string();
            let parts = (&object.tree, &object.table);
            let mut on = |entry, content, _| records.push((content, NodeId::new(number, entry)));
            writer.object(name.as_bytes(), parts, &mut on)?;
        }
        let file = writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_data()?;
        let hash = hash_of(&aside)?;
        records.sort_unstable_by_key(|(content, _)| *content.as_bytes());
        records.dedup_by_key(|(content, _)| *content);
        let (image, index) = paths(&self.dir, id);
        fs::rename(&aside, &image)?;
        write_index(&aside, &index, &hash, &records)?;
        self.make_room(id)?;
        let made = self.load(id)?;
        made.ok_or_else(|| ImageError::Io(io::Error::new(io::ErrorKind::InvalidData, "the image was not kept")))
    }

    /// These stay open, the others need not.
    pub(super) fn retain(&self, mounted: &HashSet<String>) {
        self.open().retain(|id, _| mounted.contains(&id.to_string()));
    }

    /// Removes images used longest ago, but none that is open, nor this one.
    fn make_room(&self, but: ImageId) -> io::Result<()> {
        let mut found = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            let name = file.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".erofs")).and_then(ImageId::parse);
            if let Some(id) = id.filter(|id| *id != but && !self.open().contains_key(id)) {
                found.push((file.metadata()?.modified()?, id));
            }
        }
        found.sort_unstable();
        for (_, id) in found.iter().take(found.len().saturating_sub(KEPT_MAX)) {
            let (image, index) = paths(&self.dir, *id);
            fs::remove_file(index)?;
            fs::remove_file(image)?;
        }
        Ok(())
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<ImageId, Arc<Image>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    /// `None` if one of the files is not what was written.
    fn open(dir: &Path, id: ImageId) -> io::Result<Option<Self>> {
        let (path, index) = paths(dir, id);
        let index = MappedFile::open(&index)?;
        let bytes = index.as_ref();
        let (Some(head), Some(check), Some(records)) =
            (bytes.get(..CHECK_AT), bytes.get(CHECK_AT..HEADER_LEN), bytes.get(HEADER_LEN..))
        else {
            return Ok(None);
        };
        let count = (records.len() / RECORD_LEN) as u64;
        let whole = head.starts_with(MAGIC)
            && head.get(8..IMAGE_AT) == Some(&count.to_le_bytes())
            && records.len() % RECORD_LEN == 0
            && check_of(head, records).as_bytes() == check
            && head.get(IMAGE_AT..) == Some(hash_of(&path)?.as_bytes());
        Ok(whole.then_some(Self { path, index }))
    }

    fn find(&self, content: &ContentId) -> Option<NodeId> {
        let records = self.index.as_ref().get(HEADER_LEN..).unwrap_or_default();
        let (records, _) = records.as_chunks::<RECORD_LEN>();
        let at = records.binary_search_by(|record| record[..32].cmp(content.as_bytes())).ok()?;
        let node = records.get(at)?.last_chunk()?;
        Some(NodeId(u64::from_le_bytes(*node)))
    }
}

fn paths(dir: &Path, id: ImageId) -> (PathBuf, PathBuf) {
    (dir.join(format!("{id}.erofs")), dir.join(format!("{id}.index")))
}

fn hash_of(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

fn check_of(head: &[u8], records: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(head).update(records).finalize()
}

fn write_index(aside: &Path, index: &Path, image: &blake3::Hash, records: &[(ContentId, NodeId)]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(records.len() * RECORD_LEN);
    for (content, node) in records {
        bytes.extend_from_slice(content.as_bytes());
        bytes.extend_from_slice(&node.0.to_le_bytes());
    }
    let mut head = Vec::with_capacity(HEADER_LEN);
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&(records.len() as u64).to_le_bytes());
    head.extend_from_slice(image.as_bytes());
    let check = check_of(&head, &bytes);
    head.extend_from_slice(check.as_bytes());
    let mut file = File::create(aside)?;
    file.write_all(&head)?;
    file.write_all(&bytes)?;
    file.sync_data()?;
    fs::rename(aside, index)
}
