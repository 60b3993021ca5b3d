//! Trees on this host's disk, mapped into memory: `<dir>/trees/<2>/<ManifestId>`.
//!
//! A tree is derived from its manifest and can be made again at any time, so a file here is verified once, when it is
//! opened, and never synced or missed: one that is damaged, of another version or cut short is removed and counts as not
//! there. It is written aside and renamed, never changed after, and unlinked while it is mapped when it is evicted. All
//! files together are bounded in bytes; what was not used goes first.
//!
//! Being mapped, trees lie in the page cache once, however many views show them; the kernel takes their memory back
//! when it needs it, and reads it again from the disk. A disk that fails such a read kills the process (SIGBUS); the
//! next one finds the file damaged, and goes on without it.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use narlake_format::id::ManifestId;
use quick_cache::Lifecycle;

use super::tree::Tree;
use crate::lru::{Lru, lru_with};
use crate::metadata::{Evicted, Length, write_aside};
use crate::metrics::Metrics;

/// Bytes of a usual tree on disk.
const USUAL: u64 = 16 * 1024;

/// The trees in one directory. Methods block on the disk.
pub struct Trees {
    dir: PathBuf,
    tmp: PathBuf,
    files: Lru<ManifestId, Length, Unlink>,
    temporary: AtomicU64,
    metrics: Metrics,
}

#[derive(Clone)]
struct Unlink {
    dir: PathBuf,
}

impl Lifecycle<ManifestId, Length> for Unlink {
    type RequestState = Evicted;

    fn on_evict(&self, evicted: &mut Evicted, id: ManifestId, _: Length) {
        evicted.0.push(path_of(&self.dir, &id));
    }
}

impl fmt::Debug for Trees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trees").field("dir", &self.dir).field("files", &self.files.len()).finish_non_exhaustive()
    }
}

impl Trees {
    /// Opens what there is in the cache directory `dir`, which its cache has been opened in, to hold at most about
    /// `bytes_max` bytes.
    ///
    /// # Errors
    /// When the directory cannot be read or made.
    pub fn open(dir: &Path, bytes_max: u64, metrics: &Metrics) -> io::Result<Self> {
        let (tmp, dir) = (dir.join("tmp"), dir.join("trees"));
        fs::create_dir_all(&dir)?;
        let items = usize::try_from(bytes_max / USUAL).unwrap_or(usize::MAX).clamp(1, 1 << 16);
        let files = lru_with(items, bytes_max, Unlink { dir: dir.clone() });
        for shard in fs::read_dir(&dir)? {
            let shard = shard?.path();
            if !shard.is_dir() {
                fs::remove_file(&shard)?;
                continue;
            }
            for file in fs::read_dir(&shard)? {
                let file = file?;
                match file.file_name().to_str().and_then(|name| name.parse().ok()) {
                    Some(id) if path_of(&dir, &id) == file.path() => files.insert(id, Length(file.metadata()?.len())),
                    _ => fs::remove_file(file.path())?,
                }
            }
        }
        let trees = Self { dir, tmp, files, temporary: AtomicU64::new(0), metrics: metrics.clone() };
        trees.show_bytes();
        Ok(trees)
    }

    /// About how many bytes they take on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.weight()
    }

    /// The tree of a manifest, if it is here and whole.
    #[must_use]
    pub fn load(&self, id: &ManifestId) -> Option<Tree> {
        self.files.get(id)?;
        let path = path_of(&self.dir, id);
        match File::open(&path).and_then(|file| Tree::mapped(&file, id)) {
            Ok(Some(tree)) => return Some(tree),
            Ok(None) => {
                tracing::warn!(file = %path.display(), "tree does not verify, made again");
                self.metrics.cache_damaged.inc();
            }
            // Evicted since the look, or somebody removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(file = %path.display(), %error, "read a tree"),
        }
        self.files.remove(id);
        let _ = fs::remove_file(&path);
        self.show_bytes();
        None
    }

    /// Keeps the tree of a manifest. It is in memory if the disk does not take it.
    ///
    /// # Errors
    /// When there is no memory either.
    pub fn keep(&self, id: &ManifestId, bytes: &[u8]) -> io::Result<Tree> {
        let temporary = self.tmp.join(format!("tree-{}", self.temporary.fetch_add(1, Ordering::Relaxed)));
        let path = path_of(&self.dir, id);
        if let Err(error) = write_aside(&temporary, &path, bytes) {
            let _ = fs::remove_file(&temporary);
            self.metrics.cache_not_kept.inc();
            // A full disk fails every time: say it now and then, count it always.
            if self.metrics.cache_not_kept.get().is_power_of_two() {
                tracing::warn!(file = %path.display(), %error, "tree used, not kept");
            }
            return Tree::in_memory(bytes);
        }
        // Mapped before it can be evicted.
        let mapped = File::open(&path).and_then(|file| Tree::mapped(&file, id));
        self.files.remove(id);
        self.files.insert(*id, Length(bytes.len() as u64));
        self.show_bytes();
        match mapped {
            Ok(Some(tree)) => Ok(tree),
            // Written and not read back: whatever the disk does, the tree is here.
            Ok(None) | Err(_) => Tree::in_memory(bytes),
        }
    }

    fn show_bytes(&self) {
        self.metrics.tree_bytes.set(i64::try_from(self.bytes()).unwrap_or(i64::MAX));
    }
}

fn path_of(dir: &Path, id: &ManifestId) -> PathBuf {
    let name = id.to_string();
    let mut path = dir.join(name.get(..2).unwrap_or_default());
    path.push(name);
    path
}
