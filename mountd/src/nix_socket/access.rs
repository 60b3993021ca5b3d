//! Who may connect to a Nix socket: root, this daemon's own user, and whom the configuration names.
//!
//! The kernel vouches for a client's user and primary group, as they were when it connected. Who may not connect is told
//! so in the protocol, and nothing that it says is looked at.

use std::io;
use std::path::Path;
use std::time::Duration;

use narlake_format::nix::worker::handshake::refusal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::NAME;

/// How long a client that may not connect has to take the refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of it that are passed over, so that it hears the refusal and not that its own words were not wanted.
const PASSED_OVER_MAX: usize = 4096;

/// Who may connect, and the mode of the socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Access {
    /// Permission bits of the socket.
    pub mode: u32,
    /// Users beside root and the daemon's own.
    pub uids: Vec<u32>,
    /// Primary groups of further users.
    pub gids: Vec<u32>,
}

impl Default for Access {
    fn default() -> Self {
        Self { mode: 0o600, uids: Vec::new(), gids: Vec::new() }
    }
}

impl Access {
    /// Whether this user, in this group, may connect to the daemon of that user.
    fn admits(&self, own: u32, uid: u32, gid: u32) -> bool {
        uid == 0 || uid == own || self.uids.contains(&uid) || self.gids.contains(&gid)
    }

    /// The user at the other end if it may not connect.
    ///
    /// # Errors
    /// When the kernel does not say who it is.
    pub(super) fn stranger(&self, stream: &UnixStream) -> io::Result<Option<u32>> {
        let peer = stream.peer_cred()?;
        let own = rustix::process::geteuid().as_raw();
        Ok((!self.admits(own, peer.uid(), peer.gid())).then_some(peer.uid()))
    }

    /// Listens on a socket. What a process that is gone left there is removed.
    ///
    /// # Errors
    /// When another process listens there, something else than a socket is there, or the socket cannot be made.
    pub fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        use std::os::unix::fs::PermissionsExt;
        let listener = listen(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(self.mode))?;
        Ok(listener)
    }
}

/// Listens on a socket that only this user reaches. What a process that is gone left there is removed.
///
/// # Errors
/// When another process listens there, something else than a socket is there, or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // The kernel says so of any file.
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else than a socket"));
            }
            std::fs::remove_file(path)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
        }
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Tells a client that it may not, and waits a moment for it to leave.
pub(super) async fn refuse(mut stream: UnixStream, uid: u32) {
    let told = async {
        stream.write_all(&refusal(NAME, &format!("user {uid} may not use this store"))).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(PASSED_OVER_MAX as u64), &mut tokio::io::sink()).await
    };
    // It has left, or it has had its time.
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, told).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_own_user_and_who_is_named() {
        let nobody = Access::default();
        let some = Access { uids: vec![1000], gids: vec![100], ..Access::default() };
        for (access, uid, gid, admitted) in [
            (&nobody, 0, 7, true),
            (&nobody, 42, 7, true),
            (&nobody, 1000, 100, false),
            (&nobody, 65534, 0, false),
            (&some, 1000, 7, true),
            (&some, 1001, 100, true),
            (&some, 1001, 101, false),
            (&some, 100, 1000, false),
        ] {
            assert_eq!(access.admits(42, uid, gid), admitted, "{uid} {gid}");
        }
    }
}
