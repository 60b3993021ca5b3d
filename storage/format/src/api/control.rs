//! What the `narlake` command and a worker's mountd say to each other on the control socket.
//!
//! One JSON document a line, in each direction: a [`ControlRequest`], then its [`ControlResponse`], strictly in turn;
//! the client may send another or close. Only a `registration` is answered with several lines. A line has at most
//! [`LINE_MAX`] bytes. As in the rest of the API, unknown fields are ignored, so that a newer side can say more to an
//! older one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::spool::PushStatus;

/// Longest line, in bytes: an `ensure` of a closure's worth of paths fits.
pub const LINE_MAX: usize = 32 << 20;

/// What mountd is asked to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum ControlRequest {
    /// How it goes. Answered with [`ControlResponse::Status`], also when disk or network do not answer.
    Status,
    /// Mount an overlay over the lower. Answered with [`ControlResponse::Overlay`].
    OverlayUp {
        /// Directory that takes what is written; made if it is not there.
        upper: PathBuf,
        /// Empty directory on the same file system, for the kernel; made if it is not there.
        work: PathBuf,
        /// Where to mount it, `/nix/store` for instance.
        merged: PathBuf,
        /// Name of the view that is its lower; mountd's own, which Nix is told of, if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        view: Option<String>,
    },
    /// Mount the closures of these paths as a sealed view: fixed, listed, and served by the kernel alone as far as their
    /// content is cached. Answered with [`ControlResponse::Overlay`]. Taken down like an overlay.
    SealedUp {
        /// Store paths, with or without the store directory.
        roots: Vec<String>,
        /// Directory that takes what is written; the view is read-only without it.
        #[serde(default)]
        upper: Option<PathBuf>,
        /// Empty directory on the same file system, for the kernel; needed with `upper`.
        #[serde(default)]
        work: Option<PathBuf>,
        /// Where to mount it.
        merged: PathBuf,
    },
    /// Take an overlay into care that somebody else has mounted over the lower. Answered with
    /// [`ControlResponse::Overlay`].
    OverlayAdopt {
        /// Where it is mounted.
        merged: PathBuf,
    },
    /// Unmount an overlay. Answered with [`ControlResponse::Done`].
    OverlayDown {
        /// Where it is mounted.
        merged: PathBuf,
        /// Detach it although it is in use.
        #[serde(default)]
        lazy: bool,
    },
    /// The overlays in care. Answered with [`ControlResponse::Overlays`].
    OverlayList,
    /// Mount a view beside mountd's own. Answered with [`ControlResponse::View`].
    ViewCreate(ViewSpec),
    /// The views that were created. Answered with [`ControlResponse::Views`].
    ViewList,
    /// Unmount a view and forget it. Answered with [`ControlResponse::Done`].
    ViewDestroy {
        /// Its name.
        name: String,
        /// Detach it although it is in use.
        #[serde(default)]
        lazy: bool,
    },
    /// Make the closures of these paths known and visible. Answered with [`ControlResponse::Ensured`].
    Ensure {
        /// Store paths, with or without the store directory.
        paths: Vec<String>,
        /// How long to try, in seconds; the fetch deadline if absent.
        #[serde(default)]
        timeout_s: Option<u64>,
    },
    /// Make the closures of these paths known and visible, and say of all of it what Nix's database wants to know.
    /// Answered with a [`ControlResponse::Registration`] for each part of the text, or with an error and nothing of it:
    /// a closure of which anything is missing is not registered.
    Registration {
        /// Store paths, with or without the store directory.
        paths: Vec<String>,
        /// How long to try, in seconds; the fetch deadline if absent.
        #[serde(default)]
        timeout_s: Option<u64>,
    },
    /// Refresh the overlays, so that they forget which names did not exist. Answered with [`ControlResponse::Done`].
    /// This is what Nix's `remount-hook` asks for.
    Refresh {
        /// Only this one.
        #[serde(default)]
        merged: Option<PathBuf>,
    },
    /// Drop cached content, least recently used first, until at most this much is left. Answered with
    /// [`ControlResponse::Evicted`].
    Evict {
        /// Bytes that may stay.
        #[serde(default)]
        keep_bytes: u64,
    },
    /// Keep the content of these paths' closures from eviction, once it has been read, in place of what was pinned under
    /// this name before. Answered with [`ControlResponse::Pins`], of this one.
    Pin {
        /// Name of the set: 1 to 240 of `A-Z a-z 0-9 + - . _ = ?`, not starting with a dot.
        name: String,
        /// Store paths, with or without the store directory.
        paths: Vec<String>,
    },
    /// Pin this set no longer. Answered with [`ControlResponse::Done`].
    Unpin {
        /// Its name.
        name: String,
    },
    /// What is pinned. Answered with [`ControlResponse::Pins`].
    PinList,
}

/// What mountd answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum ControlResponse {
    /// It is done.
    Done,
    /// How it goes.
    Status(Box<MountStatus>),
    /// One overlay.
    Overlay(OverlayInfo),
    /// All overlays.
    Overlays {
        /// In order of where they are mounted.
        overlays: Vec<OverlayInfo>,
    },
    /// One view.
    View(ViewInfo),
    /// All views that were created.
    Views {
        /// In order of their names.
        views: Vec<ViewInfo>,
    },
    /// The closures are known and visible, but for what is missing.
    Ensured {
        /// Paths of the closures.
        paths: u64,
        /// Bytes of their NARs together.
        nar_bytes: u64,
        /// Paths asked for, or referred to, that the cache does not have.
        missing: Vec<String>,
    },
    /// Part of what `nix-store --load-db` reads ([`crate::nix::registration`]): whole records, references before what
    /// refers to them, each of a path that a trusted key signed and that every overlay shows.
    Registration {
        /// The store directory of its paths.
        store_dir: String,
        /// The records, together.
        text: String,
        /// How many records are still to come, in further lines.
        left: u64,
    },
    /// Cached content was dropped.
    Evicted {
        /// Bytes that it had on disk.
        bytes: u64,
    },
    /// Content that stays in the cache.
    Pins {
        /// In order of their names.
        pins: Vec<PinInfo>,
    },
    /// It was not done.
    Error {
        /// What a program does about it.
        kind: ControlErrorKind,
        /// What a human needs to know.
        message: String,
    },
}

/// Why something was not done, as far as a program decides by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlErrorKind {
    /// The request makes no sense.
    Invalid,
    /// There is no such overlay or path.
    NotFound,
    /// It is in use; nothing was changed.
    Busy,
    /// Server or kernel did not answer in time; the same request may succeed later.
    Unavailable,
    /// It cannot be done, and trying again will not help.
    Failed,
}

/// One overlay over the lower.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OverlayInfo {
    /// Where it is mounted.
    pub merged: PathBuf,
    /// The mount of mountd below it.
    pub lower: PathBuf,
    /// The directory that takes what is written.
    pub upper: PathBuf,
    /// The kernel's work directory; absent where it is not known.
    #[serde(default)]
    pub work: Option<PathBuf>,
    /// Somebody else mounted it.
    pub adopted: bool,
    /// What to give nix-daemon as `--store`; empty where Nix must not use it.
    pub store_uri: String,
    /// Of a sealed view, what tells its closure from others. Its `upper` is empty if it is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
}

/// What a view is to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ViewSpec {
    /// Its name: 1 to 64 of `a-z 0-9 . _ -`, the first a letter or digit.
    pub name: String,
    /// Where to mount it; made if it is not there.
    pub mount: PathBuf,
    /// Store paths whose closures it shows, with or without the store directory; any path if there are none.
    #[serde(default)]
    pub roots: Vec<String>,
    /// File with a token of its own: the view shows what that may see, and shares no record with others.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Socket on which it answers Nix, for what it shows alone; made with the view, and gone with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nix_socket: Option<PathBuf>,
}

/// A view that was created.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ViewInfo {
    /// What it was to be.
    #[serde(flatten)]
    pub spec: ViewSpec,
    /// Paths of its closures; absent if it shows any path.
    #[serde(default)]
    pub paths: Option<u64>,
    /// Overlays over it.
    pub overlays: u64,
    /// Whether it is served; somebody may have taken its mount away.
    pub mounted: bool,
}

/// Content that stays in the cache once it is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PinInfo {
    /// Name of the set.
    pub name: String,
    /// Its files.
    pub files: u64,
    /// What they take on disk when all of them are there, in bytes.
    pub bytes: u64,
}

/// How a mountd is doing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountStatus {
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Where its view is mounted.
    pub mount: PathBuf,
    /// The store directory of the paths it shows.
    pub store_dir: String,
    /// The server it fetches from.
    pub server: String,
    /// Whether the server answered when it was last asked.
    pub server_up: bool,
    /// Names of the keys it trusts.
    pub trusted_keys: Vec<String>,
    /// The Nix socket.
    pub nix_socket: PathBuf,
    /// The cache directory.
    pub cache_dir: PathBuf,
    /// Bytes on disk in the cache.
    pub cache_bytes: u64,
    /// Most bytes the cache may have.
    pub cache_bytes_max: u64,
    /// Files in the cache.
    pub cache_files: u64,
    /// Store paths whose metadata is in memory.
    pub paths_known: u64,
    /// Store objects that have a nodeid.
    pub objects: u64,
    /// Names that the kernel was told do not exist.
    pub negative_names: u64,
    /// Reads of packs since the start.
    pub fetch_requests: u64,
    /// Bytes those reads returned.
    pub fetch_bytes: u64,
    /// Messages of the kernel since the start, by operation, of those that came at all.
    pub fuse_requests: Vec<(String, u64)>,
    /// Overlays over the mount.
    pub overlays: Vec<OverlayInfo>,
    /// What builds have left to push; absent where this daemon does not push.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push: Option<PushStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, request: &ControlRequest) {
        assert_eq!(&serde_json::from_str::<ControlRequest>(line).unwrap(), request);
        let again = serde_json::to_string(request).unwrap();
        assert_eq!(&serde_json::from_str::<ControlRequest>(&again).unwrap(), request);
    }

    #[test]
    fn requests_are_plain_json() {
        check(r#"{"op":"status"}"#, &ControlRequest::Status);
        check(r#"{"op":"overlay-list","from":"a newer client"}"#, &ControlRequest::OverlayList);
        check(
            r#"{"op":"overlay-up","upper":"/u","work":"/w","merged":"/m"}"#,
            &ControlRequest::OverlayUp { upper: "/u".into(), work: "/w".into(), merged: "/m".into(), view: None },
        );
        check(
            r#"{"op":"overlay-down","merged":"/m"}"#,
            &ControlRequest::OverlayDown { merged: "/m".into(), lazy: false },
        );
        check(r#"{"op":"ensure","paths":["x"]}"#, &ControlRequest::Ensure { paths: vec!["x".into()], timeout_s: None });
        check(
            r#"{"op":"registration","paths":["x"],"timeout_s":5}"#,
            &ControlRequest::Registration { paths: vec!["x".into()], timeout_s: Some(5) },
        );
        check(r#"{"op":"refresh"}"#, &ControlRequest::Refresh { merged: None });
        check(r#"{"op":"evict"}"#, &ControlRequest::Evict { keep_bytes: 0 });
        check(
            r#"{"op":"pin","name":"ci","paths":["x"]}"#,
            &ControlRequest::Pin { name: "ci".into(), paths: vec!["x".into()] },
        );
        check(r#"{"op":"unpin","name":"ci"}"#, &ControlRequest::Unpin { name: "ci".into() });
        check(r#"{"op":"pin-list"}"#, &ControlRequest::PinList);
        for bad in ["", "{}", r#"{"op":"sing"}"#, r#"{"op":"overlay-down"}"#, r#"{"op":"ensure","paths":"x"}"#] {
            assert!(serde_json::from_str::<ControlRequest>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn responses_name_their_kind() {
        let error = ControlResponse::Error { kind: ControlErrorKind::Busy, message: "in use".into() };
        let text = serde_json::to_string(&error).unwrap();
        assert_eq!(text, r#"{"result":"error","kind":"busy","message":"in use"}"#);
        assert_eq!(serde_json::from_str::<ControlResponse>(&text).unwrap(), error);
        assert_eq!(serde_json::to_string(&ControlResponse::Done).unwrap(), r#"{"result":"done"}"#);
    }
}
