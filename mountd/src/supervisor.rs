//! The process that keeps mounts while daemons come and go: `narlake-mounts`.
//!
//! It holds the kernel's side of every mount, so that the death of a daemon is a pause to whoever reads, and nothing more:
//! requests wait in the kernel, and those that the daemon had read are sent again to the next one. It mounts and unmounts
//! on behalf of the daemon, so that mounts are made in this process's namespace, whatever the daemon's.
//!
//! One daemon at a time has the lease ([`lease`]). It beats; one that stops beating is killed. While there is none for
//! longer than readers should wait, requests are answered with `EIO` ([`answer`]), until one comes. With a command to run
//! ([`child`]) this process is also the one that starts daemons; else a service manager is.
//!
//! It is small and does nothing with content, so that nothing a lake contains can bring it down. Threads, no runtime: each
//! connection has one, for as long as the kernel takes.

mod answer;
mod child;
mod dying;
mod lease;
mod requests;
mod state;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};
use tokio::signal::unix::{SignalKind, signal};

use self::state::State;
use crate::mount_error::MountError;
use crate::mounter::wire::Wire;
use crate::notify::notify;

/// Connections at once; further ones are closed.
const CONNECTIONS_MAX: usize = 64;

/// How often the state of affairs is looked at.
const TICK: Duration = Duration::from_millis(50);

/// How this process behaves.
#[derive(Clone, Debug)]
pub struct SupervisorSettings {
    /// Where daemons ask.
    pub socket: PathBuf,
    /// How long readers wait for a daemon before they get errors.
    pub patience: Duration,
    /// How long a daemon may be silent before it is killed.
    pub silence: Duration,
    /// What to start whenever there is no daemon; empty if somebody else does.
    pub command: Vec<String>,
}

/// Runs until SIGTERM or SIGINT; then unmounts everything.
///
/// # Errors
/// When the socket cannot be listened on.
pub fn run(settings: SupervisorSettings) -> Result<(), MountError> {
    let socket = settings.socket.clone();
    let failed = |operation| MountError::kernel(operation, &socket);
    let listener = listen_on(&socket).map_err(failed("listen on"))?;
    let stop = stop_signals().map_err(failed("take over signals for"))?;
    let state = State::new(settings.clone()).map_err(failed("read the mounts, to listen on"))?;
    let state = Arc::new(state);
    let mut child = child::Child::new(settings.command, settings.patience);
    let mut ready = false;
    tracing::info!(socket = %socket.display(), "holding mounts");
    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
        if let Some(wire) = next(&listener).map_err(failed("accept on"))? {
            serve(&state, wire);
        }
        if !ready {
            notify("READY=1").map_err(failed("tell the service manager of"))?;
            ready = true;
        }
        state.look_after(Instant::now());
        child.look_after(state.has_daemon(), Instant::now());
    }
    let _ = notify("STOPPING=1");
    child.stop();
    state.close();
    let _ = fs::remove_file(&socket);
    Ok(())
}

/// Serves a connection from a thread of its own, if there is room for one.
fn serve(state: &Arc<State>, wire: Wire) {
    if Arc::strong_count(state) > CONNECTIONS_MAX {
        tracing::warn!("too many connections at once, one closed");
        return;
    }
    let state = Arc::clone(state);
    let spawned = thread::Builder::new().name("supervisor".into()).spawn(move || requests::serve(&state, &wire));
    if let Err(error) = spawned {
        tracing::error!(%error, "start a thread for a connection");
    }
}

/// Waits a moment for the next connection.
fn next(listener: &OwnedFd) -> io::Result<Option<Wire>> {
    let tick = Timespec::try_from(TICK).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    match accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(socket) => Ok(Some(Wire::new(socket))),
        // The other side has gone, or descriptors are short: neither is a reason to let go of the mounts.
        Err(error) => {
            tracing::warn!(%error, "accept a connection");
            let _ = poll(&mut [], Some(&tick));
            Ok(None)
        }
    }
}

/// A socket that only this user reaches. One that nobody listens on any more is replaced.
fn listen_on(path: &Path) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if Wire::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another supervisor listens here"));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&socket, i32::try_from(CONNECTIONS_MAX).unwrap_or(i32::MAX))?;
    Ok(socket)
}

/// Becomes true when this process is told to stop.
fn stop_signals() -> io::Result<Arc<std::sync::atomic::AtomicBool>> {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        told.store(true, std::sync::atomic::Ordering::SeqCst);
    })?;
    Ok(stop)
}
