//! When to stop, and telling the service manager how far we are.
//!
//! A stop is asked for by SIGTERM or SIGINT. What is under way then has `limits.drain_s` to end, and the lake as long
//! again to be closed; a second signal ends the wait. No part of a stop waits without a limit: a bucket that does not
//! answer must not keep the process. systemd is told over the datagram socket in `NOTIFY_SOCKET` (sd_notify(3), a protocol of a few lines, so
//! it is spoken here rather than linked).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Longest time for threads to end when everything else has.
const RUNTIME_END: Duration = Duration::from_secs(5);

/// The signals that ask for a stop.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Starts to listen for the signals; from here on they no longer end the process by themselves.
    ///
    /// # Errors
    /// Where the system refuses the handlers.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one. Cancel safe.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The outcome of some work if it ends within a time, also where it blocks the thread that it runs on. What does not
/// goes on until the runtime ends.
pub async fn in_time<T: Send + 'static>(limit: Duration, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    match tokio::time::timeout(limit, tokio::spawn(work)).await {
        Ok(Ok(outcome)) => Some(outcome),
        Ok(Err(error)) => {
            tracing::error!(%error, "work for the stop broke off");
            None
        }
        Err(_) => None,
    }
}

/// Ends the runtime: at once after a failure or a second signal, else with a moment for what still runs.
pub fn end(runtime: Runtime, orderly: bool) {
    if !orderly {
        runtime.shutdown_background();
        return;
    }
    let tasks = runtime.metrics().num_alive_tasks();
    let start = Instant::now();
    runtime.shutdown_timeout(RUNTIME_END);
    if start.elapsed() >= RUNTIME_END {
        tracing::warn!(tasks, "leaving threads that did not end in time");
    }
}

/// How far the service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It answers requests.
    Ready,
    /// It is draining.
    Stopping,
}

/// Tells the service manager, if there is one. That it cannot be told is logged, and changes nothing else.
pub fn notify(phase: Phase) {
    let Some(address) = env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&address, phase) {
        tracing::warn!(socket = %address.to_string_lossy(), %error, ?phase, "cannot tell the service manager");
    }
}

fn send(address: &OsStr, phase: Phase) -> io::Result<()> {
    let message = match phase {
        Phase::Ready => "READY=1\n",
        Phase::Stopping => "STOPPING=1\n",
    };
    // A leading @ stands for the abstract name space, whose names start with a zero byte.
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(socket: &UnixDatagram, address: &OsStr) {
        let mut buffer = [0; 64];
        for (phase, expect) in [(Phase::Ready, "READY=1\n"), (Phase::Stopping, "STOPPING=1\n")] {
            send(address, phase).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(str::from_utf8(&buffer[..length]), Ok(expect));
        }
    }

    #[test]
    fn both_kinds_of_sockets_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        check(&UnixDatagram::bind(&path).unwrap(), path.as_os_str());

        let name = format!("narlake-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        check(&UnixDatagram::bind_addr(&address).unwrap(), OsStr::new(&format!("@{name}")));
    }

    /// A bucket that does not answer, and a disk that keeps a thread.
    #[test]
    fn a_stop_does_not_wait_for_ever() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (_disk, never) = std::sync::mpsc::channel::<()>();
        let start = Instant::now();
        let limit = Duration::from_millis(100);
        runtime.block_on(async {
            assert_eq!(in_time(limit, async { 1 }).await, Some(1));
            assert_eq!(in_time(limit, std::future::pending::<()>()).await, None);
            let disk = async move { never.recv_timeout(RUNTIME_END * 20).is_ok() };
            assert_eq!(in_time(limit, disk).await, None);
        });
        assert!(start.elapsed() < RUNTIME_END);
        end(runtime, true);
        assert!((RUNTIME_END..RUNTIME_END * 2).contains(&start.elapsed()));
    }

    #[test]
    fn a_socket_that_is_gone_is_an_error_and_no_panic() {
        assert!(send(OsStr::new("/nonexistent/notify"), Phase::Ready).is_err());
    }
}
