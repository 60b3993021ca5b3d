//! The system calls behind overlays.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, open, statat};
use rustix::io::Errno;
use rustix::mount::{
    FsPickFlags, MountFlags, OpenTreeFlags, UnmountFlags, fsconfig_reconfigure, fspick, mount as mount2, open_tree,
    unmount as unmount2,
};

use super::checks::Plan;
use crate::privilege;

/// Fixed, and compared with what the kernel then shows by a test.
const OPTIONS: &str = "redirect_dir=on,metacopy=on,index=off,xino=off,nfs_export=off";

/// In a user namespace, whose root may not set `trusted` attributes: the kernel refuses the first two options there, and
/// needs to be told to use `user` attributes for directories that hide what is below them.
const OPTIONS_IN_NAMESPACE: &str = "userxattr,index=off,xino=off,nfs_export=off";

/// Mounts the overlay. Its source is the word that Nix's check looks for.
pub(super) fn mount(lower: &Path, plan: &Plan) -> io::Result<()> {
    let mut data = b"lowerdir=".to_vec();
    data.extend_from_slice(lower.as_os_str().as_bytes());
    data.extend_from_slice(b",upperdir=");
    data.extend_from_slice(plan.upper.as_os_str().as_bytes());
    data.extend_from_slice(b",workdir=");
    data.extend_from_slice(plan.work.as_os_str().as_bytes());
    data.push(b',');
    let options = if privilege::in_user_namespace() { OPTIONS_IN_NAMESPACE } else { OPTIONS };
    data.extend_from_slice(options.as_bytes());
    let data = CString::new(data)?;
    Ok(mount2("overlay", &plan.merged, "overlay", MountFlags::NOSUID | MountFlags::NODEV, data.as_c_str())?)
}

/// A clone of the mount on this path, attached nowhere: it stands for the file system from any namespace.
pub(super) fn clone_tree(merged: &Path) -> io::Result<OwnedFd> {
    Ok(open_tree(CWD, merged, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
}

/// Makes the overlay forget its dentries that nobody uses, negative ones among them. A reconfiguration that changes
/// nothing: unlike `mount -o remount` it keeps the mount's flags, and works on a mount of another namespace.
pub(crate) fn refresh(tree: &OwnedFd) -> io::Result<()> {
    let context = fspick(tree.as_fd(), "", FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC)?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}

/// The upper directory, to look into from any namespace.
pub(super) fn open_upper(upper: &Path) -> io::Result<OwnedFd> {
    Ok(open(upper, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

pub(super) fn unmount(merged: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    Ok(unmount2(merged, flags | UnmountFlags::NOFOLLOW)?)
}

/// Whether a name is seen through an overlay.
pub(super) enum Seen {
    Yes,
    /// The overlay still believes that it does not exist.
    NotYet,
    /// It was deleted through the overlay: what the lower has stays hidden.
    Never,
}

pub(super) fn look(upper: &OwnedFd, tree: &OwnedFd, name: &str) -> io::Result<Seen> {
    match statat(upper, name, AtFlags::SYMLINK_NOFOLLOW) {
        // A character device 0/0 marks what was deleted.
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice => return Ok(Seen::Never),
        Ok(_) => return Ok(Seen::Yes),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match statat(tree, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(Seen::Yes),
        // Stale: the overlay remembers an object of the lower that is gone, which a refresh cures too.
        Err(Errno::NOENT | Errno::STALE) => Ok(Seen::NotYet),
        Err(error) => Err(error.into()),
    }
}
