//! Bounds on what clients may ask of the server.
//!
//! Together they bound its memory: `uploads_max` and `downloads_max` times what one NAR on its way takes, twice
//! `buffers_bytes_max` for whatever else is held whole, and `connections_max` connections.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ConfigError, check};

/// Most uploads at once that can be asked for: each holds two threads while it lasts.
pub const UPLOADS_MAX: usize = 128;

/// Least memory for bodies, in bytes: the largest single one must fit.
pub const BUFFERS_BYTES_MIN: u64 = 64 << 20;
/// Most memory for bodies that can be asked for, in bytes: what a semaphore takes at once is counted in 32 bits.
const BUFFERS_BYTES_MAX: u64 = u32::MAX as u64;

/// Largest number of a limit that has no bound of its own: nobody means more, and sums stay in range.
const NUMBER_MAX: u64 = u32::MAX as u64;

/// Bounds on what clients may ask of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest NAR accepted, uncompressed, in bytes.
    pub nar_bytes_max: u64,
    /// Most bytes that one received byte may decompress to, beyond the first 64 MiB.
    pub expansion_max: u64,
    /// Uploads of NARs under way at once; further ones are held, not refused.
    pub uploads_max: usize,
    /// Downloads of NARs under way at once; further ones are held.
    pub downloads_max: usize,
    /// Most memory for bodies of pushes that are held whole, in bytes; as much again for questions of the lake API and
    /// for answers that are assembled in memory.
    pub buffers_bytes_max: u64,
    /// Longest time that a push, or the download of a NAR, is held because others are under way, in seconds.
    pub hold_s: u64,
    /// Longest time that any other request waits for memory, in seconds.
    pub wait_s: u64,
    /// Connections open at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// Longest time for a request's head to arrive, and for a connection to be idle, in seconds.
    pub header_timeout_s: u64,
    /// Longest time without progress of a body, in either direction, in seconds.
    pub body_idle_timeout_s: u64,
    /// Longest time that a body may take that is held whole in memory, in either direction, in seconds.
    pub body_timeout_s: u64,
    /// Longest time that requests under way have to end when the server is told to stop, in seconds.
    pub drain_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            nar_bytes_max: narlake_format::limits::NAR_SIZE_MAX,
            // zstd packs a file of zeros 30,000 to 1; a whole NAR that does so beyond its first 64 MiB is no package.
            expansion_max: 1000,
            // Each holds a window of decompressor memory and an ingest's buffers, some 20 MiB together.
            uploads_max: 16,
            // Each has three stretches of 2 MiB on their way and one being sent, some 10 MiB together.
            downloads_max: 256,
            buffers_bytes_max: BUFFERS_BYTES_MIN,
            // Nix gives up on a connection that is silent for 300 s; answered before, it tries again.
            hold_s: 240,
            // mountd takes 10 s without an answer for an outage.
            wait_s: 5,
            connections_max: 4096,
            header_timeout_s: 30,
            body_idle_timeout_s: 60,
            body_timeout_s: 300,
            drain_s: 30,
        }
    }
}

impl Limits {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let nar_size_max = narlake_format::limits::NAR_SIZE_MAX;
        check("limits.nar_bytes_max", (1..=nar_size_max).contains(&self.nar_bytes_max), &|| {
            format!("{} is not between 1 and {nar_size_max}", self.nar_bytes_max)
        })?;
        for (key, value) in [
            ("limits.expansion_max", self.expansion_max),
            ("limits.uploads_max", self.uploads_max as u64),
            ("limits.downloads_max", self.downloads_max as u64),
            ("limits.hold_s", self.hold_s),
            ("limits.wait_s", self.wait_s),
            ("limits.connections_max", self.connections_max as u64),
            ("limits.header_timeout_s", self.header_timeout_s),
            ("limits.body_idle_timeout_s", self.body_idle_timeout_s),
            ("limits.body_timeout_s", self.body_timeout_s),
            ("limits.drain_s", self.drain_s.max(1)),
        ] {
            check(key, value > 0, &|| "must not be 0".into())?;
            check(key, value <= NUMBER_MAX, &|| format!("{value} is more than {NUMBER_MAX}"))?;
        }
        check("limits.uploads_max", self.uploads_max <= UPLOADS_MAX, &|| {
            format!(
                "{} is more than {UPLOADS_MAX}: each upload keeps two threads busy; held uploads are not lost, and for \
                 more at once there are further servers",
                self.uploads_max
            )
        })?;
        let buffers = BUFFERS_BYTES_MIN..=BUFFERS_BYTES_MAX;
        check("limits.buffers_bytes_max", buffers.contains(&self.buffers_bytes_max), &|| {
            format!(
                "{} is not between {BUFFERS_BYTES_MIN}, the largest body there may be, and {BUFFERS_BYTES_MAX}",
                self.buffers_bytes_max
            )
        })?;
        Ok(())
    }

    /// Longest time for a request's head to arrive.
    #[must_use]
    pub fn header_timeout(&self) -> Duration {
        Duration::from_secs(self.header_timeout_s)
    }

    /// Longest time that a push or a download is held.
    #[must_use]
    pub fn hold(&self) -> Duration {
        Duration::from_secs(self.hold_s)
    }

    /// Longest time that any other request waits for memory.
    #[must_use]
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait_s)
    }

    /// Longest time that a body held in memory may take.
    #[must_use]
    pub fn body_timeout(&self) -> Duration {
        Duration::from_secs(self.body_timeout_s)
    }

    /// Longest time without progress of a body.
    #[must_use]
    pub fn body_idle_timeout(&self) -> Duration {
        Duration::from_secs(self.body_idle_timeout_s)
    }

    /// Longest time for requests under way to end.
    #[must_use]
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_s)
    }
}
