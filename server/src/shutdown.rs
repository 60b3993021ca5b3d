//! When to stop, and telling the service manager how far we are.
//!
//! A stop is asked for by SIGTERM or SIGINT. What is under way then has `limits.drain_s` to end; a second signal ends
//! the wait. systemd is told over the datagram socket in `NOTIFY_SOCKET` (sd_notify(3), a protocol of a few lines, so
//! it is spoken here rather than linked).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tokio::signal::unix::{Signal, SignalKind, signal};

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

    #[test]
    fn a_socket_that_is_gone_is_an_error_and_no_panic() {
        assert!(send(OsStr::new("/nonexistent/notify"), Phase::Ready).is_err());
    }
}
