//! The daemon, where this process is the one to start it.

use std::process::{Child as Process, Command};
use std::time::{Duration, Instant};

use super::lease::{Lease, ends_within};

/// First pause before a daemon that has failed is started again, after one start without any; it doubles up to the next.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A daemon that has run this long is no failure: the next start has no pause again.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// The least time that one has to come, however short the patience of readers.
const COME_MIN: Duration = Duration::from_secs(10);

/// Longest wait for a daemon that was told to go when this process does.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// What is started whenever there is no daemon.
pub(super) struct Child {
    /// Empty if somebody else starts it.
    command: Vec<String>,
    /// How long one may run without there being a daemon.
    patience: Duration,
    process: Option<(Process, Instant)>,
    /// When there was a daemon last, or this one was started.
    seen: Instant,
    /// It was killed for not coming.
    killed: bool,
    /// It has been the daemon.
    served: bool,
    pause: Duration,
    next: Instant,
}

impl Child {
    pub(super) fn new(command: Vec<String>, patience: Duration) -> Self {
        let (now, patience) = (Instant::now(), patience.max(COME_MIN));
        let (process, served, killed, pause) = (None, false, false, Duration::ZERO);
        Self { command, patience, process, seen: now, killed, served, pause, next: now }
    }

    /// Starts the daemon if there is none and its time has come. One that somebody else has started is left alone. One
    /// that was started here and hangs before it becomes the daemon is killed: nobody else looks for its beats.
    pub(super) fn look_after(&mut self, has_daemon: bool, now: Instant) {
        self.served |= has_daemon && self.process.is_some();
        if has_daemon {
            self.seen = now;
        }
        if let Some((process, began)) = &mut self.process {
            match process.try_wait() {
                Ok(None) => {
                    let missed = now.saturating_duration_since(self.seen);
                    if missed > self.patience && !std::mem::replace(&mut self.killed, true) {
                        let after_s = missed.as_secs();
                        tracing::error!(
                            pid = process.id(),
                            after_s,
                            "the daemon that was started here does not come, killed"
                        );
                        if let Err(error) = process.kill() {
                            tracing::error!(%error, "kill the daemon");
                        }
                    }
                    return;
                }
                Ok(Some(status)) => tracing::warn!(%status, "the daemon that was started here has ended"),
                Err(error) => tracing::error!(%error, "wait for the daemon"),
            }
            // One that has served is wanted back at once: what kills each of them is found out by its requests.
            if self.served || now.saturating_duration_since(*began) >= GOOD_RUN {
                self.pause = Duration::ZERO;
            }
            self.served = false;
            self.next = now + self.pause;
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
            self.process = None;
        }
        let Some((program, arguments)) = self.command.split_first() else { return };
        if has_daemon || now < self.next {
            return;
        }
        match Command::new(program).args(arguments).spawn() {
            Ok(process) => {
                self.process = Some((process, now));
                (self.seen, self.killed) = (now, false);
            }
            Err(error) => {
                tracing::error!(program, %error, "start the daemon");
                self.next = now + PAUSE_MAX;
            }
        }
    }

    /// Has the daemon stop.
    pub(super) fn stop(self) {
        let Some((mut process, _)) = self.process else { return };
        if let Ok(lease) = Lease::new(process.id()) {
            let until = Instant::now() + STOP_TIMEOUT;
            lease.retire(until);
            if lease.process().is_ok_and(|process| ends_within(&process, STOP_TIMEOUT)) {
                let _ = process.wait();
                return;
            }
        }
        let _ = process.kill();
        let _ = process.wait();
    }
}
