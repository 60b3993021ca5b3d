//! Mounting as an ordinary user, by libfuse's set-uid helper.
//!
//! `fusermount3` opens /dev/fuse, mounts it, and sends the descriptor over the socket whose number `_FUSE_COMMFD` names
//! (libfuse, util/fusermount.c and lib/mount.c). The mount is nosuid and nodev whatever is asked, and its directory must
//! be the user's. Others see it, root among them, only if /etc/fuse.conf says `user_allow_other`.

use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};

use crate::mount_error::MountError;

const HELPER: &str = "fusermount3";

const CONFIGURATION: &str = "/etc/fuse.conf";

/// Longest time that the helper may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Most bytes of what it says that are read.
const WORDS_MAX: u64 = 64 * 1024;

/// Mounts on a directory; the descriptor is the session's.
///
/// # Errors
/// When there is no helper, or it refuses.
pub(super) fn mount(dir: &Path) -> Result<OwnedFd, MountError> {
    let failed = || MountError::kernel("mount, by fusermount3, on", dir);
    let mut options = "ro,nosuid,nodev,default_permissions,fsname=narlake,subtype=narlake".to_owned();
    if std::fs::read_to_string(CONFIGURATION).is_ok_and(|text| allows_others(&text)) {
        options.push_str(",allow_other");
    } else {
        tracing::warn!(
            mount = %dir.display(),
            "only this user will see the mount, not even root: {CONFIGURATION} does not say user_allow_other"
        );
    }
    let flags = SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io::Error::from);
    let (ours, theirs) = pair.map_err(failed())?;
    set_socket_timeout(&ours, Timeout::Recv, Some(LIMIT)).map_err(io::Error::from).map_err(failed())?;
    let mut command = Command::new(HELPER);
    command.arg("-o").arg(options).arg("--").arg(dir);
    // Standard input is inherited for certain, and has a number that is known.
    command.env("_FUSE_COMMFD", "0").stdin(Stdio::from(theirs));
    let output = run(command).map_err(failed())?;
    let device = receive(&ours).map_err(failed())?;
    match device.filter(|_| output.status.success()) {
        Some(device) => Ok(device),
        None => Err(failed()(io::Error::other(said(&output)))),
    }
}

/// Unmounts; in use, it is detached only if `lazy` is set.
///
/// # Errors
/// When it is in use, or the helper refuses.
pub(super) fn unmount(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new(HELPER);
    command.args(if lazy { ["-u", "-z"].as_slice() } else { &["-u"] }).arg("--").arg(dir).stdin(Stdio::null());
    let output = run(command).map_err(MountError::kernel("unmount, by fusermount3,", dir))?;
    if output.status.success() {
        return Ok(());
    }
    let said = said(&output);
    if said.contains("busy") {
        return Err(MountError::Busy { path: dir.to_owned() });
    }
    Err(MountError::kernel("unmount, by fusermount3,", dir)(io::Error::other(said)))
}

/// Runs the helper until it is done or its time is up: then its end of the socket that it writes errors to is closed.
fn run(mut command: Command) -> io::Result<Output> {
    let (mut words, theirs) = UnixStream::pair()?;
    words.set_read_timeout(Some(LIMIT))?;
    // Its words are looked at.
    command.env("LC_ALL", "C").stdout(Stdio::null()).stderr(Stdio::from(OwnedFd::from(theirs)));
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(error.kind(), "there is no fusermount3; install fuse3"),
        _ => error,
    })?;
    // The descriptors that it was given are its own from here on.
    drop(command);
    let mut stderr = Vec::new();
    if let Err(error) = Read::by_ref(&mut words).take(WORDS_MAX).read_to_end(&mut stderr) {
        child.kill()?;
        child.wait()?;
        return Err(io::Error::new(io::ErrorKind::TimedOut, format!("fusermount3 does not come back: {error}")));
    }
    Ok(Output { status: child.wait()?, stdout: Vec::new(), stderr })
}

/// The descriptor that was sent, if one was.
fn receive(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.trim().is_empty() { output.status.to_string() } else { text.trim().to_owned() }
}

/// One of its lines says so.
fn allows_others(configuration: &str) -> bool {
    configuration.lines().any(|line| line.trim() == "user_allow_other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_allow_nothing() {
        assert!(allows_others("# x\nuser_allow_other\n") && allows_others(" user_allow_other "));
        assert!(!allows_others("#user_allow_other\n") && !allows_others("") && !allows_others("user_allow_other = no"));
    }
}
