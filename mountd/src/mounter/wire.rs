//! What a daemon and its supervisor say to each other.
//!
//! A SOCK_SEQPACKET socket, one JSON document a packet with descriptors beside it. A connection carries requests and
//! their answers, strictly in turn. The one that begins with [`Request::Hello`] is the daemon's lease: it beats, and the
//! daemon counts as gone when it ends. Everything else comes on connections of its own, so that nothing that takes the
//! kernel long holds up a beat. Both sides are of one version or of neighbouring ones: unknown fields are ignored.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fuse::init::Agreement;
use crate::mount_error::MountError;
use crate::overlay::Own;

/// Longest packet, in bytes: below what the kernel lets a socket hold by default.
pub(crate) const PACKET_MAX: usize = 96 * 1024;

/// Most descriptors that come with one packet.
pub(crate) const DESCRIPTORS_MAX: usize = 4;

/// What a daemon asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// It wants to be the daemon. Answered with [`Answer::Lease`].
    Hello {
        /// Instead of the one that is.
        takeover: bool,
    },
    /// It is alive. Answered with [`Answer::Done`], or [`Answer::Gone`].
    Beat,
    /// A connection of this name, mounted on a directory unless it is held already. Answered with
    /// [`Answer::Connected`], with the device and the notes of [`crate::fuse::resent`].
    Connect {
        /// Its name.
        name: String,
        /// Where its file system is to be seen.
        dir: PathBuf,
    },
    /// Unmount it. Answered with [`Answer::Unmounted`].
    Disconnect {
        /// Its name.
        name: String,
        /// Detach it although it is in use.
        lazy: bool,
    },
    /// Keep the descriptors that come along, and this text, for the next daemon. Answered with [`Answer::Done`].
    Keep {
        /// By this name; what was kept by it before goes.
        key: String,
        /// What they are.
        text: String,
    },
    /// What was kept is not needed any more. Answered with [`Answer::Done`].
    Forget {
        /// Its name.
        key: String,
    },
    /// What is kept. Answered with [`Answer::Kept`], with the descriptors.
    Take {
        /// Its name.
        key: String,
    },
    /// See [`crate::overlay`]. Answered with [`Answer::Overlay`], with the mount's clone and its upper directory.
    OverlayUp {
        /// The daemon's own places.
        own: Own,
        /// The directory that is written to.
        upper: PathBuf,
        /// The kernel's.
        work: PathBuf,
        /// Where it is mounted.
        merged: PathBuf,
    },
    /// See [`crate::overlay`]. Answered like [`Request::OverlayUp`].
    OverlayAdopt {
        /// The daemon's own places.
        own: Own,
        /// Where it is mounted.
        merged: PathBuf,
    },
    /// See [`crate::sealed`]. Answered with [`Answer::Sealed`], with the mount's clone.
    SealedUp {
        /// The daemon's own places.
        own: Own,
        /// The image.
        image: PathBuf,
        /// Where content is, the first that has it.
        content: Vec<PathBuf>,
        /// The directory that is written to, and the kernel's; without it the view is read-only.
        upper: Option<(PathBuf, PathBuf)>,
        /// Where it is mounted.
        merged: PathBuf,
    },
    /// See [`crate::sealed`]. Answered with [`Answer::Done`].
    SealedDown {
        /// Where it is mounted.
        merged: PathBuf,
        /// Detach it although it is in use.
        lazy: bool,
    },
    /// See [`crate::overlay`]. Answered with [`Answer::OverlayDown`].
    OverlayDown {
        /// The daemon's own places.
        own: Own,
        /// Where it is mounted.
        merged: PathBuf,
        /// Detach it although it is in use.
        lazy: bool,
    },
}

/// What the supervisor answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub(crate) enum Answer {
    Done,
    /// Done; but mounts of connections are on their directories no more, because somebody has unmounted them.
    Gone {
        /// The connections.
        connections: Vec<String>,
    },
    Lease {
        /// Connections that are held.
        connections: Vec<String>,
        /// What is kept.
        kept: Vec<String>,
        /// How often to beat, in milliseconds.
        beat_ms: u64,
    },
    Connected {
        agreement: Agreement,
        /// Whether it was held already.
        resumed: bool,
    },
    Unmounted {
        /// It was in use and had to be detached.
        detached: bool,
    },
    Kept {
        text: String,
    },
    Overlay {
        merged: PathBuf,
        upper: PathBuf,
        work: Option<PathBuf>,
    },
    Sealed {
        merged: PathBuf,
    },
    OverlayDown {
        merged: PathBuf,
        /// False if what is mounted there, if anything, is no overlay over the lower.
        unmounted: bool,
        /// Its kind, then.
        found: Option<String>,
    },
    /// It was not done.
    Failed(Failure),
}

/// A [`MountError`] on its way.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Failure {
    Refused { path: PathBuf, reason: String },
    Unknown { path: PathBuf },
    Busy { path: PathBuf },
    Kernel { operation: String, path: PathBuf, errno: Option<i32>, text: String },
}

impl From<MountError> for Failure {
    fn from(error: MountError) -> Self {
        match error {
            MountError::Refused { path, reason } => Self::Refused { path, reason },
            MountError::Unknown { path } => Self::Unknown { path },
            MountError::Busy { path } => Self::Busy { path },
            MountError::Late { operation, path, limit_ms } => {
                let text = format!("not done within {limit_ms} ms");
                Self::Kernel { operation: operation.to_owned(), path, errno: None, text }
            }
            MountError::Kernel { operation, path, source } => {
                let (errno, text) = (source.raw_os_error(), source.to_string());
                Self::Kernel { operation: operation.to_string(), path, errno, text }
            }
        }
    }
}

impl From<Failure> for MountError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused { path, reason } => Self::Refused { path, reason },
            Failure::Unknown { path } => Self::Unknown { path },
            Failure::Busy { path } => Self::Busy { path },
            Failure::Kernel { operation, path, errno, text } => {
                let source = match errno {
                    Some(errno) => io::Error::from_raw_os_error(errno),
                    None => io::Error::other(format!("{operation}: {text}")),
                };
                Self::Kernel { operation: "have the supervisor work on", path, source }
            }
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedFd,
}

impl Wire {
    pub(crate) const fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Connects to a supervisor.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self { socket })
    }

    pub(crate) const fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Bounds every wait from here on.
    pub(crate) fn limit(&self, limit: Duration) -> io::Result<()> {
        set_socket_timeout(&self.socket, Timeout::Recv, Some(limit))?;
        Ok(set_socket_timeout(&self.socket, Timeout::Send, Some(limit))?)
    }

    pub(crate) fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > PACKET_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too large"));
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message; `None` when the other side has closed.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; PACKET_MAX + 1];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                done => break done?,
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        match bytes.get(..received.bytes) {
            Some([]) | None => Ok(None),
            Some(text) => Ok(Some((serde_json::from_slice(text)?, descriptors))),
        }
    }
}
