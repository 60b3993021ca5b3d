//! Files mapped into memory, and what is in them read in place: the one place of this package that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use narlake_format::id::ChunkId;

/// The bytes of an immutable file, or of memory that is like one.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the file of this name, as [`MappedFile::of`].
    ///
    /// # Errors
    /// When the file cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Maps a file that this process wrote, renamed into place, and never changes. It stays mapped when the file is
    /// closed or removed.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn of(file: &File) -> io::Result<Self> {
        // SAFETY: what is mapped is written under another name, renamed once complete and never written or truncated
        // after; the directory belongs to this process alone (a lock file sees to it).
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(map))
    }

    /// Memory with these bytes, aligned as a mapped file is, and given back to the system when it is dropped.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn in_memory(bytes: &[u8]) -> io::Result<Self> {
        // The system maps no empty stretch.
        let mut map = memmap2::MmapMut::map_anon(bytes.len().max(1))?;
        if let Some(to) = map.get_mut(..bytes.len()) {
            to.copy_from_slice(bytes);
        }
        Ok(Self(map.make_read_only()?))
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// What can be read in place: a type without padding of which every pattern of bits is a value.
pub trait Plain: sealed::Plain {}

impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for ChunkId {}

mod sealed {
    pub trait Plain: Copy {}
    impl Plain for u32 {}
    impl Plain for u64 {}
    impl Plain for super::ChunkId {}
}

// Columns are little endian on disk and read in place.
const _: () = assert!(cfg!(target_endian = "little"), "columns are read in place");

/// These bytes as the values that they hold, in place; `None` if they begin or end amid a value. Numbers are little
/// endian.
#[must_use]
pub fn column<T: Plain>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: every pattern of bits is a value of the types that `Plain` is sealed to; `ChunkId` is transparent.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    (before.is_empty() && after.is_empty()).then_some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_read_in_place() {
        let bytes: Vec<u8> = (0..64).collect();
        let map = MappedFile::in_memory(&bytes).unwrap();
        let numbers: &[u64] = column(map.as_ref()).unwrap();
        assert_eq!((numbers.len(), numbers[0]), (8, u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7])));
        let ids: &[ChunkId] = column(map.as_ref()).unwrap();
        assert_eq!(ids[1].as_bytes()[..], bytes[32..]);
        assert!(column::<u32>(&map.as_ref()[1..]).is_none());
        assert!(column::<ChunkId>(&map.as_ref()[..40]).is_none());
        assert!(column::<u64>(&[]).is_some_and(<[u64]>::is_empty));
        assert_eq!(MappedFile::in_memory(&[]).unwrap().as_ref().len(), 1);
    }
}
