//! The one process that is the daemon.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::dying::is_dying;

/// A process, held so that its number cannot come to mean another.
pub(super) struct Lease {
    pub(super) pid: u32,
    process: OwnedFd,
    /// When it became the daemon.
    pub(super) since: Instant,
    /// When it last said that it is alive.
    pub(super) beaten: Instant,
    /// It has been told to go.
    told: Cell<bool>,
    /// It has been killed from here.
    killed: Cell<bool>,
}

impl Lease {
    pub(super) fn new(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let (process, now) = (pidfd_open(number, PidfdFlags::empty())?, Instant::now());
        let (told, killed) = (Cell::new(false), Cell::new(false));
        Ok(Self { pid, process, since: now, beaten: now, told, killed })
    }

    /// Whether the process has ended, with all that it held.
    pub(super) fn is_gone(&self) -> bool {
        ends_within(&self.process, Duration::ZERO)
    }

    /// The process, to wait for with [`ends_within`].
    pub(super) fn process(&self) -> io::Result<OwnedFd> {
        self.process.try_clone()
    }

    /// Has it stop in order, or, once the time is up, at once. Returns without waiting for either.
    pub(super) fn retire(&self, until: Instant) {
        if Instant::now() >= until {
            self.kill();
        } else if !self.told.replace(true) {
            self.signal(Signal::TERM);
        }
    }

    /// Kills it. False if it has been killed from here already.
    pub(super) fn kill(&self) -> bool {
        let first = !self.killed.replace(true);
        if first {
            self.signal(Signal::KILL);
        }
        first
    }

    /// Whether it has been killed, by whomever, and has not ended.
    pub(super) fn is_dying(&self) -> bool {
        !self.is_gone() && is_dying(self.pid)
    }

    fn signal(&self, signal: Signal) {
        // Gone already is as good.
        if let Err(error) = pidfd_send_signal(&self.process, signal) {
            tracing::debug!(pid = self.pid, %error, "signal the daemon");
        }
    }
}

/// Whether a process, given as a descriptor, ends within this time.
pub(super) fn ends_within(process: &OwnedFd, limit: Duration) -> bool {
    let mut process = [PollFd::new(process, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    poll(&mut process, Some(&limit)).is_ok_and(|found| found > 0)
}
