//! The HTTP side: routes, layers, and what every handler shares.
//!
//! A handler extracts, calls one verb of the [`Lake`], and responds; what a failure means to the client is decided in
//! [`error`] alone. Layers, outermost first: [`observe`] gives the request its id, counts and logs it and writes the
//! body of a failure; a panic below it becomes a failure; [`guard`] lets only those push who may, before a byte of the
//! body is read.
//!
//! A cache's resources are found below `/<cache>/`, those of the default cache also at the root. No cache can be named
//! like one of the root's own words ([`CacheName`](narlake_format::lake::config::CacheName)).

pub mod body;
pub mod buffers;
pub mod cache_info;
pub mod connection;
pub mod error;
pub mod guard;
pub mod health;
pub mod lake;
pub mod listing;
pub mod log;
pub mod metrics_page;
pub mod nar;
pub mod narinfo;
pub mod observe;
pub mod range;
pub mod realisation;
pub mod serve;
pub mod target;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use narlake_storage::{Cache, Lake};
use tokio::sync::{AcquireError, Semaphore};
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;

use self::buffers::Buffers;
use self::error::HttpError;
use crate::auth::Tokens;
use crate::config::Limits;
use crate::metrics::Metrics;
use crate::signing::Signers;

/// What every handler shares.
pub type Shared = Arc<State>;

/// The parts that requests are served with.
pub struct State {
    /// The engine.
    pub lake: Lake,
    /// The default cache.
    pub cache: Cache,
    /// Its name.
    pub cache_name: String,
    /// Its priority among substituters.
    pub priority: u32,
    /// The keys to sign with.
    pub signers: Signers,
    /// Who may push.
    pub tokens: Tokens,
    /// Bounds on requests.
    pub limits: Limits,
    /// One permit for each upload that may be under way.
    pub uploads: Semaphore,
    /// One permit for each download of a NAR that may be under way.
    pub downloads: Arc<Semaphore>,
    /// How long a URL is valid with which a pack is read straight from the bucket; `None` if none are given out.
    pub pack_url_valid: Option<Duration>,
    /// Memory for the bodies of pushes.
    pub pushes: Buffers,
    /// Memory for the questions and answers of readers.
    pub answers: Buffers,
    /// Turns to read a log: how long one is is known only once it has been read.
    pub logs: Semaphore,
    /// Commits under way, which outlive their requests.
    pub commits: TaskTracker,
    /// The metrics.
    pub metrics: Metrics,
    /// Distinguishes the request ids of this run of the server from those of others.
    pub run: u32,
}

/// Waits for one of a limited number of places. Cancel safe.
async fn place<P>(
    wait: Duration,
    place: impl Future<Output = Result<P, AcquireError>>,
    what: &str,
) -> Result<P, HttpError> {
    // Never closed, so where there is none the time is up.
    tokio::time::timeout(wait, place).await.ok().and_then(Result::ok).ok_or_else(|| HttpError::busy(what))
}

/// Every route with its layers.
pub fn router(shared: &Shared) -> Router {
    for route in ROUTES {
        shared.metrics.know_route(route);
    }
    Router::new()
        .route("/health", get(health::get))
        .route("/metrics", get(metrics_page::get))
        .route("/public-key", get(cache_info::public_key))
        .nest("/api/v1", lake())
        .merge(cache())
        .nest("/{cache}", cache())
        .fallback(async || HttpError::not_found("there is nothing at this URL"))
        .method_not_allowed_fallback(async || {
            HttpError::refused(StatusCode::METHOD_NOT_ALLOWED, "not with this method")
        })
        .layer(from_fn_with_state(Arc::clone(shared), guard::guard))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(from_fn_with_state(Arc::clone(shared), observe::observe))
        .layer(from_fn(body::linger))
        // Each handler bounds what it reads (`body`); NARs are not collected at all.
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::clone(shared))
}

/// A Nix binary cache.
fn cache() -> Router<Shared> {
    Router::new()
        .route("/nix-cache-info", get(cache_info::get).put(cache_info::put))
        .route("/{file}", get(target::get_object).put(target::put_object))
        .route("/nar/{file}", get(nar::get).head(nar::head).put(nar::put))
        .route("/log/{drv}", get(log::get).put(log::put))
        .route("/realisations/{id}", get(realisation::get).put(realisation::put))
        .route("/build-trace-v2/{drv}/{output}", get(realisation::get_by_path).put(realisation::put_by_path))
}

/// The lake API, between the server and the other narlake programs (`narlake_format::api`).
fn lake() -> Router<Shared> {
    Router::new()
        .route("/info", get(lake::info))
        .route("/paths/{hash}", get(lake::path))
        .route("/closure", post(lake::closure))
        .route("/missing", post(lake::missing))
        .route("/locate", post(lake::locate))
        .route("/packs/{domain}/{id}", get(lake::pack))
        .route("/packs/{domain}/{id}/url", get(lake::pack_url))
}

/// The patterns that logs and metrics know requests by; both places of a cache's resources share one.
const ROUTES: [&str; 19] = [
    "/health",
    "/metrics",
    "/public-key",
    "/nix-cache-info",
    "/{hash}.narinfo",
    "/{hash}.ls",
    "/nar/{file}",
    "/log/{drv}",
    "/realisations/{id}",
    "/build-trace-v2/{drv}/{output}",
    "/api/v1/info",
    "/api/v1/paths/{hash}",
    "/api/v1/closure",
    "/api/v1/missing",
    "/api/v1/locate",
    "/api/v1/packs/{domain}/{id}",
    "/api/v1/packs/{domain}/{id}/url",
    "/{file}",
    OTHER,
];

/// The pattern of requests that match none.
const OTHER: &str = "other";

/// The pattern of a request, from what the router matched and the path itself.
fn pattern(matched: Option<&str>, path: &str) -> &'static str {
    let matched = matched.unwrap_or_default();
    let matched = matched.strip_prefix("/{cache}").unwrap_or(matched);
    let matched = match matched {
        "/{file}" if path.ends_with(".narinfo") => "/{hash}.narinfo",
        "/{file}" if path.ends_with(".ls") => "/{hash}.ls",
        matched => matched,
    };
    ROUTES.into_iter().find(|route| *route == matched).unwrap_or(OTHER)
}
