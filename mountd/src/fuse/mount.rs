//! Mounting and unmounting, by our own hands.
//!
//! fuser can mount, and would unmount the path again when its session ends, whatever has been mounted there since. So
//! the mount is made here, and only ever unmounted here, after looking at whether it is still the same one.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount2, unmount as unmount2};
use rustix::process::{getegid, geteuid};

use super::fusermount;
use super::init::Agreement;
use crate::mount_error::MountError;
use crate::mountinfo::{self, MountInfo};
use crate::privilege;

/// How the kernel calls this kind of mount.
const FS_TYPE: &str = "fuse.narlake";

/// A mount of ours.
#[derive(Debug, Clone)]
pub struct Mount {
    dir: PathBuf,
    /// The device number that the kernel gave it. No other mount has it as long as this one lives.
    device: Option<String>,
    /// fusermount3 made it, and has to unmount it.
    by_helper: bool,
}

/// How the kernel spells a directory that is to be mounted on. Looks at its parent only, which is made if need be: a mount
/// whose daemon is gone cannot be looked at.
///
/// # Errors
/// When the path is none that can be mounted on.
pub fn place(dir: &Path) -> Result<PathBuf, MountError> {
    let parent = dir.parent().filter(|_| dir.is_absolute()).ok_or_else(|| odd(dir))?;
    std::fs::create_dir_all(parent).map_err(MountError::kernel("make", parent))?;
    let parent = std::fs::canonicalize(parent).map_err(MountError::kernel("resolve", parent))?;
    let dir = match dir.file_name() {
        Some(name) => parent.join(name),
        None => return Err(odd(dir)),
    };
    if dir.to_str().is_none_or(|text| text.contains([',', ':', '\\', ' ', '\n'])) {
        return Err(odd(&dir));
    }
    Ok(dir)
}

fn odd(path: &Path) -> MountError {
    // Nix compares it as text.
    MountError::refused(path, "must be an absolute path without symlinks, commas, colons or blanks")
}

/// The same, and makes it ready: it is made if need be, and what a daemon that was killed left mounted there is detached.
///
/// # Errors
/// When the directory cannot be used.
pub fn prepare(dir: &Path) -> Result<PathBuf, MountError> {
    let dir = place(dir)?;
    while let Some(mount) = mountinfo::mount_on(&dir).map_err(MountError::kernel("find mounts on", &dir))? {
        let is_dead = mount.fs_type == FS_TYPE && mountinfo::is_dead(&dir);
        if !is_dead {
            let reason =
                format!("is a mount point already ({}); unmount it, or choose another directory", mount.fs_type);
            return Err(MountError::refused(&dir, reason));
        }
        tracing::warn!(mount = %dir.display(), "detached the mount of a daemon that is gone");
        if privilege::may_mount() {
            unmount2(&dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                .map_err(|error| MountError::kernel("detach", &dir)(error.into()))?;
        } else {
            fusermount::unmount(&dir, true)?;
        }
    }
    match std::fs::symlink_metadata(&dir) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(odd(&dir)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir(&dir).map_err(MountError::kernel("make", &dir))?;
        }
        Err(error) => return Err(MountError::kernel("look at", &dir)(error)),
    }
    Ok(dir)
}

impl Mount {
    /// Mounts on this directory, which [`prepare`] returned, and agrees with the kernel. With it come the device, from
    /// which a session takes its messages, and what was agreed on. Whoever looks into the mount waits for the session.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(dir: &Path) -> Result<(Self, OwnedFd, Agreement), MountError> {
        let by_helper = !privilege::may_mount();
        let file = if by_helper { File::from(fusermount::mount(dir)?) } else { mount_here(dir)? };
        let this = Self { dir: dir.to_owned(), device: device_of(dir)?, by_helper };
        match Agreement::make(&file) {
            Ok(agreement) => Ok((this, file.into(), agreement)),
            Err(error) => {
                let _ = this.unmount();
                Err(MountError::kernel("agree with the kernel on", dir)(error))
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it is among these mounts and on its directory, be it below another one. Not if it was moved away, or
    /// detached (`umount -l`), though whoever has a file of it open keeps it alive.
    #[must_use]
    pub fn is_among(&self, mounts: &[MountInfo]) -> bool {
        // One whose device nobody has told cannot be found, and is not missed.
        let Some(device) = &self.device else { return true };
        mounts.iter().any(|mount| mount.device == *device && mount.mount_point == self.dir)
    }

    /// Unmounts, if the mount is still there and still this one. True if it was in use and had to be detached: it goes
    /// away with its last user.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmount(&self) -> Result<bool, MountError> {
        self.leave(true)
    }

    /// The same; in use, it is detached only if `lazy` is set, and else [`MountError::Busy`].
    ///
    /// # Errors
    /// When the kernel refuses, or the mount is in use.
    pub fn leave(&self, lazy: bool) -> Result<bool, MountError> {
        let found = device_of(&self.dir)?;
        if found.is_some() && found != self.device {
            tracing::warn!(mount = %self.dir.display(), "something else is mounted here by now, left alone");
            return Ok(false);
        }
        if self.by_helper {
            // Not mounted any more: somebody was faster.
            if mountinfo::mount_on(&self.dir).is_ok_and(|mount| mount.is_none()) {
                return Ok(false);
            }
            return match fusermount::unmount(&self.dir, false) {
                Err(MountError::Busy { .. }) if lazy => fusermount::unmount(&self.dir, true).map(|()| true),
                done => done.map(|()| false),
            };
        }
        let failed = |error: Errno| MountError::kernel("unmount", &self.dir)(error.into());
        match unmount2(&self.dir, UnmountFlags::NOFOLLOW) {
            // Not mounted any more.
            Ok(()) | Err(Errno::INVAL) => Ok(false),
            Err(Errno::BUSY) if !lazy => Err(MountError::Busy { path: self.dir.clone() }),
            Err(Errno::BUSY) => {
                unmount2(&self.dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(failed)?;
                Ok(true)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// The device of what is mounted on a directory, as the kernel tells it without asking the file system.
fn device_of(dir: &Path) -> Result<Option<String>, MountError> {
    let mount = mountinfo::mount_on(dir).map_err(MountError::kernel("find mounts on", dir))?;
    Ok(mount.map(|mount| mount.device))
}

/// Mounts, as a process that may.
fn mount_here(dir: &Path) -> Result<File, MountError> {
    let device = Path::new("/dev/fuse");
    let file = File::options().read(true).write(true).open(device).map_err(MountError::kernel("open", device))?;
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let options = format!(
        "fd={},rootmode=40000,user_id={user},group_id={group},default_permissions,allow_other",
        file.as_raw_fd()
    );
    let options = CString::new(options).map_err(|error| MountError::kernel("mount", dir)(error.into()))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount2("narlake", dir, FS_TYPE, flags, options.as_c_str())
        .map_err(|error| MountError::kernel("mount on", dir)(error.into()))?;
    Ok(file)
}
