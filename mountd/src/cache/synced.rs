//! Which files are known to be on disk: the journal of syncs, which is one number.
//!
//! Complete files are stamped with the number of the period in which they got their name: it is their modification
//! time, in seconds, set before they are renamed. A sync ends a period, syncs the file system, and then writes the
//! number of that period to `synced`, with a checksum. After an unclean boot a file is as it was put if its stamp is not
//! above that number. A clock has no part in it: a file that was not stamped, or written to since, has a time of this
//! century, which is far above any period.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};

const MAGIC: &[u8; 8] = b"NLSYNC01";
const LEN: usize = 48;

/// The last period that is on disk, 0 if none is known to be. A journal that is damaged says nothing.
pub(super) fn read(dir: &Path) -> u64 {
    let Ok(bytes) = fs::read(dir.join("synced")) else { return 0 };
    let parts = (bytes.get(..8), bytes.get(8..16), bytes.get(16..LEN));
    let (Some(magic), Some(number), Some(sum)) = parts else { return 0 };
    let right = magic == MAGIC && blake3::hash(&[magic, number].concat()).as_bytes() == sum && bytes.len() == LEN;
    number.try_into().ok().filter(|_| right).map_or(0, u64::from_le_bytes)
}

/// Says that all files of this period and before are on disk.
pub(super) fn write(dir: &Path, period: u64) -> io::Result<()> {
    let mut bytes = [MAGIC.as_slice(), &period.to_le_bytes()].concat();
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    let temporary = dir.join("synced.new");
    fs::write(&temporary, bytes)?;
    File::open(&temporary)?.sync_all()?;
    fs::rename(&temporary, dir.join("synced"))?;
    File::open(dir)?.sync_all()
}

/// Stamps a file.
pub(super) fn stamp(file: &File, period: u64) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: period.cast_signed(), tv_nsec: 0 },
    };
    Ok(futimens(file, &times)?)
}

/// Whether a file with this modification time is of this period or before.
pub(super) fn covers(period: u64, modified_s: i64) -> bool {
    modified_s > 0 && modified_s.cast_unsigned() <= period
}
