//! Overlays mounted, found and unmounted: what has to be done where the mounts are.
//!
//! Stateless, so that either the daemon or its supervisor can do it ([`crate::mounter`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open as open_file};
use rustix::io::Errno;

use super::{Own, checks, kernel};
use crate::mount_error::MountError;
use crate::mountinfo::{self, MountInfo};
use crate::sealed::kernel as layered;

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

/// Mounts a sealed view: layers over an image (`sealed`). Returns where, canonical, and a clone of the mount.
pub(crate) fn sealed_up(
    own: &Own,
    image: &Path,
    content: &[PathBuf],
    upper: Option<&(PathBuf, PathBuf)>,
    merged: &Path,
) -> Result<(PathBuf, OwnedFd), MountError> {
    let (merged, upper) = match upper {
        Some((upper, work)) => {
            let plan = checks::plan(own, upper, work, merged)?;
            (plan.merged, Some((plan.upper, plan.work)))
        }
        None => (checks::place(own, merged)?, None),
    };
    let on = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
    if on.is_some_and(|mount| mount.fs_type == "overlay") {
        return Err(MountError::refused(&merged, "an overlay is mounted here already; unmount it first"));
    }
    let layer = |dir: &PathBuf| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = open_file(dir, flags, Mode::empty());
        opened.map_err(|error| MountError::kernel("open the layer", dir)(error.into()))
    };
    let layers: Vec<OwnedFd> = content.iter().map(layer).collect::<Result<_, _>>()?;
    let layers: Vec<BorrowedFd<'_>> = layers.iter().map(AsFd::as_fd).collect();
    let operation = "mount the image (kernels before 6.12 cannot, see docs/kernels.md)";
    let image = layered::mount_image(image).map_err(MountError::kernel(operation, image))?;
    let operation = "mount the layers of a sealed view (kernels before 6.13 cannot, see docs/kernels.md) for";
    let upper = upper.as_ref().map(|(upper, work)| (upper.as_path(), work.as_path()));
    let mount = layered::mount_layers(image.as_fd(), &layers, upper).map_err(MountError::kernel(operation, &merged))?;
    layered::attach(mount.as_fd(), &merged).map_err(MountError::kernel("attach a sealed view to", &merged))?;
    match kernel::clone_tree(&merged) {
        Ok(tree) => Ok((merged, tree)),
        Err(error) => {
            let _ = kernel::unmount(&merged, true);
            Err(MountError::kernel("clone the mount of", &merged)(error))
        }
    }
}

/// Unmounts a sealed view. One that somebody has unmounted already is gone as well.
pub(crate) fn sealed_down(merged: &Path, lazy: bool) -> Result<(), MountError> {
    let mount = mountinfo::mount_on(merged).map_err(MountError::kernel("find mounts on", merged))?;
    match mount {
        None => Ok(()),
        Some(mount) if mount.fs_type != "overlay" => {
            let reason =
                format!("it is not the view that is mounted on it any more, but a mount of type {}", mount.fs_type);
            Err(MountError::refused(merged, reason))
        }
        Some(_) => match kernel::unmount(merged, lazy) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                Err(MountError::Busy { path: merged.to_owned() })
            }
            Err(error) => Err(MountError::kernel("unmount", merged)(error)),
        },
    }
}

fn open(merged: PathBuf, upper: PathBuf, work: Option<PathBuf>) -> Result<Mounted, MountError> {
    let opened = (|| Ok((kernel::clone_tree(&merged)?, kernel::open_upper(&upper)?)))();
    let (tree, upper_dir) =
        opened.map_err(MountError::kernel("clone the mount, and open its upper directory, of", &merged))?;
    Ok(Mounted { merged, upper, work, tree, upper_dir })
}
