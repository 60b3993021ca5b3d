//! The control socket: what the `narlake` command asks of this daemon, one JSON document a line.
//!
//! [`narlake_format::api::control`] has the messages. `status` is answered out of memory, so that it works when disk
//! and network do not. Only root reaches the socket. Descriptors may come along with a line ([`lines`]).

mod lines;
mod registration;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, MountStatus, OverlayInfo};
use narlake_format::error::chain;
use narlake_format::nix::store_path::StorePath;
use narlake_storage::fetch::Fetcher;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::lines::{Line, Lines};
use self::registration::Pages;
use crate::cache::{Cache, PinError};
use crate::fs::nodes::NodeTable;
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::overlay::{Handed, Overlays};
use crate::pinning::{Pinning, PinningError};
use crate::pusher::Pusher;
use crate::sealed::{Sealed, SealedError};
use crate::view::{Closures, View, ViewError};
use crate::views::{Views, ViewsError};

/// Connections at once; further ones are closed.
const CONNECTIONS_MAX: usize = 64;

/// Longest time that `ensure` may be asked to try.
const ENSURE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Longest time for an answer to be taken.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the daemon says of itself in a status, and does not change.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Where the view is mounted.
    pub mount: PathBuf,
    /// The server.
    pub server: String,
    /// Names of the trusted keys.
    pub trusted_keys: Vec<String>,
    /// The Nix socket.
    pub nix_socket: PathBuf,
}

/// Serves the control socket.
#[derive(Clone)]
pub struct Control {
    /// What it says of itself.
    pub identity: Arc<Identity>,
    /// The view.
    pub view: View,
    /// Its overlays.
    pub overlays: Arc<Overlays>,
    /// Further views.
    pub views: Arc<Views>,
    /// Sealed views.
    pub sealed: Arc<Sealed>,
    /// What pushes for builds.
    pub pusher: Option<Arc<Pusher>>,
    /// The cache.
    pub cache: Arc<Cache>,
    /// What stays in it.
    pub pinning: Pinning,
    /// The node table.
    pub nodes: Arc<NodeTable>,
    /// The fetch engine.
    pub fetcher: Fetcher,
    /// Time limit where a request names none.
    pub deadline: Duration,
    /// The metrics.
    pub metrics: Metrics,
}

impl Control {
    /// Accepts connections until told to stop. Overlays under way are finished: half of one helps nobody.
    pub async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        let tracker = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(_) if tracker.len() >= CONNECTIONS_MAX => {
                    tracing::warn!("too many connections to the control socket");
                }
                Ok((stream, _)) => {
                    let (control, stop) = (self.clone(), stop.clone());
                    tracker.spawn(async move {
                        if let Err(error) = control.converse(stream, &stop).await {
                            tracing::debug!(%error, "connection to the control socket ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a connection on the control socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        tracker.close();
        tracker.wait().await;
    }

    async fn converse(&self, stream: UnixStream, stop: &CancellationToken) -> std::io::Result<()> {
        let mut lines = Lines::new(stream);
        loop {
            let line = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                line = lines.next() => line?,
            };
            let (answer, is_last) = match line {
                None => return Ok(()),
                Some(Line::TooLong) => (invalid("the line is too long").into(), true),
                Some(Line::Whole(line, handed)) => (self.answer(&line, handed, stop).await, false),
            };
            for response in answer {
                let mut text = serde_json::to_vec(&response)?;
                text.push(b'\n');
                tokio::time::timeout(WRITE_TIMEOUT, lines.stream().write_all(&text)).await??;
            }
            if is_last {
                return Ok(());
            }
        }
    }

    async fn answer(&self, line: &[u8], handed: Vec<OwnedFd>, stop: &CancellationToken) -> Answer {
        let answer = match serde_json::from_slice(line) {
            Ok(request) => self.carry_out(request, Handed::new(handed), stop).await,
            Err(error) => return invalid(&format!("malformed request: {error}")).into(),
        };
        answer.unwrap_or_else(|error| {
            let message = chain(&error);
            tracing::warn!(error = message, "control request failed");
            ControlResponse::Error { kind: error.kind(), message }.into()
        })
    }

    async fn carry_out(
        &self,
        request: ControlRequest,
        handed: Option<Handed>,
        stop: &CancellationToken,
    ) -> Result<Answer, ControlError> {
        match request {
            ControlRequest::Status => Ok(ControlResponse::Status(Box::new(self.status())).into()),
            ControlRequest::OverlayUp { upper, work, merged, view } => {
                let overlays = match view {
                    Some(name) => self.views.overlays(&name)?,
                    None => Arc::clone(&self.overlays),
                };
                Ok(ControlResponse::Overlay(overlays.up(upper, work, merged).await?).into())
            }
            ControlRequest::SealedUp { roots, upper, work, merged } => {
                let roots = self.store_paths(&roots)?;
                let upper = match (upper, work) {
                    (Some(upper), Some(work)) => Some((upper, work)),
                    (None, None) => None,
                    _ => return Err(ControlError::Halves),
                };
                Ok(ControlResponse::Overlay(self.sealed.up(&roots, upper, merged).await?).into())
            }
            ControlRequest::OverlayAdopt { merged } => {
                Ok(ControlResponse::Overlay(self.overlays.adopt(merged, handed).await?).into())
            }
            ControlRequest::OverlayDown { merged, lazy } => {
                if let Some(down) = self.sealed.down(&merged, lazy).await {
                    down?;
                    return Ok(ControlResponse::Done.into());
                }
                let of_view = self.views.overlay_on(&merged).map(|(overlays, _)| overlays);
                of_view.as_ref().unwrap_or(&self.overlays).down(merged, lazy, handed).await?;
                Ok(ControlResponse::Done.into())
            }
            ControlRequest::OverlayList => Ok(ControlResponse::Overlays { overlays: self.all_overlays() }.into()),
            ControlRequest::ViewCreate(spec) => Ok(ControlResponse::View(self.views.create(spec).await?).into()),
            ControlRequest::ViewList => Ok(ControlResponse::Views { views: self.views.list() }.into()),
            ControlRequest::ViewDestroy { name, lazy } => {
                self.views.destroy(&name, lazy).await?;
                Ok(ControlResponse::Done.into())
            }
            // It only waits for the server, perhaps for long; overlays are mounted and unmounted to the end.
            ControlRequest::Ensure { paths, timeout_s } => tokio::select! {
                () = stop.cancelled() => Err(ControlError::Stopping),
                ensured = self.ensure(&paths, timeout_s) => ensured.map(Answer::from),
            },
            ControlRequest::Registration { paths, timeout_s } => tokio::select! {
                () = stop.cancelled() => Err(ControlError::Stopping),
                pages = self.registration(&paths, timeout_s) => pages.map(Answer::Pages),
            },
            ControlRequest::Refresh { merged } => {
                if let Some((_, view)) = merged.as_deref().and_then(|merged| self.views.overlay_on(merged)) {
                    view.refresh().await?;
                    return Ok(ControlResponse::Done.into());
                }
                let all = merged.is_none();
                if let Some(merged) = merged
                    && !self.overlays.list().iter().any(|overlay| overlay.merged == merged)
                {
                    return Err(MountError::Unknown { path: merged }.into());
                }
                // All of them: refreshes are shared, and one more costs milliseconds.
                self.view.refresh().await?;
                for (_, view) in self.views.overlaid().into_iter().filter(|_| all) {
                    view.refresh().await?;
                }
                Ok(ControlResponse::Done.into())
            }
            ControlRequest::Evict { keep_bytes } => {
                let cache = Arc::clone(&self.cache);
                let bytes = tokio::task::spawn_blocking(move || cache.shrink_to(keep_bytes)).await;
                Ok(ControlResponse::Evicted { bytes: bytes.unwrap_or(0) }.into())
            }
            // It waits for the server as `ensure` does.
            ControlRequest::Pin { name, paths } => {
                let paths = self.store_paths(&paths)?;
                tokio::select! {
                    () = stop.cancelled() => Err(ControlError::Stopping),
                    pinned = self.pinning.pin(name, &paths) => Ok(ControlResponse::Pins { pins: vec![pinned?] }.into()),
                }
            }
            ControlRequest::Unpin { name } => {
                if self.pinning.unpin(name.clone()).await? {
                    Ok(ControlResponse::Done.into())
                } else {
                    Err(ControlError::NoPins { name })
                }
            }
            ControlRequest::PinList => Ok(ControlResponse::Pins { pins: self.pinning.list() }.into()),
        }
    }

    fn all_overlays(&self) -> Vec<OverlayInfo> {
        let of_views = self.views.overlaid().into_iter().flat_map(|(overlays, _)| overlays.list());
        self.overlays.list().into_iter().chain(of_views).chain(self.sealed.list()).collect()
    }

    /// Paths as people write them, with the store directory or without.
    fn store_paths(&self, paths: &[String]) -> Result<Vec<StorePath>, ControlError> {
        let dir = self.view.store_dir();
        let parse = |path: &String| {
            let parsed = if path.starts_with('/') { StorePath::parse_absolute(dir, path) } else { path.parse() };
            parsed.map_err(|_| ControlError::Path { path: path.clone(), dir: dir.to_string() })
        };
        paths.iter().map(parse).collect()
    }

    async fn ensure(&self, paths: &[String], timeout_s: Option<u64>) -> Result<ControlResponse, ControlError> {
        let closures = self.closures(paths, timeout_s).await?;
        Ok(ControlResponse::Ensured {
            paths: closures.records.len() as u64,
            nar_bytes: closures.nar_bytes(),
            missing: closures.missing,
        })
    }

    async fn registration(&self, paths: &[String], timeout_s: Option<u64>) -> Result<Pages, ControlError> {
        let closures = self.closures(paths, timeout_s).await?;
        let dir = self.view.store_dir().clone();
        // A closure may have a hundred thousand paths: too long for a thread that others wait for.
        let pages = tokio::task::spawn_blocking(move || Pages::new(dir, closures));
        pages.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// These closures, known and visible.
    async fn closures(&self, paths: &[String], timeout_s: Option<u64>) -> Result<Closures, ControlError> {
        let timer = self.metrics.ensure_seconds.start_timer();
        let paths = self.store_paths(paths)?;
        let limit = timeout_s.map_or(self.deadline, Duration::from_secs).min(ENSURE_MAX);
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ensured = tokio::time::timeout(limit, self.view.ensure(&paths)).await;
        let closures = ensured.unwrap_or(Err(ViewError::Deadline { limit_ms }))?;
        timer.observe_duration();
        Ok(closures)
    }

    fn status(&self) -> MountStatus {
        let (cache_bytes, cache_bytes_max) = self.cache.usage();
        let fetched = self.fetcher.stats();
        MountStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            mount: self.identity.mount.clone(),
            store_dir: self.view.store_dir().to_string(),
            server: self.identity.server.clone(),
            server_up: self.metrics.server_up.get() > 0.0,
            trusted_keys: self.identity.trusted_keys.clone(),
            nix_socket: self.identity.nix_socket.clone(),
            cache_dir: self.cache.dir().to_owned(),
            cache_bytes,
            cache_bytes_max,
            cache_files: self.cache.len() as u64,
            paths_known: self.view.known_len() as u64,
            objects: self.nodes.len() as u64,
            negative_names: self.view.negative_len() as u64,
            fetch_requests: fetched.requests,
            fetch_bytes: fetched.bytes,
            fuse_requests: self.metrics.fuse_request_counts(),
            overlays: self.all_overlays(),
            push: self.pusher.as_ref().map(|pusher| pusher.status()),
        }
    }
}

/// What is said to a request: one line, but for a registration.
enum Answer {
    One(Option<Box<ControlResponse>>),
    Pages(Pages),
}

impl From<ControlResponse> for Answer {
    fn from(response: ControlResponse) -> Self {
        Self::One(Some(Box::new(response)))
    }
}

impl Iterator for Answer {
    type Item = ControlResponse;

    fn next(&mut self) -> Option<ControlResponse> {
        match self {
            Self::One(response) => response.take().map(|response| *response),
            Self::Pages(pages) => pages.next(),
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error(transparent)]
    Overlay(#[from] MountError),
    #[error(transparent)]
    View(#[from] ViewError),
    #[error(transparent)]
    Views(#[from] ViewsError),
    #[error("{path} is not a store path of {dir}")]
    Path { path: String, dir: String },
    #[error(transparent)]
    Sealed(#[from] SealedError),
    #[error(transparent)]
    Pinning(#[from] PinningError),
    #[error("nothing is pinned under the name {name:?}")]
    NoPins { name: String },
    #[error("{count} paths of the closure are not in the lake: {some}")]
    Missing { count: usize, some: String },
    #[error("an upper directory needs a work directory, and the other way round")]
    Halves,
    #[error("the daemon is stopping")]
    Stopping,
}

impl ControlError {
    fn kind(&self) -> ControlErrorKind {
        match self {
            Self::Path { .. } | Self::Halves => ControlErrorKind::Invalid,
            Self::Missing { .. }
            | Self::Sealed(SealedError::Missing { .. })
            | Self::Pinning(PinningError::Missing { .. })
            | Self::NoPins { .. } => ControlErrorKind::NotFound,
            Self::Pinning(PinningError::Cache(PinError::Name { .. })) => ControlErrorKind::Invalid,
            Self::Pinning(PinningError::Load { .. } | PinningError::Cache(_)) => ControlErrorKind::Failed,
            Self::Sealed(SealedError::Unverified) => ControlErrorKind::Unavailable,
            Self::Sealed(SealedError::Load { .. } | SealedError::Image(_)) => ControlErrorKind::Failed,
            Self::Stopping => ControlErrorKind::Unavailable,
            Self::Views(ViewsError::Invalid { .. } | ViewsError::Token { .. }) => ControlErrorKind::Invalid,
            Self::Views(ViewsError::Unknown { .. }) => ControlErrorKind::NotFound,
            Self::Views(ViewsError::State(_)) => ControlErrorKind::Failed,
            Self::View(ViewError::Overlay(error))
            | Self::Views(ViewsError::View(ViewError::Overlay(error)) | ViewsError::Mount(error))
            | Self::Sealed(SealedError::View(ViewError::Overlay(error)) | SealedError::Mount(error))
            | Self::Pinning(PinningError::View(ViewError::Overlay(error)))
            | Self::Overlay(error) => match error {
                MountError::Refused { .. } => ControlErrorKind::Invalid,
                MountError::Unknown { .. } => ControlErrorKind::NotFound,
                MountError::Busy { .. } => ControlErrorKind::Busy,
                MountError::Late { .. } => ControlErrorKind::Unavailable,
                MountError::Kernel { .. } => ControlErrorKind::Failed,
            },
            Self::View(error)
            | Self::Views(ViewsError::View(error))
            | Self::Sealed(SealedError::View(error))
            | Self::Pinning(PinningError::View(error)) => {
                if error.is_outage() {
                    ControlErrorKind::Unavailable
                } else {
                    ControlErrorKind::Failed
                }
            }
        }
    }
}

fn invalid(message: &str) -> ControlResponse {
    ControlResponse::Error { kind: ControlErrorKind::Invalid, message: message.into() }
}
