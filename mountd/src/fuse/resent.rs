//! Requests that the kernel sends again because a daemon died with them.
//!
//! One of them may be what killed it. So a request that is sent again is noted before it is worked on, in a file that
//! outlives the daemon: one that is noted already has had its second chance, and is answered `EIO` (docs/semantics.md).
//! The kernel never uses the number of a request again, so that a note may stay for as long as there is room.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

/// `FUSE_UNIQUE_RESEND`: set in the number of a request that is sent again.
const RESENT: u64 = 1 << 63;

/// Most requests noted, 8 bytes each: those of many deaths under thousands of readers. The oldest go first.
const NOTED_MAX: usize = 1 << 17;

/// The notes. Cloning shares them.
#[derive(Clone, Default)]
pub struct Resent {
    /// Absent where nobody would keep them.
    notes: Option<Arc<Notes>>,
}

struct Notes {
    file: File,
    /// What daemons before this one have tried again, on this connection.
    before: HashSet<u64>,
    /// How many are in the file. Held for a write of a few bytes.
    noted: Mutex<usize>,
}

/// What is to be done with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// It has just been made.
    First,
    /// A daemon died with it.
    Second,
    /// Another died with it then.
    Poison,
}

impl Resent {
    /// Notes in this file, with those that are in it already.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn open(file: File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX) / 8 * 8;
        let kept = length.min(NOTED_MAX / 2 * 8);
        let mut bytes = vec![0; kept];
        file.read_exact_at(&mut bytes, (length - kept) as u64)?;
        if kept < length {
            file.write_all_at(&bytes, 0)?;
            file.set_len(kept as u64)?;
        }
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let before = bytes.chunks_exact(8).map(number).collect();
        Ok(Self { notes: Some(Arc::new(Notes { file, before, noted: Mutex::new(kept / 8) })) })
    }

    /// Takes note of a request that arrives with this number.
    pub(super) fn turn(&self, unique: u64) -> Turn {
        if unique & RESENT == 0 {
            return Turn::First;
        }
        let Some(notes) = &self.notes else { return Turn::Second };
        if notes.before.contains(&unique) {
            return Turn::Poison;
        }
        let mut noted = notes.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if *noted < NOTED_MAX {
            // Without the note it is tried once more than it should be.
            match notes.file.write_all_at(&unique.to_le_bytes(), *noted as u64 * 8) {
                Ok(()) => *noted += 1,
                Err(error) => tracing::warn!(%error, "note a request that was sent again"),
            }
        }
        Turn::Second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_second_chance_and_no_third() {
        let file = tempfile::tempfile().unwrap();
        let again = || Resent::open(file.try_clone().unwrap()).unwrap();
        let first = again();
        assert_eq!(first.turn(7), Turn::First);
        assert_eq!((first.turn(7 | RESENT), first.turn(9 | RESENT)), (Turn::Second, Turn::Second));
        // It dies. The one after it may not try them once more, and may try another.
        let second = again();
        assert_eq!((second.turn(9 | RESENT), second.turn(7 | RESENT)), (Turn::Poison, Turn::Poison));
        assert_eq!((second.turn(11 | RESENT), second.turn(11)), (Turn::Second, Turn::First));
        assert_eq!(again().turn(11 | RESENT), Turn::Poison);
    }

    #[test]
    fn old_notes_make_room() {
        let file = tempfile::tempfile().unwrap();
        let many = 1..=NOTED_MAX as u64;
        let resent = Resent::open(file.try_clone().unwrap()).unwrap();
        many.for_each(|number| assert_eq!(resent.turn(number | RESENT), Turn::Second));
        let next = Resent::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(next.turn(NOTED_MAX as u64 | RESENT), Turn::Poison);
        assert_eq!(next.turn(1 | RESENT), Turn::Second);
        assert_eq!(file.metadata().unwrap().len(), (NOTED_MAX / 2 + 1) as u64 * 8);
    }

    #[test]
    fn without_a_keeper_everything_is_tried() {
        let resent = Resent::default();
        assert_eq!((resent.turn(3 | RESENT), resent.turn(3 | RESENT)), (Turn::Second, Turn::Second));
    }
}
