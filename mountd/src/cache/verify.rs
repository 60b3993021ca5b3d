//! Whether a complete file holds what was put into it.
//!
//! A file without patches is named by the hash of its bytes. The id of a file with patches cannot be computed from its
//! bytes alone (docs/consistency.md, rule 17), so the hash of its restored bytes is kept beside them, in the extended
//! attribute `user.narlake.sum`. On a file system without such attributes a file with patches cannot be verified here:
//! it is dropped after an unclean boot and passed over by the scrub; reads through FUSE verify its chunks as ever.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use narlake_format::id::{ContentId, FILE_ID_INLINE_MAX, FileId, LongFileHasher};
use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};

/// The attribute with the hash.
const SUM: &str = "user.narlake.sum";

/// Bytes read at once: a multiple of what hashes fast.
const PIECE: usize = 4 * LongFileHasher::PIECE;

/// What can be said of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Right,
    Wrong,
    /// It is not what its name says, which a file with patches never is, and there is no hash beside it.
    Unknown,
    /// It was not looked at to the end.
    Stopped,
}

/// Writes the hash of a file beside it, unless its name is the hash.
pub(super) fn remember(file: &File, id: &ContentId, sum: FileId) {
    if ContentId::from(sum) != *id {
        // Without it the file cannot be verified, and is as good as any until the next unclean boot.
        let _ = fsetxattr(file, SUM, sum.as_bytes(), XattrFlags::empty());
    }
}

/// Whether hashes can be kept in the file system of this file.
pub(super) fn remembers(file: &File) -> bool {
    fsetxattr(file, SUM, &[0; 32], XattrFlags::empty()).is_ok()
}

/// Hashes a file. `go_on` is told how many bytes are about to be read, may wait, and ends it by saying false.
pub(super) fn hash(file: &File, go_on: &mut dyn FnMut(usize) -> bool) -> io::Result<Option<FileId>> {
    let length = file.metadata()?.len();
    let mut piece = vec![0; PIECE.min(usize::try_from(length).unwrap_or(PIECE).max(1))];
    let mut hasher = LongFileHasher::new();
    let mut offset = 0;
    while offset < length {
        let step = piece.len().min(usize::try_from(length - offset).unwrap_or(PIECE));
        let Some(part) = piece.get_mut(..step).filter(|_| go_on(step)) else { return Ok(None) };
        file.read_exact_at(part, offset)?;
        if length <= FILE_ID_INLINE_MAX {
            return Ok(Some(FileId::of(part)));
        }
        hasher.update(part);
        offset += step as u64;
    }
    Ok(Some(if length == 0 { FileId::of(&[]) } else { hasher.finish() }))
}

/// Reads a file and says what is to be thought of it. One that cannot be read is wrong.
pub(super) fn verify(file: &File, id: &ContentId, go_on: &mut dyn FnMut(usize) -> bool) -> Verdict {
    let sum = match hash(file, go_on) {
        Ok(Some(sum)) => sum,
        Ok(None) => return Verdict::Stopped,
        Err(_) => return Verdict::Wrong,
    };
    if ContentId::from(sum) == *id {
        return Verdict::Right;
    }
    let mut kept = [0; 32];
    match fgetxattr(file, SUM, &mut kept) {
        Ok(32) if kept == *sum.as_bytes() => Verdict::Right,
        Ok(_) => Verdict::Wrong,
        Err(_) => Verdict::Unknown,
    }
}
