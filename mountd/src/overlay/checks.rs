//! What must hold before an overlay is mounted: the mistakes that would hang or hurt, each with what to do about it.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{Overlays, Own};
use crate::mount_error::MountError;

/// `OVERLAYFS_SUPER_MAGIC` of the kernel.
const OVERLAY_MAGIC: i64 = 0x794c_7630;

/// Longest option string that mount(2) takes: a page, with a terminating zero.
const OPTIONS_MAX: usize = 4095;

/// Directories of an overlay, canonical and checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) upper: PathBuf,
    pub(super) work: PathBuf,
    pub(super) merged: PathBuf,
}

pub(super) fn plan(own: &Own, upper: &Path, work: &Path, merged: &Path) -> Result<Plan, MountError> {
    for dir in [upper, work] {
        // Nothing is made inside the lower: it is read-only, and would say so less clearly.
        inside(own, dir)?;
        fs::create_dir_all(dir).map_err(MountError::kernel("make", dir))?;
    }
    let plan = Plan { upper: canonical(upper)?, work: canonical(work)?, merged: canonical(merged)? };
    for dir in [&plan.upper, &plan.work, &plan.merged] {
        inside(own, dir)?;
        if !dir.is_dir() {
            return Err(MountError::refused(dir, "is not a directory"));
        }
        // The kernel separates by the first two and unescapes the third; Nix reads the same text differently.
        if dir.to_str().is_none_or(|text| text.contains([',', ':', '\\', ' ', '\n'])) {
            return Err(MountError::refused(
                dir,
                "overlays take no path with a comma, colon, backslash or blank in it",
            ));
        }
        // Of all of them, so that the lower's device cannot be any of theirs either.
        if same_device(dir, &own.lower) {
            return Err(MountError::refused(
                dir,
                "lies in the mount that the overlay is for: the daemon would wait for itself",
            ));
        }
    }
    if fs::metadata(&plan.upper).map_err(MountError::kernel("stat", &plan.upper))?.dev()
        != fs::metadata(&plan.work).map_err(MountError::kernel("stat", &plan.work))?.dev()
    {
        return Err(MountError::refused(&plan.work, "must be on the same file system as the upper directory"));
    }
    if plan.work.starts_with(&plan.upper) || plan.upper.starts_with(&plan.work) {
        return Err(MountError::refused(&plan.work, "and the upper directory must not lie in each other"));
    }
    if is_overlay(&plan.upper) {
        return Err(MountError::refused(
            &plan.upper,
            "lies on an overlay itself, which the kernel refuses; use a plain file system",
        ));
    }
    hides_nothing(own, &plan.merged)?;
    let lengths = [&own.lower, &plan.upper, &plan.work].map(|dir| dir.as_os_str().len());
    if lengths.iter().sum::<usize>() + 200 > OPTIONS_MAX {
        return Err(MountError::refused(
            &plan.upper,
            "and the other paths are too long for the kernel's mount options",
        ));
    }
    Ok(plan)
}

/// Where something read-only may be mounted, canonical.
pub(super) fn place(own: &Own, merged: &Path) -> Result<PathBuf, MountError> {
    let merged = canonical(merged)?;
    inside(own, &merged)?;
    if !merged.is_dir() {
        return Err(MountError::refused(&merged, "is not a directory"));
    }
    hides_nothing(own, &merged)?;
    Ok(merged)
}

fn hides_nothing(own: &Own, merged: &Path) -> Result<(), MountError> {
    for needed in &own.needed {
        if resolved(needed)?.starts_with(merged) {
            let reason = format!("would hide {}, which this daemon needs", needed.display());
            return Err(MountError::refused(merged, reason));
        }
    }
    Ok(())
}

/// The path as the kernel knows it.
pub(super) fn canonical(path: &Path) -> Result<PathBuf, MountError> {
    fs::canonicalize(path).map_err(MountError::kernel("resolve", path))
}

/// The same for a path of which only the first part may be there yet.
fn resolved(path: &Path) -> Result<PathBuf, MountError> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok(resolved(parent)?.join(name)),
            _ => Err(MountError::kernel("resolve", path)(error)),
        },
        found => found.map_err(MountError::kernel("resolve", path)),
    }
}

impl Overlays {
    /// Refuses to start a daemon whose executable, cache, sockets or configuration lie in its own mount: it would wait
    /// for itself. None of them need be there yet.
    ///
    /// # Errors
    /// Names the path.
    pub fn check_own(own: &Own) -> Result<(), MountError> {
        own.needed.iter().chain(&own.files).try_for_each(|path| inside(own, &resolved(path)?))
    }
}

fn inside(own: &Own, path: &Path) -> Result<(), MountError> {
    if path.starts_with(&own.lower) {
        return Err(MountError::refused(path, "lies in the daemon's own mount: it would wait for itself"));
    }
    Ok(())
}

fn same_device(left: &Path, right: &Path) -> bool {
    let device = |path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    device(left).is_some_and(|left| device(right) == Some(left))
}

fn is_overlay(path: &Path) -> bool {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).is_ok_and(|fd| is_overlay_magic(&fd))
}

/// Whether a file lies on an overlay.
pub(super) fn is_overlay_magic(fd: &OwnedFd) -> bool {
    #[expect(clippy::useless_conversion, reason = "the type of f_type differs between architectures")]
    let magic = rustix::fs::fstatfs(fd).map(|stat| i64::try_from(stat.f_type).unwrap_or(0));
    magic == Ok(OVERLAY_MAGIC)
}
