//! The Nix socket of one view.
//!
//! It is there from before the view is mounted until after it is unmounted, and its file goes with it.

use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::mount_error::MountError;
use crate::nix_socket::{Access, NixSocket};

/// A socket that nobody answers on yet. Its file goes when this is dropped.
pub(super) struct Listening {
    listener: UnixListener,
    file: SocketFile,
}

/// A socket that is answered on.
pub(super) struct Answering {
    stop: CancellationToken,
    task: JoinHandle<()>,
    _file: SocketFile,
}

struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether a view's socket can have this path: Nix is told of it inside a URL, which it decodes more than once, and puts
/// parts of into a regular expression.
pub(super) fn check(path: &Path) -> Result<(), &'static str> {
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/_.-".contains(&byte));
    if !path.is_absolute() || !path.to_str().is_some_and(plain) {
        return Err(
            "has a Nix socket with a path that is not absolute, or of other characters than A-Z a-z 0-9 / _ . -",
        );
    }
    Ok(())
}

/// Makes the socket. In the context of a runtime.
pub(super) fn listen(access: &Access, path: PathBuf) -> Result<Listening, MountError> {
    let listener = access.listen(&path).map_err(MountError::kernel("listen on", &path))?;
    Ok(Listening { listener, file: SocketFile(path) })
}

impl Listening {
    pub(super) fn serve(self, nix: NixSocket) -> Answering {
        let stop = CancellationToken::new();
        let task = tokio::spawn(nix.serve(self.listener, stop.clone()));
        Answering { stop, task, _file: self.file }
    }
}

impl Answering {
    /// Ends all connections, and removes the socket.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        // Nothing in there waits for anything once it is told to stop.
        let _ = self.task.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_nix_would_misread() {
        for bad in ["nix.sock", "", "/run/a b", "/run/a%20", "/run/a&b", "/run/a?b", "/run/a*", "/run/\u{e9}"] {
            assert!(check(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(check(Path::new("/run/narlake/job-1.sock")).is_ok());
    }
}
