//! A mount with a session that answers for it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use fuser::{Config, SessionACL};
use tokio::sync::watch;

use super::mount::Mount;
use super::{Shim, resume};
use crate::mount_error::MountError;
use crate::mounter::{Connection, Mounter};

/// Threads that read messages. They only hand them on.
const THREADS: usize = 2;

/// Longest wait for a session whose mount is gone. An overlay of somebody else keeps it alive.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A mount that is being served.
pub struct Serving {
    mounter: Mounter,
    name: String,
    dir: PathBuf,
    mount: Option<Mount>,
    end: Arc<watch::Sender<bool>>,
    /// Closed when the session has ended.
    session: mpsc::Receiver<()>,
}

impl Serving {
    /// Mounts the store on a directory, or goes on with the mount of an earlier daemon, and serves it from threads of its
    /// own. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be used, or the kernel refuses.
    pub fn start(mounter: Mounter, name: &str, dir: &Path, shim: Shim) -> Result<Self, MountError> {
        Self::start_with(mounter, name, dir, shim, THREADS)
    }

    /// The same, with this number of threads.
    ///
    /// # Errors
    /// As [`Serving::start`].
    pub fn start_with(
        mounter: Mounter,
        name: &str,
        dir: &Path,
        shim: Shim,
        threads: usize,
    ) -> Result<Self, MountError> {
        let connection = mounter.connect(name, dir)?;
        if connection.resumed {
            tracing::info!(mount = %connection.dir.display(), "going on with the mount of an earlier daemon");
        }
        let served = serve(&connection.dir, shim, &connection, threads);
        let Connection { name, dir, mount, .. } = connection;
        match served {
            Ok((end, session)) => Ok(Self { mounter, name, dir, mount, end, session }),
            Err(error) => {
                let _ = mounter.disconnect(&name, mount.as_ref(), true);
                Err(error)
            }
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Becomes true when the session ends, whoever ended it, or its mount is found to be gone ([`Seat::vacate`]).
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.end.subscribe()
    }

    /// Its place among the mounts, for whoever sees to it that it is kept ([`crate::alive`]).
    #[must_use]
    pub fn seat(&self) -> Seat {
        let (name, dir) = (self.name.clone(), self.dir.clone());
        Seat { name, dir, mount: self.mount.clone(), end: Arc::clone(&self.end) }
    }

    /// Unmounts, and waits a little for the session to end. Blocks.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stop(self) -> Result<(), MountError> {
        self.leave(true)
    }

    /// The same; in use, it is detached only if `lazy` is set. Blocks.
    ///
    /// # Errors
    /// When the kernel refuses, or it is in use: then it is served as before.
    pub fn leave(&self, lazy: bool) -> Result<(), MountError> {
        let detached = self.mounter.disconnect(&self.name, self.mount.as_ref(), lazy)?;
        // The kernel closes the connection with the last user of the mount.
        let wait = if detached { Duration::ZERO } else { END_TIMEOUT };
        if self.session.recv_timeout(wait) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!(mount = %self.dir.display(), "mount is in use, detached; its users get errors from now on");
        }
        Ok(())
    }
}

/// Where a mount that is being served is to be found.
#[derive(Clone)]
pub struct Seat {
    /// The connection's name.
    pub name: String,
    /// The directory.
    pub dir: PathBuf,
    /// The mount, where this process made it, and has it in its namespace.
    pub mount: Option<Mount>,
    end: Arc<watch::Sender<bool>>,
}

impl Seat {
    /// Says that the mount is on its directory no more: to those who listen it is as if the session had ended, though it
    /// lasts as long as somebody has a file open.
    pub fn vacate(&self) {
        self.end.send_replace(true);
    }
}

type Served = (Arc<watch::Sender<bool>>, mpsc::Receiver<()>);

fn serve(dir: &Path, mut shim: Shim, connection: &Connection, threads: usize) -> Result<Served, MountError> {
    let kernel = |operation| move |source| MountError::Kernel { operation, path: dir.to_owned(), source };
    shim.set_resent(connection.resent.clone());
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    // A request that was read from a cloned descriptor would be lost with it.
    config.clone_fd = false;
    let session = resume::resume(shim, &connection.device, &connection.agreement, config)
        .map_err(kernel("begin a session on"))?;
    // Before the first message is read: what comes again is marked, and nothing is worked on twice.
    if connection.resumed && connection.agreement.has_resend() {
        resume::ask_again(&connection.device).map_err(kernel("ask for what an earlier daemon left undone on"))?;
    }
    let end = Arc::new(watch::Sender::new(false));
    let ended = Arc::clone(&end);
    let (alive, session_ended) = mpsc::channel::<()>();
    let name = dir.display().to_string();
    let work = move || {
        let done: io::Result<()> = session.run();
        match done {
            Ok(()) => tracing::info!(mount = name, "session ended"),
            Err(error) => tracing::error!(mount = name, %error, "session ended"),
        }
        ended.send_replace(true);
        drop(alive);
    };
    std::thread::Builder::new().name("fuse-session".into()).spawn(work).map_err(kernel("serve"))?;
    Ok((end, session_ended))
}
