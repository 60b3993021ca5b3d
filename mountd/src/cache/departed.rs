//! Files that were unlinked and that somebody still has open: their bytes are on the disk until the last one lets go.
//!
//! An overlay holds every file that it has looked up, and a reader what it reads. The kernel says when such a file is
//! gone at last: an inotify watch on it ends with `IN_DELETE_SELF` (inotify(7)) when link and users are none, and does
//! not itself hold a file without a name. Where no watch can be had, bytes count as free when they are unlinked.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// Files unlinked between two looks at the queue, well below the kernel's least bound of 16,384 events of which each
/// takes two.
const UNREAD_MAX: usize = 2048;

/// Files without a name.
#[derive(Debug, Default)]
pub(super) struct Departed {
    queue: Option<OwnedFd>,
    bytes_of: HashMap<i32, u64>,
    bytes: u64,
    unread: usize,
}

impl Departed {
    pub(super) fn new() -> Self {
        let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        if let Err(error) = &queue {
            tracing::warn!(%error, "no inotify: evicted files that are still open do not count");
        }
        Self { queue: queue.ok(), ..Self::default() }
    }

    /// Unlinks a file that takes this many bytes. True if it is gone.
    pub(super) fn unlink(&mut self, path: &Path, bytes: u64) -> bool {
        let watch = self.queue.as_ref().map(|queue| inotify::add_watch(queue, path, WatchFlags::DELETE_SELF));
        let gone = match std::fs::remove_file(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            Err(_) => false,
        };
        if let (Some(Ok(watch)), Some(queue)) = (watch, &self.queue) {
            if gone {
                self.bytes += bytes - self.bytes_of.insert(watch, bytes).unwrap_or(0).min(bytes);
                self.unread += 1;
            } else {
                let _ = inotify::remove_watch(queue, watch);
            }
        }
        if self.unread >= UNREAD_MAX {
            self.settle();
        }
        gone
    }

    /// Hears which files are gone, and returns the bytes of those that are not.
    pub(super) fn settle(&mut self) -> u64 {
        self.unread = 0;
        let Some(queue) = &self.queue else { return 0 };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(queue, &mut buffer);
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    // Who is gone was not said: better a bound that is missed for a while than one never met again.
                    tracing::warn!(files = self.bytes_of.len(), "lost count of evicted files that are still open");
                    self.bytes_of.clear();
                    self.bytes = 0;
                }
                Ok(event) => {
                    let gone = event.events().intersects(ReadFlags::DELETE_SELF | ReadFlags::IGNORED);
                    if gone && let Some(bytes) = self.bytes_of.remove(&event.wd()) {
                        self.bytes -= bytes;
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return self.bytes,
            }
        }
    }
}
