//! Overlays mounted, found and unmounted: what has to be done where the mounts are.
//!
//! Stateless, so that either the daemon or its supervisor can do it ([`crate::mounter`]).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{Own, checks, kernel};
use crate::mount_error::MountError;
use crate::mountinfo::{self, MountInfo};

/// An overlay that is mounted, opened.
#[derive(Debug)]
pub struct Mounted {
    /// Where, canonical.
    pub merged: PathBuf,
    /// The directory that is written to.
    pub upper: PathBuf,
    /// The kernel's directory, where it is known.
    pub work: Option<PathBuf>,
    /// A clone of the mount, attached nowhere.
    pub tree: OwnedFd,
    /// The upper directory, opened.
    pub upper_dir: OwnedFd,
}

/// What came of taking one down.
#[derive(Debug)]
pub struct Down {
    /// Where, canonical.
    pub merged: PathBuf,
    /// False if what is mounted there, if anything, is no overlay over the lower.
    pub unmounted: bool,
    /// Its kind, then.
    pub found: Option<String>,
}

pub(crate) fn up(own: &Own, upper: &Path, work: &Path, merged: &Path) -> Result<Mounted, MountError> {
    let plan = checks::plan(own, upper, work, merged)?;
    match mountinfo::mount_on(&plan.merged).map_err(MountError::kernel("find mounts on", &plan.merged))? {
        Some(mount) if is_ours(own, &mount) && mountinfo::is_dead(&mount.mount_point) => {
            tracing::warn!(merged = %plan.merged.display(), "detached the overlay of a daemon that is gone");
            kernel::unmount(&plan.merged, true).map_err(MountError::kernel("detach", &plan.merged))?;
        }
        Some(mount) if mount.fs_type == "overlay" => {
            let reason = "an overlay is mounted here already; adopt it, or unmount it first";
            return Err(MountError::refused(&plan.merged, reason));
        }
        _ => {}
    }
    kernel::mount(&own.lower, &plan).map_err(|source| {
        // Three file systems on top of each other are one too many for the kernel.
        let operation = "mount an overlay (see the kernel's log; the upper may not lie on an overlay) on";
        MountError::Kernel { operation, path: plan.merged.clone(), source }
    })?;
    let merged = plan.merged.clone();
    open(plan.merged, plan.upper, Some(plan.work)).inspect_err(|_| {
        let _ = kernel::unmount(&merged, true);
    })
}

pub(crate) fn adopt(own: &Own, merged: &Path) -> Result<Mounted, MountError> {
    let merged = checks::canonical(merged)?;
    let mount = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
    let upper = upper_of(own, &merged, mount.as_ref(), &merged)?;
    open(merged, upper, mount.and_then(|mount| mount.option("workdir")))
}

pub(crate) fn down(own: &Own, merged: &Path, lazy: bool) -> Result<Down, MountError> {
    let merged = checks::canonical(merged)?;
    let mount = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
    if !mount.as_ref().is_some_and(|mount| is_ours(own, mount)) {
        return Ok(Down { merged, unmounted: false, found: mount.map(|mount| mount.fs_type) });
    }
    match kernel::unmount(&merged, lazy) {
        Ok(()) => Ok(Down { merged, unmounted: true, found: None }),
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            Err(MountError::Busy { path: merged })
        }
        Err(error) => Err(MountError::kernel("unmount", &merged)(error)),
    }
}

/// The upper directory of what is mounted, if it is an overlay that can be adopted. It is reached by `at`.
pub(super) fn upper_of(own: &Own, merged: &Path, mount: Option<&MountInfo>, at: &Path) -> Result<PathBuf, MountError> {
    let mount = mount.filter(|mount| is_ours(own, mount));
    let mount = mount.ok_or_else(|| MountError::Unknown { path: merged.to_owned() })?;
    if mountinfo::is_dead(at) {
        let reason = "this overlay lies over the mount of a daemon that is gone; unmount it, and mount it anew";
        return Err(MountError::refused(merged, reason));
    }
    mount.option("upperdir").ok_or_else(|| MountError::refused(merged, "a read-only overlay needs no care"))
}

/// Whether a mount is an overlay over this daemon's mount point.
pub(super) fn is_ours(own: &Own, mount: &MountInfo) -> bool {
    mount.fs_type == "overlay" && mount.option("lowerdir").is_some_and(|lower| lower == own.lower)
}

fn open(merged: PathBuf, upper: PathBuf, work: Option<PathBuf>) -> Result<Mounted, MountError> {
    let opened = (|| Ok((kernel::clone_tree(&merged)?, kernel::open_upper(&upper)?)))();
    let (tree, upper_dir) =
        opened.map_err(MountError::kernel("clone the mount, and open its upper directory, of", &merged))?;
    Ok(Mounted { merged, upper, work, tree, upper_dir })
}
