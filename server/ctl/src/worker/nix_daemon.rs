//! The step that has Nix's daemon use the overlay. It alone does: its clients are told to ask it (`files`).
//!
//! That a socket takes connections says little: the daemon opens its store only then. So it is greeted, as a client
//! would, and has to greet back.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use super::error::WorkerError;
use super::process::Daemon;
use super::record::Record;
use super::settings::{Manager, Settings};
use super::step::{State, Step};
use super::systemd::{is_active, main_pid, systemctl};
use super::units;

/// What opens the conversation of Nix's protocol, and what is answered.
const HELLO: u64 = 0x6e69_7863;
const WELCOME: u64 = 0x6478_696f;
/// Version 1.35, which every Nix that has overlays speaks.
const PROTOCOL: u64 = 0x0123;

/// How long a greeting may take.
const GREETING: Duration = Duration::from_secs(10);

/// How long the daemon may take to start, or to stop.
const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(30);

/// Between two looks at whether it has come.
const LOOK: Duration = Duration::from_millis(50);

const SERVICE: &str = "nix-daemon.service";
const SOCKET: &str = "nix-daemon.socket";

/// The daemon.
pub(super) struct NixDaemon {
    settings: Settings,
    daemon: Daemon,
}

impl NixDaemon {
    pub(super) const NAME: &str = "nix-daemon";

    pub(super) fn new(settings: &Settings) -> Self {
        let program = settings.programs.nix_daemon.clone().unwrap_or_default();
        let daemon = Daemon {
            name: "nix-daemon",
            command: vec![program.into(), "--store".into(), settings.store_uri().into()],
            pid_file: settings.pid_file("nix-daemon"),
            log: settings.log("nix-daemon"),
        };
        Self { settings: settings.clone(), daemon }
    }

    /// The process that takes connections, if it runs.
    pub(super) async fn pid(&self) -> Option<u32> {
        match self.settings.manager {
            Manager::Systemd => main_pid(SERVICE).await,
            Manager::Own => self.daemon.running().map(|process| process.pid),
        }
    }

    /// Whether the units have it use the overlay.
    fn is_configured(&self) -> bool {
        self.settings.units_dir.join(units::DROP_IN).exists()
    }

    async fn wait(&self) -> Result<(), WorkerError> {
        let until = Instant::now() + START;
        while !greets(&self.settings.nix_daemon_socket()).await {
            if self.settings.manager == Manager::Own && self.daemon.running().is_none() {
                return Err(self.daemon.ended());
            }
            if Instant::now() >= until {
                return Err(self.daemon.late(START.as_secs()));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Has Nix's daemon go on as before the worker, once nothing of the worker is left.
    ///
    /// # Errors
    /// When it does not start.
    pub(super) async fn give_back(&self, record: &mut Record) -> Result<(), WorkerError> {
        if self.settings.manager != Manager::Systemd {
            return Ok(());
        }
        systemctl(&["daemon-reload"]).await?;
        for unit in &record.stopped {
            systemctl(&["start", unit]).await?;
        }
        record.stopped.clear();
        record.save()
    }
}

#[async_trait]
impl Step for NixDaemon {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn check(&self) -> State {
        let runs = match self.settings.manager {
            Manager::Systemd => self.is_configured() && (is_active(SERVICE).await || is_active(SOCKET).await),
            Manager::Own => self.daemon.running().is_some(),
        };
        match (runs, runs && greets(&self.settings.nix_daemon_socket()).await) {
            (false, _) => State::Down,
            (true, true) => State::Up,
            (true, false) => State::Broken(format!("it does not open its store; {}", self.where_to_look())),
        }
    }

    async fn apply(&self, _: &mut Record) -> Result<Vec<String>, WorkerError> {
        match self.settings.manager {
            Manager::Systemd => {
                systemctl(&["daemon-reload"]).await?;
                systemctl(&["restart", SERVICE]).await?;
            }
            Manager::Own => {
                if self.daemon.running().is_some() {
                    self.daemon.stop(STOP).await?;
                }
                let socket = self.settings.nix_daemon_socket();
                if UnixStream::connect(&socket).await.is_ok() {
                    let reason = format!("a nix-daemon that narlake did not start answers on {}", socket.display());
                    return Err(WorkerError::refused(
                        reason,
                        "stop it, or give --no-daemon and start it with the --store that is printed",
                    ));
                }
                self.daemon.start(&self.settings.programs.narlake)?;
            }
        }
        self.wait().await.map(|()| Vec::new())
    }

    async fn undo(&self, record: &mut Record, _: bool) -> Result<Vec<String>, WorkerError> {
        match self.settings.manager {
            Manager::Systemd => {
                if !self.is_configured() {
                    return Ok(Vec::new());
                }
                // The socket first: a client that comes now would start it again.
                for unit in [SOCKET, SERVICE] {
                    if is_active(unit).await {
                        if !record.stopped.iter().any(|stopped| stopped == unit) {
                            record.stopped.push(unit.to_owned());
                            record.save()?;
                        }
                        systemctl(&["stop", unit]).await?;
                    }
                }
                Ok(Vec::new())
            }
            Manager::Own => {
                let ran = self.daemon.running().is_some();
                self.daemon.stop(STOP).await?;
                let note = "Nix's daemon is stopped; start it as before, without --store";
                Ok(if ran { vec![note.to_owned()] } else { Vec::new() })
            }
        }
    }
}

impl NixDaemon {
    fn where_to_look(&self) -> String {
        match self.settings.manager {
            Manager::Systemd => format!("`journalctl -u {SERVICE}` says why"),
            Manager::Own => format!("{} says why", self.daemon.log.display()),
        }
    }
}

/// Whether a daemon greets back.
async fn greets(socket: &Path) -> bool {
    let greeting = async {
        let mut stream = UnixStream::connect(socket).await?;
        let hello: Vec<u8> = [HELLO, PROTOCOL].into_iter().flat_map(u64::to_le_bytes).collect();
        stream.write_all(&hello).await?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(u64::from_le_bytes(answer) == WELCOME)
    };
    matches!(timeout(GREETING, greeting).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// A daemon that answers with these bytes, and closes.
    async fn check(answer: &'static [u8], expected: bool) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 16];
            stream.read_exact(&mut hello).await.unwrap();
            assert_eq!(&hello[..8], &HELLO.to_le_bytes());
            stream.write_all(answer).await.unwrap();
        });
        assert_eq!(greets(&socket).await, expected, "{answer:?}");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn greetings() {
        check(b"oixd\0\0\0\0", true).await;
        check(b"oixd", false).await;
        check(b"", false).await;
        check(b"HTTP/1.1 400", false).await;
        assert!(!greets(Path::new("/nowhere/socket")).await);
    }
}
