//! What is mounted where, as the kernel tells it in `/proc/self/mountinfo`.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

pub use narlake_format::mountinfo::{MountInfo, parse};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// The mounts that this process sees, in the order in which they were made.
///
/// # Errors
/// When the kernel does not tell.
pub fn mounts() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount on exactly this path.
///
/// # Errors
/// When the kernel does not tell.
pub fn mount_on(path: &Path) -> io::Result<Option<MountInfo>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.mount_point == path))
}

/// Looks at the mounts of this process's namespace when they have changed. The kernel says for each descriptor of
/// `mountinfo` whether they have, so that a look which finds nothing new costs next to nothing.
#[derive(Debug)]
pub struct Watch {
    file: File,
    /// They have, and were not read since.
    changed: bool,
}

impl Watch {
    /// Begins with a change.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn new() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/mountinfo")?, changed: true })
    }

    /// The mounts, if anything was mounted, moved or unmounted since they were told the last time.
    ///
    /// # Errors
    /// When the kernel does not tell. Then the next call tries again.
    pub fn changed(&mut self) -> io::Result<Option<Vec<MountInfo>>> {
        // Before they are read: what changes meanwhile is found by the next call.
        let mut polled = [PollFd::new(&self.file, PollFlags::PRI)];
        self.changed |= poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0;
        if !self.changed {
            return Ok(None);
        }
        self.file.rewind()?;
        let mut text = Vec::new();
        self.file.read_to_end(&mut text)?;
        self.changed = false;
        Ok(Some(parse(&text)))
    }
}

/// Whether the daemon behind a mount of ours, or behind an overlay over one, is gone. Waits for the daemon if it is not.
#[must_use]
pub fn is_dead(mount_point: &Path) -> bool {
    // The kernel answers for a dead daemon whatever it remembers, the root's attributes and names that do not exist
    // among them. So this asks for a name that nobody has asked for before, and that no store path has.
    static PROBES: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let probe = format!(".narlake-probe-{}-{}-{number}", std::process::id(), now.as_nanos());
    let not_connected = [Errno::NOTCONN, Errno::CONNABORTED].map(Errno::raw_os_error);
    let error = std::fs::symlink_metadata(mount_point.join(probe)).err().and_then(|error| error.raw_os_error());
    error.is_some_and(|error| not_connected.contains(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_root() {
        assert!(mount_on(Path::new("/")).unwrap().is_some());
    }

    #[test]
    fn a_watch_begins_with_a_look() {
        let mounts = Watch::new().unwrap().changed().unwrap().unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point == Path::new("/")));
    }
}
