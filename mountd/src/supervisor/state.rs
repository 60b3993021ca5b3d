//! What is held: connections, what daemons keep here, and who has the lease.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use narlake_format::error::chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};

use super::answer::Answering;
use super::lease::{Lease, ends_within};
use super::{SupervisorSettings, dying};
use crate::fuse::init::Agreement;
use crate::fuse::mount::{self, Mount};
use crate::mount_error::MountError;
use crate::mountinfo::Watch;

/// Most FUSE connections held.
const CONNECTIONS_MAX: usize = 1024;

/// Most things kept for the next daemon.
const KEPT_MAX: usize = 4096;

/// Longest time in which a daemon that was told to go, or killed, is to be gone.
pub(super) const GO_TIMEOUT: Duration = Duration::from_secs(15);

/// How often it is looked after a daemon that is to go.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often it is looked whether mounts are where they were made.
const MOUNTS_EVERY: Duration = Duration::from_secs(1);

/// A daemon that lives shorter than this does not count as one that has come.
const SERVED_MIN: Duration = Duration::from_secs(1);

pub(super) struct State {
    settings: SupervisorSettings,
    // Held for a look or a change. Mounting is done under `mounting` instead, since it may take the kernel long.
    held: Mutex<Held>,
    mounting: Mutex<()>,
}

struct Held {
    connections: BTreeMap<String, Connection>,
    kept: BTreeMap<String, Kept>,
    lease: Option<Lease>,
    /// When the last daemon that served went, or this process began.
    alone_since: Instant,
    answering: Option<Answering>,
    mounts: Watch,
    /// When they were looked at.
    mounts_seen: Instant,
}

struct Connection {
    mount: Mount,
    device: OwnedFd,
    agreement: Agreement,
    /// See [`crate::fuse::resent`].
    notes: OwnedFd,
    /// Its mount is on its directory no more.
    gone: bool,
}

struct Kept {
    text: String,
    descriptors: Vec<OwnedFd>,
}

/// A connection, to be handed to a daemon.
pub(super) struct Handed {
    pub(super) agreement: Agreement,
    pub(super) descriptors: [OwnedFd; 2],
    pub(super) resumed: bool,
}

impl State {
    pub(super) fn new(settings: SupervisorSettings) -> io::Result<Self> {
        let (connections, kept, now) = (BTreeMap::new(), BTreeMap::new(), Instant::now());
        let (mounts, mounts_seen) = (Watch::new()?, now);
        let held = Held { connections, kept, lease: None, alone_since: now, answering: None, mounts, mounts_seen };
        Ok(Self { settings, held: Mutex::new(held), mounting: Mutex::default() })
    }

    pub(super) fn has_daemon(&self) -> bool {
        self.held().lease.is_some()
    }

    /// How often a daemon is to beat: so that a few may be late.
    pub(super) fn beat(&self) -> Duration {
        self.settings.silence / 5
    }

    /// Gives the lease to this process, once the one that has it is gone.
    pub(super) fn lease(&self, pid: u32, takeover: bool) -> Result<(Vec<String>, Vec<String>), MountError> {
        let failed = |operation| MountError::kernel(operation, &self.settings.socket);
        let lease = Lease::new(pid).map_err(failed("watch the daemon that asks on"))?;
        let until = Instant::now() + GO_TIMEOUT;
        let mut held = self.held();
        while let Some(other) = &held.lease {
            if !other.is_gone() {
                if !takeover {
                    let reason = format!("process {} is the daemon; stop it, or start with --takeover", other.pid);
                    return Err(MountError::refused(&self.settings.socket, reason));
                }
                other.retire(until);
            }
            let process = other.process().map_err(failed("watch the daemon that is to go for"))?;
            drop(held);
            // Not for long: somebody else may have taken the lease meanwhile, and killing has to be done in time.
            ends_within(&process, LOOK_EVERY);
            held = self.held();
            held.reap(Instant::now());
        }
        // Before anything is handed over: two readers would share what comes.
        if let Some(answering) = held.answering.take() {
            answering.stop();
        }
        tracing::info!(pid, after_ms = millis(held.alone_since.elapsed()), "daemon has come");
        held.lease = Some(lease);
        let before = held.connections.len();
        held.look_at_mounts();
        held.connections.retain(|name, connection| {
            let alive = connection.is_alive();
            if !alive {
                tracing::error!(name, "a connection was aborted; its mount is made anew");
                let _ = connection.mount.unmount();
            } else if connection.gone {
                // It ends when nobody holds it any more: whoever has a file of it open gets errors.
                tracing::error!(name, "a mount was taken away; it is made anew");
            }
            alive && !connection.gone
        });
        if held.connections.len() < before {
            // Overlays lie over a file system, not over a place: over one that is gone they are of no use.
            held.kept.retain(|key, _| overlay_of(key).is_none());
        }
        Ok((held.connections.keys().cloned().collect(), held.kept.keys().cloned().collect()))
    }

    /// The process that has the lease is alive.
    pub(super) fn beats(&self, pid: u32) -> bool {
        match self.held().lease.as_mut().filter(|lease| lease.pid == pid) {
            Some(lease) => {
                lease.beaten = Instant::now();
                true
            }
            None => false,
        }
    }

    /// Names of the connections whose mounts are on their directories no more.
    pub(super) fn gone(&self) -> Vec<String> {
        let held = self.held();
        let gone = held.connections.iter().filter(|(_, connection)| connection.gone);
        gone.map(|(name, _)| name.clone()).collect()
    }

    /// Whether this process has the lease.
    pub(super) fn is_daemon(&self, pid: u32) -> bool {
        self.held().lease.as_ref().is_some_and(|lease| lease.pid == pid)
    }

    /// The connection of this name, mounted now if there is none.
    pub(super) fn connect(&self, name: &str, dir: &Path) -> Result<Handed, MountError> {
        let _turn = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |operation| MountError::kernel(operation, dir);
        if let Some(connection) = self.held().connections.get(name) {
            if connection.mount.dir() != dir {
                let reason = format!("{name} is mounted on {}", connection.mount.dir().display());
                return Err(MountError::refused(dir, reason));
            }
            return connection.hand(true).map_err(failed("hand over"));
        }
        if self.held().connections.len() >= CONNECTIONS_MAX {
            return Err(MountError::refused(dir, format!("{CONNECTIONS_MAX} connections are held already")));
        }
        let notes = memfd_create("narlake-resent", MemfdFlags::CLOEXEC);
        let notes = notes.map_err(|error| failed("keep notes about")(error.into()))?;
        let dir = mount::prepare(dir)?;
        let (mount, device, agreement) = Mount::new(&dir)?;
        let connection = Connection { mount, device, agreement, notes, gone: false };
        let handed = connection.hand(false);
        self.held().connections.insert(name.to_owned(), connection);
        tracing::info!(name, dir = %dir.display(), "mounted");
        handed.map_err(MountError::kernel("hand over", &dir))
    }

    /// Unmounts the connection of this name. True if it was in use and had to be detached.
    pub(super) fn disconnect(&self, name: &str, lazy: bool) -> Result<bool, MountError> {
        let _turn = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = self.held().connections.remove(name);
        let connection = connection.ok_or_else(|| MountError::Unknown { path: name.into() })?;
        let detached = connection.mount.leave(lazy);
        if detached.is_err() {
            self.held().connections.insert(name.to_owned(), connection);
        }
        detached
    }

    pub(super) fn keep(&self, key: String, text: String, descriptors: Vec<OwnedFd>) -> Result<(), MountError> {
        let mut held = self.held();
        if held.kept.len() >= KEPT_MAX && !held.kept.contains_key(&key) {
            return Err(MountError::refused(Path::new(&key), format!("{KEPT_MAX} things are kept already")));
        }
        held.kept.insert(key, Kept { text, descriptors });
        Ok(())
    }

    pub(super) fn forget(&self, key: &str) {
        self.held().kept.remove(key);
    }

    pub(super) fn take(&self, key: &str) -> Result<(String, Vec<OwnedFd>), MountError> {
        let held = self.held();
        let kept = held.kept.get(key).ok_or_else(|| MountError::Unknown { path: key.into() })?;
        let descriptors: io::Result<Vec<OwnedFd>> = kept.descriptors.iter().map(OwnedFd::try_clone).collect();
        Ok((kept.text.clone(), descriptors.map_err(MountError::kernel("hand over", Path::new(key)))?))
    }

    /// Sees whether the daemon is alive, and to its requests if there is none.
    pub(super) fn look_after(&self, now: Instant) {
        let mut held = self.held();
        if let Some(lease) = &held.lease
            && !lease.is_gone()
            && now.saturating_duration_since(lease.beaten) > self.settings.silence
            && lease.kill()
        {
            let silent_ms = millis(now.saturating_duration_since(lease.beaten));
            tracing::error!(pid = lease.pid, silent_ms, "daemon does not answer any more, killed");
        }
        if let Some(pid) = held.lease.as_ref().filter(|lease| lease.is_dying()).map(|lease| lease.pid) {
            match held.devices().and_then(|devices| dying::free(pid, &devices)) {
                Ok(0) => {}
                Ok(requests) => tracing::warn!(pid, requests, "daemon was killed while it waited for itself, freed"),
                Err(error) => tracing::debug!(pid, %error, "free a daemon that waits for itself"),
            }
        }
        held.reap(now);
        if now.saturating_duration_since(held.mounts_seen) >= MOUNTS_EVERY {
            held.mounts_seen = now;
            held.look_at_mounts();
        }
        let patience = self.settings.patience;
        let is_late = held.lease.is_none() && now.saturating_duration_since(held.alone_since) > patience;
        if is_late && held.answering.is_none() && !held.connections.is_empty() {
            tracing::error!(after_ms = millis(patience), "no daemon comes; readers get errors until one does");
            match held.devices().and_then(Answering::start) {
                Ok(answering) => held.answering = Some(answering),
                Err(error) => tracing::error!(%error, "answer for a daemon that does not come"),
            }
        }
    }

    /// Unmounts everything.
    pub(super) fn close(&self) {
        let (lease, answering) = {
            let mut held = self.held();
            (held.lease.take(), held.answering.take())
        };
        if let Some(lease) = lease {
            lease.retire(Instant::now() + GO_TIMEOUT);
        }
        if let Some(answering) = answering {
            answering.stop();
        }
        let held = std::mem::take(&mut self.held().kept);
        for place in held.keys().filter_map(|key| overlay_of(key)) {
            let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
            if let Err(error) = rustix::mount::unmount(&place, flags) {
                tracing::warn!(merged = %place.display(), %error, "unmount an overlay");
            }
        }
        for (name, connection) in std::mem::take(&mut self.held().connections) {
            if let Err(error) = connection.mount.unmount() {
                tracing::error!(name, error = chain(&error), "unmount");
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn devices(&self) -> io::Result<Vec<File>> {
        self.connections.values().map(|connection| Ok(connection.device.try_clone()?.into())).collect()
    }

    /// Sees which mounts are on their directories no more, if anything was mounted or unmounted anywhere. Here and not in
    /// the daemon, whose namespace may be another one.
    fn look_at_mounts(&mut self) {
        // Under the lock, so that all that is held was mounted before.
        let mounts = match self.mounts.changed() {
            Ok(Some(mounts)) => mounts,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "look for the mounts that are held");
                return;
            }
        };
        for (name, connection) in &mut self.connections {
            let gone = !connection.mount.is_among(&mounts);
            if gone && !connection.gone {
                let dir = connection.mount.dir().display();
                tracing::error!(name, %dir, "the mount is not on its directory any more; somebody has unmounted it");
            }
            connection.gone = gone;
        }
    }

    /// Takes the lease back from a process that is gone.
    fn reap(&mut self, now: Instant) {
        if let Some(lease) = self.lease.take_if(|lease| lease.is_gone()) {
            tracing::warn!(pid = lease.pid, "daemon is gone");
            // One that dies at once has helped nobody: readers have waited all the while.
            if now.saturating_duration_since(lease.since) >= SERVED_MIN {
                self.alone_since = now;
            }
        }
    }
}

impl Connection {
    fn hand(&self, resumed: bool) -> io::Result<Handed> {
        let descriptors = [self.device.try_clone()?, self.notes.try_clone()?];
        Ok(Handed { agreement: self.agreement.clone(), descriptors, resumed })
    }

    /// Whether the kernel still has it: not if it was aborted, or unmounted by somebody else.
    fn is_alive(&self) -> bool {
        let mut device = [PollFd::from_borrowed_fd(self.device.as_fd(), PollFlags::empty())];
        let found = poll(&mut device, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        found.is_ok() && device.iter().all(|device| !device.revents().contains(PollFlags::ERR))
    }
}

/// Where an overlay of ours is mounted, if this is the key of one ([`crate::overlay`], [`crate::sealed`]).
fn overlay_of(key: &str) -> Option<PathBuf> {
    key.strip_prefix("overlay ")
        .or_else(|| key.strip_prefix("sealed "))
        .filter(|place| place.starts_with('/'))
        .map(PathBuf::from)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
