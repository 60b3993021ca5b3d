//! A file mapped into memory: the one place of this package that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

/// The bytes of an immutable file.
pub(super) struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps a file that this process wrote, renamed into place, and never changes.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: segments are written under another name, renamed once complete and never written or truncated after;
        // the state directory belongs to this process alone (a lock file sees to it).
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self(map))
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
