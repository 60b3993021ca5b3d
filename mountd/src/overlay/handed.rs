//! What is handed over for an overlay of another mount namespace.
//!
//! An overlay that is mounted in a container is not seen from here, and cannot be looked through by its path. Whoever
//! can see it sends three descriptors along with `overlay-adopt`: its own `/proc/self/mountinfo`, in which the kernel says
//! what is mounted where; a clone of the mount (`open_tree`); and its root directory, below which the upper directory is
//! found. With `overlay-down` they say which overlay is meant.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstat, fstatfs, openat2};

use super::checks::is_overlay_magic;
use crate::mount_error::MountError;
use crate::mountinfo::{self, MountInfo};

/// Descriptors of one overlay.
pub const HANDED: usize = 3;

/// Longest mountinfo, in bytes: that of a namespace with as many mounts as the kernel allows.
const MOUNTINFO_MAX: u64 = 64 << 20;

/// The descriptors, in the order in which they come.
pub struct Handed {
    mountinfo: OwnedFd,
    tree: OwnedFd,
    root: OwnedFd,
}

impl Handed {
    /// Takes what came with a request. `None` if that is nothing, or not as many as it should be.
    #[must_use]
    pub fn new(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let [mountinfo, tree, root] = <[OwnedFd; HANDED]>::try_from(descriptors).ok()?;
        Some(Self { mountinfo, tree, root })
    }

    /// The device number of the overlay: no other has it while this one is there.
    pub(super) fn device(&self) -> io::Result<u64> {
        Ok(fstat(&self.tree)?.st_dev)
    }

    /// A path to the overlay for this process, from whatever namespace it came.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.tree.as_raw_fd()).into()
    }

    /// What is mounted on `merged` in the other namespace. Only what the kernel says is read, and believed.
    pub(super) fn mount_on(&self, merged: &Path) -> Result<Option<MountInfo>, MountError> {
        let failed = |operation| MountError::kernel(operation, merged);
        let is_proc = |fd: &OwnedFd| Ok::<_, rustix::io::Errno>(fstatfs(fd)?.f_type == PROC_SUPER_MAGIC);
        let told =
            is_proc(&self.mountinfo).map_err(|error| failed("look at what was handed over for")(error.into()))?;
        if !told {
            return Err(MountError::refused(merged, "what was handed over says nothing about mounts"));
        }
        if !is_overlay_magic(&self.tree) {
            return Ok(None);
        }
        let mut text = Vec::new();
        let file = self.mountinfo.try_clone().map(File::from);
        let read = file.and_then(|file| file.take(MOUNTINFO_MAX).read_to_end(&mut text));
        read.map_err(failed("read the mountinfo that was handed over for"))?;
        Ok(mountinfo::parse(&text).into_iter().rfind(|mount| mount.mount_point == merged))
    }

    /// The overlay, and its upper directory by the path that the other namespace has for it.
    pub(super) fn open(self, upper: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = openat2(&self.root, upper, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        Ok((self.tree, upper))
    }
}
