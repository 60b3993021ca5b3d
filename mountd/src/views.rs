//! Views beside the daemon's own, made and unmade through the control socket: one for a job, hundreds on one worker.
//!
//! Each is a FUSE connection of its own with one thread. It shows every path that its token may see, or only the
//! closures of some roots. Nodeids, trees, content and their memory are shared by all, since they are the same whoever
//! shows them, and are reached only through a record that the view may see. Records are shared among views of the
//! daemon's own token; a view with a token of its own has its own, in memory and on disk, and asks with its own token for
//! all that this host lacks.
//!
//! A view may have a Nix socket of its own, which answers for what it shows and for nothing else ([`answering`]).
//!
//! A view stays until it is destroyed: a state file ([`state`]) has the next daemon mount it again, without a server.

mod answering;
mod state;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use narlake_format::api::control::{ViewInfo, ViewSpec};
use narlake_format::error::chain;
use narlake_format::nix::store_path::StorePath;
use narlake_storage::fetch::{BlobSource, FetchSettings, Fetcher};
use tokio::runtime::Handle;

use self::answering::Answering;
use self::state::{State, StateError};
use crate::error::joined;
use crate::fs::LazyStore;
use crate::fs::nodes::NodeTable;
use crate::fuse::Shim;
use crate::fuse::session::Serving;
use crate::metadata::{Blobs, Metadata, Records};
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::mounter::Mounter;
use crate::nix_socket::{Access, NixSocket};
use crate::overlay::Overlays;
use crate::trust::TrustedKeys;
use crate::view::{RecordSource, Scope, View, ViewError, ViewSettings};

/// Views at once. Each takes a descriptor, a thread and a mount.
pub const VIEWS_MAX: usize = 512;

/// Roots of one view.
const ROOTS_MAX: usize = 10_000;

/// Longest name, in bytes.
const NAME_MAX: usize = 64;

/// Threads that read a view's messages. They only hand them on.
const THREADS: usize = 1;

/// Longest wait for one to be mounted or unmounted, its turn included.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Of a view with its own token: bytes of records and of decoded content in memory, and of records on disk.
const OWN_RECORDS_BYTES: u64 = 4 << 20;
const OWN_FRAME_BYTES: u64 = 4 << 20;
const OWN_METADATA_BYTES: u64 = 64 << 20;

/// The server, as somebody with this token sees it.
///
/// With the token comes the file that it was read from, and is read from again when it has expired.
pub type Connect =
    Arc<dyn Fn(String, PathBuf) -> anyhow::Result<(Arc<dyn BlobSource>, Arc<dyn RecordSource>)> + Send + Sync>;

/// What views are made of.
pub struct Parts {
    /// The daemon's own store, whose nodeids, trees and cache they share.
    pub store: LazyStore,
    /// Its view.
    pub view: View,
    /// Its overlays.
    pub overlays: Arc<Overlays>,
    /// Who mounts.
    pub mounter: Mounter,
    /// The node table.
    pub nodes: Arc<NodeTable>,
    /// Metadata on disk.
    pub metadata: Arc<Metadata>,
    /// Trusted keys.
    pub keys: TrustedKeys,
    /// Numbers of a view.
    pub settings: ViewSettings,
    /// Numbers of a fetch engine.
    pub fetch: FetchSettings,
    /// How to reach the server with another token.
    pub connect: Connect,
    /// Who may connect to their Nix sockets.
    pub nix_access: Access,
    /// The cache directory.
    pub cache_dir: PathBuf,
    /// The metrics.
    pub metrics: Metrics,
}

/// Why a view was not made or unmade.
#[derive(Debug, thiserror::Error)]
pub enum ViewsError {
    /// The request makes no sense.
    #[error("view {name}: {reason}")]
    Invalid {
        /// The view.
        name: String,
        /// Why.
        reason: String,
    },
    /// There is no such view.
    #[error("there is no view {name}")]
    Unknown {
        /// The view.
        name: String,
    },
    /// What its roots need is not known.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// It could not be written down.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its token, or what asks with it, cannot be used.
    #[error("view {name}: {what}")]
    Token {
        /// The view.
        name: String,
        /// What was done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

struct Live {
    state: State,
    view: View,
    overlays: Arc<Overlays>,
    // Held while it is unmounted.
    serving: Mutex<Serving>,
    /// Its Nix socket; none if it has none, or is gone.
    answering: tokio::sync::Mutex<Option<Answering>>,
}

/// The views that were created.
pub struct Views {
    parts: Parts,
    // Held for a look or a change, never across an await.
    table: Mutex<BTreeMap<String, Arc<Live>>>,
    // Making and unmaking take turns.
    changes: tokio::sync::Mutex<()>,
}

impl Views {
    /// None yet.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self { parts, table: Mutex::default(), changes: tokio::sync::Mutex::default() })
    }

    /// Mounts those again that an earlier daemon had. One that cannot be is left out, logged, and kept for the next.
    pub async fn restore(&self) {
        let dir = self.parts.cache_dir.clone();
        let found = joined(tokio::task::spawn_blocking(move || state::load_all(&dir))).await;
        for state in found.into_iter().take(VIEWS_MAX) {
            let name = state.spec.name.clone();
            if let Err(error) = self.mount(state).await {
                tracing::error!(view = name, error = chain(&error), "mount a view again");
            }
        }
        self.show_count();
    }

    /// Makes a view and mounts it.
    ///
    /// # Errors
    /// When the name or mount is taken or cannot be used, a root is not in the lake, or the kernel refuses. Nothing is
    /// left behind.
    pub async fn create(&self, spec: ViewSpec) -> Result<ViewInfo, ViewsError> {
        let invalid = |reason: &str| ViewsError::Invalid { name: spec.name.clone(), reason: reason.to_owned() };
        if !is_name(&spec.name) {
            return Err(invalid("names are 1 to 64 of a-z 0-9 . _ -, the first a letter or digit"));
        }
        if spec.roots.len() > ROOTS_MAX {
            return Err(invalid("has more than 10,000 roots"));
        }
        if let Some(socket) = &spec.nix_socket {
            answering::check(socket).map_err(invalid)?;
        }
        let _turn = self.turn(&spec.mount).await?;
        if self.table().contains_key(&spec.name) {
            return Err(invalid("exists already; destroy it first"));
        }
        if self.table().len() >= VIEWS_MAX {
            return Err(invalid("there are 512 views already"));
        }
        let name = spec.name.clone();
        let made = self.make(spec).await;
        if made.is_err() {
            self.forget(&name).await;
        }
        self.show_count();
        made
    }

    async fn make(&self, spec: ViewSpec) -> Result<ViewInfo, ViewsError> {
        let invalid = |reason: &str| ViewsError::Invalid { name: spec.name.clone(), reason: reason.to_owned() };
        let (base, _) = self.base(&spec).await?;
        let mut members = None;
        if !spec.roots.is_empty() {
            let dir = base.store_dir();
            let parse = |text: &String| {
                let parsed = if text.starts_with('/') { StorePath::parse_absolute(dir, text) } else { text.parse() };
                parsed.map_err(|_| invalid(&format!("{text} is not a store path of {dir}")))
            };
            let roots: Vec<StorePath> = spec.roots.iter().map(parse).collect::<Result<_, _>>()?;
            let limit = self.parts.settings.deadline;
            let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            let closures = tokio::time::timeout(limit, base.ensure(&roots)).await;
            let closures = closures.unwrap_or(Err(ViewError::Deadline { limit_ms }))?;
            if let Some(missing) = closures.missing.first() {
                return Err(invalid(&format!("{missing} is not in the lake, or not for this token")));
            }
            members = Some(closures.records.iter().map(|record| record.info().store_path.hash).collect());
        }
        let state = State { spec, members };
        let (dir, kept) = (self.parts.cache_dir.clone(), state.clone());
        joined(tokio::task::spawn_blocking(move || kept.write(&dir))).await?;
        self.mount(state).await
    }

    /// The views, in order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<ViewInfo> {
        self.all().iter().map(|live| live.info()).collect()
    }

    /// Unmounts a view and forgets it.
    ///
    /// # Errors
    /// When there is none, or it is in use and `lazy` is not set: then nothing has changed.
    pub async fn destroy(&self, name: &str, lazy: bool) -> Result<(), ViewsError> {
        let live = self.get(name)?;
        let mount = live.state.spec.mount.clone();
        let _turn = self.turn(&mount).await?;
        if !live.overlays.list().is_empty() && !lazy {
            return Err(MountError::Busy { path: mount }.into());
        }
        let leaving = Arc::clone(&live);
        let work = move || {
            if lazy {
                leaving.overlays.down_all();
            }
            leaving.serving.lock().unwrap_or_else(PoisonError::into_inner).leave(lazy)
        };
        limited("unmount", &mount, joined(tokio::task::spawn_blocking(work))).await?;
        live.stop_answering().await;
        self.table().remove(name);
        self.show_count();
        self.forget(name).await;
        Ok(())
    }

    /// Closes the Nix sockets of all; they are opened again by the next daemon.
    pub async fn stop_answering(&self) {
        for live in self.all() {
            live.stop_answering().await;
        }
    }

    /// Unmounts all, detaching those in use; they are mounted again by the next daemon. Blocks.
    pub fn stop(&self) {
        for live in self.all() {
            live.overlays.down_all();
            let left = live.serving.lock().unwrap_or_else(PoisonError::into_inner).leave(true);
            if let Err(error) = left {
                tracing::error!(view = live.state.spec.name, error = chain(&error), "unmount the view");
            }
        }
        self.table().clear();
    }

    /// The overlays over a view.
    ///
    /// # Errors
    /// When there is no view of this name.
    pub fn overlays(&self, name: &str) -> Result<Arc<Overlays>, ViewsError> {
        Ok(Arc::clone(&self.get(name)?.overlays))
    }

    /// The overlays of whichever view has one on this directory, with the view.
    #[must_use]
    pub fn overlay_on(&self, merged: &Path) -> Option<(Arc<Overlays>, View)> {
        let has = |live: &Arc<Live>| live.overlays.list().iter().any(|overlay| overlay.merged == merged);
        self.all().into_iter().find(has).map(|live| (Arc::clone(&live.overlays), live.view.clone()))
    }

    /// The views that have overlays, and those.
    #[must_use]
    pub fn overlaid(&self) -> Vec<(Arc<Overlays>, View)> {
        let all = self.all().into_iter().filter(|live| !live.overlays.list().is_empty());
        all.map(|live| (Arc::clone(&live.overlays), live.view.clone())).collect()
    }

    /// A view with the right that is asked for, and where its content comes from if that is not as for the daemon's own.
    async fn base(&self, spec: &ViewSpec) -> Result<(View, Option<Blobs>), ViewsError> {
        let parts = &self.parts;
        let Some(file) = spec.token_file.clone() else { return Ok((parts.view.part(None, no_overlays(parts)), None)) };
        let (name, dir) = (spec.name.clone(), state::records_dir(&parts.cache_dir, &spec.name));
        let failed = |what| {
            let name = name.clone();
            move |source| ViewsError::Token { name, what, source }
        };
        let token_file = file.clone();
        let (keys, metrics, tmp) = (parts.keys.clone(), parts.metrics.clone(), dir.join("tmp"));
        let opened = tokio::task::spawn_blocking(move || {
            let token = std::fs::read_to_string(&file).map_err(MountError::kernel("read", &file))?.trim().to_owned();
            if token.is_empty() {
                return Err(MountError::refused(&file, "holds no token"));
            }
            std::fs::create_dir_all(&tmp).map_err(MountError::kernel("make", &tmp))?;
            let records = Metadata::open(&dir, OWN_METADATA_BYTES, keys, &metrics);
            Ok((token, records.map_err(MountError::kernel("open", &dir))?))
        });
        let opened: Result<(String, Metadata), MountError> = joined(opened).await;
        let (token, metadata) = opened.map_err(Box::from).map_err(failed("read its token, open its records"))?;
        let connected = (parts.connect)(token, token_file);
        let (source, records) = connected.map_err(|error| failed("connect with its token")(error.into()))?;
        let fetch = FetchSettings { frame_cache_bytes: OWN_FRAME_BYTES, ..parts.fetch.clone() };
        let blobs =
            Blobs::new(Fetcher::metered(source, fetch, parts.metrics.fetch.clone()), Arc::clone(&parts.metadata));
        let records = Arc::new(Records::new(records, Arc::new(metadata)));
        let of = (blobs.clone(), Arc::clone(&parts.nodes), no_overlays(parts));
        let settings = ViewSettings { records_bytes: OWN_RECORDS_BYTES, ..parts.settings.clone() };
        Ok((View::new(records, parts.keys.clone(), of, settings, &parts.metrics), Some(blobs)))
    }

    /// Mounts a view that is written down, and enters it.
    async fn mount(&self, state: State) -> Result<ViewInfo, ViewsError> {
        let (base, blobs) = self.base(&state.spec).await?;
        let scope: Option<Scope> =
            state.members.as_ref().map(|all| Arc::new(all.iter().copied().collect::<HashSet<_>>()));
        let socket = state.spec.nix_socket.clone();
        let overlays = Arc::new(self.parts.overlays.of_view(state.spec.mount.clone(), socket.clone()));
        let view = base.part(scope, Arc::clone(&overlays));
        let store = self.parts.store.of_view(view.clone(), blobs);
        let nix = NixSocket::new(view.clone(), store.clone(), self.parts.nix_access.clone(), &self.parts.metrics);
        let shim = Shim::new(store, Handle::current(), &self.parts.metrics);
        let (dir, own) = (state.spec.mount.clone(), Arc::clone(&overlays));
        let access = self.parts.nix_access.clone();
        let (mounter, name) = (self.parts.mounter.clone(), format!("view {}", state.spec.name));
        let work = move || {
            Overlays::check_own(own.own())?;
            // Before the mount: what fails now leaves nothing mounted.
            let listener = socket.map(|socket| answering::listen(&access, socket)).transpose()?;
            let serving = Serving::start_with(mounter, &name, &dir, shim, THREADS)?;
            own.restore();
            Ok((serving, listener))
        };
        let mount = state.spec.mount.clone();
        let (serving, listener) = limited("mount on", &mount, joined(tokio::task::spawn_blocking(work))).await?;
        // As the kernel spells it: overlays name their lower by it.
        let overlays = match serving.dir() == mount {
            true => overlays,
            false => {
                let reason = format!("is {} to the kernel; name that", serving.dir().display());
                let _ = joined(tokio::task::spawn_blocking(move || serving.leave(true))).await;
                return Err(MountError::refused(&mount, reason).into());
            }
        };
        if self.parts.mounter.is_resuming() {
            view.owes_refresh();
        }
        let answering = listener.map(|listener| listener.serve(nix));
        let (serving, answering) = (Mutex::new(serving), tokio::sync::Mutex::new(answering));
        let live = Arc::new(Live { state, view, overlays, serving, answering });
        self.table().insert(live.state.spec.name.clone(), Arc::clone(&live));
        Ok(live.info())
    }

    /// Removes what is on disk of a view.
    async fn forget(&self, name: &str) {
        let (dir, name) = (self.parts.cache_dir.clone(), name.to_owned());
        joined(tokio::task::spawn_blocking(move || state::remove(&dir, &name))).await;
    }

    async fn turn(&self, mount: &Path) -> Result<tokio::sync::MutexGuard<'_, ()>, MountError> {
        limited("wait for the turn to change", mount, async { Ok(self.changes.lock().await) }).await
    }

    fn get(&self, name: &str) -> Result<Arc<Live>, ViewsError> {
        self.table().get(name).cloned().ok_or_else(|| ViewsError::Unknown { name: name.to_owned() })
    }

    fn all(&self) -> Vec<Arc<Live>> {
        self.table().values().cloned().collect()
    }

    fn show_count(&self) {
        self.parts.metrics.views.set(i64::try_from(self.table().len()).unwrap_or(i64::MAX));
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Live>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    async fn stop_answering(&self) {
        let answering = self.answering.lock().await.take();
        if let Some(answering) = answering {
            answering.stop().await;
        }
    }

    fn info(&self) -> ViewInfo {
        let ended = self.serving.try_lock().is_ok_and(|serving| *serving.ended().borrow());
        ViewInfo {
            spec: self.state.spec.clone(),
            paths: self.state.members.as_ref().map(|members| members.len() as u64),
            overlays: self.overlays.list().len() as u64,
            mounted: !ended,
        }
    }
}

/// Of a view that is not mounted.
fn no_overlays(parts: &Parts) -> Arc<Overlays> {
    Arc::new(parts.overlays.of_view(PathBuf::new(), None))
}

async fn limited<T>(
    operation: &'static str,
    path: &Path,
    work: impl Future<Output = Result<T, MountError>>,
) -> Result<T, MountError> {
    let limit_ms = u64::try_from(CHANGE_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
    let late = || MountError::Late { operation, path: path.to_owned(), limit_ms };
    tokio::time::timeout(CHANGE_TIMEOUT, work).await.unwrap_or_else(|_| Err(late()))
}

fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let first = name.bytes().next().is_some_and(good);
    first && name.len() <= NAME_MAX && name.bytes().all(|byte| good(byte) || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let long = "a".repeat(65);
        for bad in ["", ".", "..", "-a", "a/b", "A", "a b", long.as_str(), "a\0"] {
            assert!(!is_name(bad), "{bad}");
        }
        for good in ["a", "job-1.2_x", "0"] {
            assert!(is_name(good), "{good}");
        }
    }
}
