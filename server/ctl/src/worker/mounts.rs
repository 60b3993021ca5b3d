//! The step that has narlake-mounts and narlake-mountd run: the view is mounted, the sockets answer.

use std::time::Duration;

use async_trait::async_trait;
use narlake_format::api::control::{ControlRequest, ControlResponse, MountStatus};
use tokio::time::{Instant, sleep};

use super::error::WorkerError;
use super::process::{Daemon, Process};
use super::record::Record;
use super::settings::{Manager, Settings};
use super::step::{State, Step};
use super::systemd::{is_active, systemctl};
use super::units;
use crate::control::{self, ControlError};

/// How long mountd may take to answer: out of memory.
const ANSWER: Duration = Duration::from_secs(10);

/// How long it may take to start: it looks through its cache's directory, and asks its server.
const START: Duration = Duration::from_secs(60);

/// How long stopping may take: everything is unmounted, and the cache left in order.
const STOP: Duration = Duration::from_secs(60);

/// Between two looks at whether it has come.
const LOOK: Duration = Duration::from_millis(50);

/// The supervisor and the daemon.
pub(super) struct Mounts {
    settings: Settings,
    daemon: Daemon,
}

/// What mountd says of itself.
pub(super) async fn ask(settings: &Settings) -> Result<MountStatus, ControlError> {
    match control::ask(&settings.control(), &ControlRequest::Status, ANSWER).await? {
        ControlResponse::Status(status) => Ok(*status),
        _ => Err(ControlError::Mismatch),
    }
}

impl Mounts {
    pub(super) const NAME: &str = "mountd";

    pub(super) fn new(settings: &Settings) -> Self {
        let programs = &settings.programs;
        let command = vec![
            programs.mounts.clone().into(),
            "--socket".into(),
            settings.supervisor().into(),
            "--".into(),
            programs.mountd.clone().into(),
            "run".into(),
            "--config".into(),
            settings.mountd_conf().into(),
        ];
        let daemon = Daemon {
            name: "narlake-mounts",
            command,
            pid_file: settings.pid_file("mounts"),
            log: settings.log("mounts"),
        };
        Self { settings: settings.clone(), daemon }
    }

    async fn runs(&self) -> bool {
        match self.settings.manager {
            Manager::Systemd => is_active(units::UNITS[0]).await && is_active(units::UNITS[1]).await,
            Manager::Own => self.daemon.running().is_some(),
        }
    }

    /// Waits until mountd answers, and is not the process that it was.
    async fn wait(&self, but: Option<u32>) -> Result<(), WorkerError> {
        let until = Instant::now() + START;
        loop {
            match ask(&self.settings).await {
                Ok(status) if Some(status.pid) != but && status.mount == self.settings.view() => return Ok(()),
                Ok(status) if status.mount != self.settings.view() => {
                    let reason = format!("another narlake-mountd answers on {}", self.settings.control().display());
                    return Err(WorkerError::refused(reason, "stop it, or give another --run-dir"));
                }
                _ => {}
            }
            if !self.runs().await && self.settings.manager == Manager::Own {
                return Err(self.daemon.ended());
            }
            if Instant::now() >= until {
                return Err(self.daemon.late(START.as_secs()));
            }
            sleep(LOOK).await;
        }
    }

    /// Has the daemon read its settings again. Mounts stay, readers wait.
    pub(super) async fn reload(&self) -> Result<(), WorkerError> {
        let Ok(status) = ask(&self.settings).await else { return Ok(()) };
        match self.settings.manager {
            Manager::Systemd => systemctl(&["restart", units::UNITS[1]]).await?,
            Manager::Own => {
                let process = Process::of(status.pid);
                let stop = move || process.map_or(Ok(true), |process| process.stop(STOP));
                let stopped = tokio::task::spawn_blocking(stop).await.map_err(std::io::Error::other);
                stopped.flatten().map_err(WorkerError::system("stop the daemon of", &self.settings.control()))?;
            }
        }
        self.wait(Some(status.pid)).await
    }
}

#[async_trait]
impl Step for Mounts {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn check(&self) -> State {
        match (self.runs().await, ask(&self.settings).await) {
            (true, Ok(status)) if status.mount == self.settings.view() => State::Up,
            (false, Err(_)) => State::Down,
            (true, Err(error)) => State::Broken(format!("it runs and does not answer: {error}")),
            (_, Ok(status)) if status.mount != self.settings.view() => {
                State::Broken(format!("another one answers, whose view is {}", status.mount.display()))
            }
            (_, Ok(_)) => State::Broken("it answers, and was not started by `narlake worker up`".to_owned()),
        }
    }

    async fn apply(&self, _: &mut Record) -> Result<Vec<String>, WorkerError> {
        match self.settings.manager {
            Manager::Systemd => {
                systemctl(&["daemon-reload"]).await?;
                systemctl(&["enable", "--now", units::UNITS[0], units::UNITS[1]]).await?;
            }
            Manager::Own => {
                if self.daemon.running().is_none() {
                    if ask(&self.settings).await.is_ok() {
                        let reason = format!("a narlake-mountd answers on {}", self.settings.control().display());
                        return Err(WorkerError::refused(reason, "stop it: `narlake worker up` starts its own"));
                    }
                    self.daemon.start(&self.settings.programs.narlake)?;
                }
            }
        }
        self.wait(None).await.map(|()| Vec::new())
    }

    async fn undo(&self, _: &mut Record, _: bool) -> Result<Vec<String>, WorkerError> {
        match self.settings.manager {
            Manager::Systemd => {
                for unit in units::UNITS.into_iter().rev() {
                    if self.settings.units_dir.join(unit).exists() {
                        systemctl(&["disable", "--now", unit]).await?;
                    }
                }
            }
            Manager::Own => self.daemon.stop(STOP).await?,
        }
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[tokio::test]
    async fn nothing_runs_yet() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let step = Mounts::new(&settings);
        assert_eq!(step.check().await, State::Down);
        assert!(step.undo(&mut Record::new(settings), false).await.unwrap().is_empty());
    }
}
