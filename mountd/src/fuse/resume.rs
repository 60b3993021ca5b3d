//! A session on a connection that is already agreed on.
//!
//! fuser begins every session with an INIT, which the kernel sends once in the life of a connection. So it is shown the
//! kept one over a socket, its answer is thrown away, and then the connection is put in the socket's place. From there on
//! it reads what the kernel sends.
//!
//! What an earlier daemon had read and not answered is with the kernel still, since somebody held the descriptor. It is
//! asked to send that again, with a mark ([`super::resent`]).

use std::io::{self, IoSlice};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use fuser::{Config, Filesystem, Session, SessionACL};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::init::Agreement;

/// `FUSE_NOTIFY_RESEND` of the kernel's `include/uapi/linux/fuse.h`.
const NOTIFY_RESEND: i32 = 7;

/// A session that reads from `device`, whose INIT has been answered.
///
/// # Errors
/// When a descriptor cannot be had, or fuser does not take the kept INIT.
pub(super) fn resume<F: Filesystem>(
    filesystem: F,
    device: &OwnedFd,
    agreement: &Agreement,
    config: Config,
) -> io::Result<Session<F>> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    send(&ours, agreement.request(), SendFlags::NOSIGNAL)?;
    let session = Session::from_fd(filesystem, theirs, SessionACL::All, config)?;
    let mut answer = [0_u8; 256];
    recv(&ours, &mut answer, RecvFlags::DONTWAIT)?;
    put_in_place(device, &session)?;
    Ok(session)
}

/// Makes the session's descriptor stand for the connection.
#[expect(unsafe_code, reason = "fuser has no way to begin a session after its INIT")]
fn put_in_place<F: Filesystem>(device: &OwnedFd, session: &Session<F>) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as the session lives, which it does throughout this function; it is
    // never closed here, since `ManuallyDrop` forgets it. dup2 replaces what it stands for in one step.
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(session.as_fd().as_raw_fd()) });
    Ok(rustix::io::dup3(device, &mut place, rustix::io::DupFlags::CLOEXEC)?)
}

/// Asks the kernel for what was read from the connection and never answered.
///
/// # Errors
/// When the kernel does not do that, or the connection is gone.
pub(crate) fn ask_again(device: &impl AsFd) -> io::Result<()> {
    // fuse_out_header: length, the notification's number where an error would be, and no request.
    let mut message = Vec::with_capacity(16);
    message.extend_from_slice(&16_u32.to_le_bytes());
    message.extend_from_slice(&NOTIFY_RESEND.to_le_bytes());
    message.extend_from_slice(&0_u64.to_le_bytes());
    rustix::io::writev(device, &[IoSlice::new(&message)])?;
    Ok(())
}
