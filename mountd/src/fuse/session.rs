//! A mount with a session that answers for it.

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use tokio::sync::watch;

use super::Shim;
use super::mount::{Mount, prepare};
use crate::mount_error::MountError;

/// Threads that read messages. They only hand them on.
const THREADS: usize = 2;

/// Longest wait for a session whose mount is gone. An overlay of somebody else keeps it alive.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A mount that is being served.
pub struct Serving {
    mount: Mount,
    ended: watch::Receiver<bool>,
    /// Closed when the session has ended.
    session: mpsc::Receiver<()>,
}

impl Serving {
    /// Mounts the store on a directory and serves it from threads of its own. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be used, or the kernel refuses.
    pub fn start(dir: &Path, shim: Shim) -> Result<Self, MountError> {
        let dir = prepare(dir)?;
        let (mut mount, device) = Mount::new(&dir)?;
        let served = serve(&dir, shim, device);
        let (ended, session) = match served {
            Ok(served) => served,
            Err(error) => {
                let _ = mount.unmount();
                return Err(error);
            }
        };
        if let Err(error) = mount.identify() {
            let _ = mount.unmount();
            return Err(error);
        }
        Ok(Self { mount, ended, session })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }

    /// Becomes true when the session ends, whoever ended it.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Unmounts, and waits a little for the session to end. Blocks.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stop(self) -> Result<(), MountError> {
        let detached = self.mount.unmount()?;
        // The kernel closes the connection with the last user of the mount.
        let wait = if detached { Duration::ZERO } else { END_TIMEOUT };
        if self.session.recv_timeout(wait) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!(mount = %self.dir().display(), "mount is in use, detached; its users get errors from now on");
        }
        Ok(())
    }
}

type Served = (watch::Receiver<bool>, mpsc::Receiver<()>);

fn serve(dir: &Path, shim: Shim, device: std::os::fd::OwnedFd) -> Result<Served, MountError> {
    let kernel = |operation| move |source| MountError::Kernel { operation, path: dir.to_owned(), source };
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    // A request that was read from a cloned descriptor would be lost with it.
    config.clone_fd = false;
    let session =
        Session::from_fd(shim, device, SessionACL::All, config).map_err(kernel("agree with the kernel on"))?;
    let (end, ended) = watch::channel(false);
    let (alive, session_ended) = mpsc::channel::<()>();
    let name = dir.display().to_string();
    let work = move || {
        let done: io::Result<()> = session.run();
        match done {
            Ok(()) => tracing::info!(mount = name, "session ended"),
            Err(error) => tracing::error!(mount = name, %error, "session ended"),
        }
        let _ = end.send(true);
        drop(alive);
    };
    std::thread::Builder::new().name("fuse-session".into()).spawn(work).map_err(kernel("serve"))?;
    Ok((ended, session_ended))
}
