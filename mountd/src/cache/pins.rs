//! Files that stay: sets of content ids under the names of those who want them.
//!
//! `pins/<name>` is text: a line `narlake-pins 1`, then a content id and its size in bytes on each line, and at the end
//! the BLAKE3 hash of all that, in hexadecimal. A set that does not verify is refused at start, with a log line, and
//! pins nothing.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use narlake_format::id::ContentId;

use super::{Cache, CacheError};

const FIRST_LINE: &str = "narlake-pins 1";

/// Longest name of a set, in bytes: that of a file, and room for a suffix.
const NAME_MAX: usize = 240;

/// Sets, by name.
pub(super) type Pins = BTreeMap<String, Vec<(ContentId, u64)>>;

/// Why a set cannot be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It could never be kept with the others.
    #[error("pinned content would take {bytes} bytes of the {bytes_max} that the cache may hold pinned")]
    TooLarge {
        /// What all sets would take, in bytes.
        bytes: u64,
        /// What they may.
        bytes_max: u64,
    },
    /// The name cannot be that of a file.
    #[error("{name:?} is no name for pins: 1 to 240 of A-Z, a-z, 0-9 and +-._=?, not starting with a dot")]
    Name {
        /// The name.
        name: String,
    },
    /// It cannot be written.
    #[error(transparent)]
    Io(#[from] CacheError),
}

impl Cache {
    /// Pins these files, with their sizes in bytes, under a name; what was pinned under it before no longer is. They
    /// need not be here yet. Survives the process once it returns.
    ///
    /// # Errors
    /// When all pinned files together are more than eviction would leave, or the set cannot be written.
    pub fn pin(&self, name: &str, files: Vec<(ContentId, u64)>) -> Result<(), PinError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._=?".contains(&byte);
        if name.is_empty() || name.len() > NAME_MAX || name.starts_with('.') || !name.bytes().all(allowed) {
            return Err(PinError::Name { name: name.to_owned() });
        }
        let mut pins = self.pins();
        let before = pins.insert(name.to_owned(), files);
        let (bytes, bytes_max) = (bytes_of(&pins), self.settings.low_water());
        let text = encode(pins.get(name).map_or(&[], Vec::as_slice));
        let stored = if bytes > bytes_max {
            Err(PinError::TooLarge { bytes, bytes_max })
        } else {
            store(&self.dir, name, &text).map_err(|source| {
                PinError::Io(CacheError::Io { operation: "write", path: self.dir.join("pins").join(name), source })
            })
        };
        if stored.is_err() {
            match before {
                Some(files) => pins.insert(name.to_owned(), files),
                None => pins.remove(name),
            };
            return stored;
        }
        self.apply(&pins);
        Ok(())
    }

    /// Takes a set of pins away. False if there is none of this name.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn unpin(&self, name: &str) -> Result<bool, PinError> {
        let mut pins = self.pins();
        if !pins.contains_key(name) {
            return Ok(false);
        }
        let path = self.dir.join("pins").join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CacheError::Io { operation: "remove", path, source }.into());
            }
            _ => {}
        }
        pins.remove(name);
        self.apply(&pins);
        Ok(true)
    }

    /// Names of the sets, with the number of their files and their bytes.
    #[must_use]
    pub fn pinned(&self) -> Vec<(String, usize, u64)> {
        let sum = |files: &[(ContentId, u64)]| files.iter().map(|(_, size)| size.next_multiple_of(4096)).sum();
        self.pins().iter().map(|(name, files)| (name.clone(), files.len(), sum(files))).collect()
    }

    pub(super) fn apply(&self, pins: &Pins) {
        self.ledger().pinned = pins.values().flatten().map(|(id, _)| *id).collect();
        self.metrics.cache_pinned_bytes.set(i64::try_from(bytes_of(pins)).unwrap_or(i64::MAX));
    }
}

/// Reads all sets.
pub(super) fn load(dir: &Path) -> io::Result<Pins> {
    let mut pins = Pins::new();
    for file in fs::read_dir(dir.join("pins"))? {
        let file = file?;
        let name = file.file_name().into_string().unwrap_or_default();
        if name.starts_with('.') {
            continue;
        }
        match fs::read_to_string(file.path()).ok().and_then(|text| decode(&text)) {
            Some(files) => drop(pins.insert(name, files)),
            None => tracing::error!(file = %file.path().display(), "pins are damaged, and pin nothing"),
        }
    }
    Ok(pins)
}

/// What the files of all sets take, each once.
fn bytes_of(pins: &Pins) -> u64 {
    let sizes: HashMap<ContentId, u64> = pins.values().flatten().copied().collect();
    sizes.values().map(|size| size.next_multiple_of(4096)).fold(0, u64::saturating_add)
}

fn encode(files: &[(ContentId, u64)]) -> String {
    let mut text = format!("{FIRST_LINE}\n");
    for (id, size) in files {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{id} {size}");
    }
    let sum = blake3::hash(text.as_bytes()).to_hex();
    text.push_str(&sum);
    text.push('\n');
    text
}

fn decode(text: &str) -> Option<Vec<(ContentId, u64)>> {
    let (body, sum) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    let body = text.get(..=body.len())?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != sum {
        return None;
    }
    let lines = body.strip_prefix(FIRST_LINE)?.strip_prefix('\n')?.lines();
    lines.map(|line| line.split_once(' ').and_then(|(id, size)| Some((id.parse().ok()?, size.parse().ok()?)))).collect()
}

fn store(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    let pins = dir.join("pins");
    fs::create_dir_all(&pins)?;
    let temporary = pins.join(".new");
    fs::write(&temporary, text)?;
    File::open(&temporary)?.sync_all()?;
    fs::rename(&temporary, pins.join(name))?;
    File::open(&pins)?.sync_all()
}
