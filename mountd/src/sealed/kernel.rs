//! The system calls behind sealed views: an image and its layers, mounted without a name until they are attached.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

/// The options of every overlay (docs/decisions/0007-overlay-options.md). No upper is ever tied to one image.
const OPTIONS: &[(&str, &str)] =
    &[("redirect_dir", "on"), ("metacopy", "on"), ("index", "off"), ("xino", "off"), ("nfs_export", "off")];

/// Mounts an image that is a plain file, attached nowhere.
///
/// # Errors
/// When the kernel refuses: before 6.12 it takes block devices alone.
pub fn mount_image(image: &Path) -> io::Result<OwnedFd> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", image)?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    create(&context)
}

/// Mounts an overlay over an image, with the content of its files in these directories, the first that has it;
/// attached nowhere. Without `upper`, which is the upper and the work directory, it is read-only.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_layers(
    image: BorrowedFd<'_>,
    content: &[BorrowedFd<'_>],
    upper: Option<(&Path, &Path)>,
) -> io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let at = context.as_fd();
    fsconfig_set_string(at, "source", "overlay")?;
    fsconfig_set_fd(at, "lowerdir+", image)?;
    for layer in content {
        fsconfig_set_fd(at, "datadir+", *layer)?;
    }
    if let Some((upper, work)) = upper {
        fsconfig_set_string(at, "upperdir", upper)?;
        fsconfig_set_string(at, "workdir", work)?;
    } else {
        fsconfig_set_flag(at, "ro")?;
    }
    for (key, value) in OPTIONS {
        fsconfig_set_string(at, *key, *value)?;
    }
    create(&context)
}

/// Attaches a mount to a directory.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(mount: BorrowedFd<'_>, dir: &Path) -> io::Result<()> {
    Ok(move_mount(mount, "", CWD, dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn create(context: &OwnedFd) -> io::Result<OwnedFd> {
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
