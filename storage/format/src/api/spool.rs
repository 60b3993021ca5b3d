//! The spool: pushes that wait on a worker's disk for their turn.
//!
//! `narlake post-build-hook` adds an entry for each build and returns, `narlake pusher` uploads them and removes them, and
//! mountd, which runs the pusher, counts them. A spool is a directory:
//!
//! | name | what |
//! |---|---|
//! | `queue/<name>.json` | an [`Entry`] each, oldest first by name; appears whole, by rename |
//! | `failed/<name>.json` | entries that were given up, as they were |
//! | `dropped` | a byte for each push that was dropped because the queue was full |
//! | `lock` | locked by the pusher that is at work |
//!
//! What an entry is about is kept from Nix's garbage collector by links that it names, made before the entry and removed
//! after it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Directory of the entries that wait.
pub const QUEUE: &str = "queue";

/// Directory of the entries that were given up.
pub const FAILED: &str = "failed";

/// File that counts dropped pushes.
pub const DROPPED: &str = "dropped";

/// File that the pusher locks.
pub const LOCK: &str = "lock";

/// End of an entry's name.
pub const SUFFIX: &str = ".json";

/// A name for an entry of this process at this time, in nanoseconds since 1970: names sort by time.
#[must_use]
pub fn entry_name(at_ns: u128, process: u32) -> String {
    format!("{at_ns:020}-{process}")
}

/// The time in an entry's name, in nanoseconds since 1970.
#[must_use]
pub fn named_at_ns(name: &str) -> Option<u128> {
    name.split_once('-')?.0.parse().ok()
}

/// The name of the entry that a file of a spool is. Hidden files are entries being written.
#[must_use]
pub fn entry_of(file_name: &str) -> Option<&str> {
    file_name.strip_suffix(SUFFIX).filter(|name| !name.starts_with('.'))
}

/// Largest entry, in bytes: thousands of outputs of one build.
pub const ENTRY_MAX: u64 = 1 << 20;

/// One build's outputs, to be pushed with their closures.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Store paths, with the store directory.
    pub paths: Vec<String>,
    /// The derivation that was built, whose log goes along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drv: Option<String>,
    /// The store to ask about them, as Nix's `--store`; Nix's own default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    /// The directory where their files are, if it is not the store directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real: Option<PathBuf>,
    /// Links that keep them from the garbage collector.
    #[serde(default)]
    pub roots: Vec<PathBuf>,
    /// When it was queued, in seconds since 1970 by the worker's clock.
    pub queued_at: u64,
}

/// What a pusher says, one JSON document a line on its standard output.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum PusherEvent {
    /// Entries are in the lake, and gone from the queue.
    Pushed {
        /// How many.
        entries: u64,
        /// Paths of their closures.
        paths: u64,
        /// Those of them that the lake lacked.
        uploaded: u64,
        /// Bytes of NAR that were sent.
        bytes: u64,
        /// What could not be sent along, a build log most likely.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        without: Vec<String>,
    },
    /// An entry could not be pushed, and is tried again.
    Failed {
        /// Its name.
        entry: String,
        /// Why.
        error: String,
        /// How often it was tried.
        tries: u32,
        /// Seconds until the next try.
        retry_in_s: u64,
    },
    /// An entry was given up.
    GaveUp {
        /// Its name.
        entry: String,
        /// Why.
        error: String,
    },
    /// Nothing can be pushed for now; entries wait.
    Waiting {
        /// Why.
        error: String,
        /// Seconds until the next try.
        retry_in_s: u64,
    },
}

/// How a worker's pushes are doing.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PushStatus {
    /// The spool.
    pub spool: PathBuf,
    /// Entries that wait.
    pub queued: u64,
    /// How long the oldest of them has waited, in seconds.
    pub oldest_s: u64,
    /// Entries that were given up.
    pub failed: u64,
    /// Pushes that were dropped because the queue was full.
    pub dropped: u64,
    /// Why nothing is pushed at the moment, if that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_time() {
        let (early, late) = (entry_name(7, 99_999), entry_name(1_800_000_000_000_000_000, 1));
        assert!(early < late);
        assert_eq!((named_at_ns(&early), named_at_ns("x-1"), named_at_ns("7")), (Some(7), None, None));
        assert_eq!(entry_of(&format!("{late}{SUFFIX}")), Some(late.as_str()));
        assert_eq!((entry_of(".7-1.json"), entry_of("lock")), (None, None));
    }

    #[test]
    fn documents_are_plain_json() {
        let entry: Entry = serde_json::from_str(r#"{"paths":["/nix/store/x"],"queued_at":5,"from":"later"}"#).unwrap();
        assert_eq!((entry.paths.len(), &entry.drv, entry.roots.len()), (1, &None, 0));
        let again = serde_json::to_string(&entry).unwrap();
        assert_eq!(serde_json::from_str::<Entry>(&again).unwrap(), entry);
        let event = PusherEvent::GaveUp { entry: "1".into(), error: "e".into() };
        assert_eq!(serde_json::to_string(&event).unwrap(), r#"{"event":"gave-up","entry":"1","error":"e"}"#);
        assert!(serde_json::from_str::<Entry>(r#"{"paths":"x","queued_at":5}"#).is_err());
    }
}
