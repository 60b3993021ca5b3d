//! What the daemon counts, in one registry. docs/metrics.md has a line for each.
//!
//! Names are `narlake_mountd_<what>_<unit>`; labels come from closed sets, never from paths.

use narlake_storage::fetch::FetchMetrics;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

/// Upper bounds of the latency histograms, in seconds: from an answer out of memory to the fetch deadline.
const SECONDS: &[f64] = &[0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// The operations that are counted by name; all others of the kernel are `other`.
const OPERATIONS: &[&str] = &[
    "lookup",
    "getattr",
    "readlink",
    "read",
    "readdir",
    "readdirplus",
    "statfs",
    "open",
    "opendir",
    "flush",
    "access",
    "getxattr",
    "listxattr",
    "lseek",
    "ioctl",
];

/// All metrics of the daemon. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Messages of the kernel, by operation.
    pub fuse_requests: IntCounterVec,
    /// Operations that ended in an error other than "no such entry", by operation.
    pub fuse_errors: IntCounterVec,
    /// Messages that came again because a daemon had died with them.
    pub fuse_resent: IntCounter,
    /// Those of them that two daemons had died with, answered with an error.
    pub fuse_poison: IntCounter,
    /// Time from an operation's arrival to its answer, by operation.
    pub fuse_seconds: HistogramVec,
    /// Operations that ran into their deadline.
    pub deadline_expirations: IntCounter,
    /// Bytes answered to reads.
    pub read_bytes: IntCounter,
    /// Bytes of those that came from the local cache.
    pub cache_hit_bytes: IntCounter,
    /// Bytes of content that were fetched for the cache.
    pub cache_fill_bytes: IntCounter,
    /// Bytes the cache has on disk.
    pub cache_bytes: IntGauge,
    /// Most bytes it may have.
    pub cache_limit_bytes: IntGauge,
    /// Files in the cache.
    pub cache_files: IntGauge,
    /// Files evicted.
    pub cache_evictions: IntCounter,
    /// Bytes of it that were evicted and are still open.
    pub cache_lingering_bytes: IntGauge,
    /// Bytes of files that stay.
    pub cache_pinned_bytes: IntGauge,
    /// Files put back instead of evicted.
    pub cache_spared: IntCounter,
    /// Bytes read to find damage.
    pub cache_scrubbed_bytes: IntCounter,
    /// Fills that could not be kept.
    pub cache_not_kept: IntCounter,
    /// Cached files that were found damaged.
    pub cache_damaged: IntCounter,
    /// Requests to the server, by what for and how they ended.
    pub remote_requests: IntCounterVec,
    /// Bytes received from the server.
    pub remote_received_bytes: IntCounter,
    /// Time of one request to the server, attempts that failed included.
    pub remote_seconds: Histogram,
    /// What the fetch engine moves.
    pub fetch: FetchMetrics,
    /// Records refused because no trusted key signed them.
    pub records_untrusted: IntCounter,
    /// Store objects with a nodeid.
    pub objects: IntGauge,
    /// Trees loaded.
    pub trees_loaded: IntCounter,
    /// Images of closures made for sealed views.
    pub images_made: IntCounter,
    /// Bytes that trees of store objects take on disk.
    pub tree_bytes: IntGauge,
    /// Names that the kernel was told do not exist, and that are remembered.
    pub negative_names: IntGauge,
    /// Views beside the daemon's own.
    pub views: IntGauge,
    /// Overlays over the mount.
    pub overlays: IntGauge,
    /// Refreshes of overlays.
    pub overlay_refreshes: IntCounter,
    /// Paths that became visible after the kernel had been told they do not exist.
    pub paths_healed: IntCounter,
    /// Connections to the Nix socket.
    pub nix_connections: IntGauge,
    /// Requests on the Nix socket, by operation.
    pub nix_requests: IntCounterVec,
    /// Requests on the Nix socket that were answered with an error.
    pub nix_errors: IntCounter,
    /// Connections to Nix sockets by users who may not.
    pub nix_refused: IntCounter,
    /// Realisations taken as absent because no trusted key signed them.
    pub realisations_untrusted: IntCounter,
    /// Time from an `ensure` to its answer.
    pub ensure_seconds: Histogram,
    /// Store paths uploaded for builds.
    pub push_paths: IntCounter,
    /// Bytes of NAR uploaded for them.
    pub push_bytes: IntCounter,
    /// Tries of that which failed.
    pub push_errors: IntCounter,
    /// Builds that were not queued.
    pub push_dropped: IntCounter,
    /// Builds that wait.
    pub push_queue_entries: IntGauge,
    /// How long the oldest has waited, in seconds.
    pub push_oldest_seconds: IntGauge,
    /// Builds that were given up.
    pub push_failed_entries: IntGauge,
    /// 1 while the server answers, 0 after it did not.
    pub server_up: Gauge,
}

impl Metrics {
    /// Metrics in a registry of their own.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let metrics = Self {
            fuse_requests: counters(
                &registry,
                "narlake_mountd_fuse_requests_total",
                "Messages of the kernel, by operation",
                &["op"],
            ),
            fuse_errors: counters(
                &registry,
                "narlake_mountd_fuse_errors_total",
                "Operations that ended in an error other than no such entry, by operation",
                &["op"],
            ),
            fuse_resent: counter(
                &registry,
                "narlake_mountd_fuse_resent_total",
                "Messages that came again because a daemon had died with them",
            ),
            fuse_poison: counter(
                &registry,
                "narlake_mountd_fuse_poison_total",
                "Messages that two daemons had died with, answered with an error",
            ),
            fuse_seconds: register(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "narlake_mountd_fuse_duration_seconds",
                        "Time from an operation's arrival to its answer, by operation",
                    )
                    .buckets(SECONDS.to_vec()),
                    &["op"],
                ),
            ),
            deadline_expirations: counter(
                &registry,
                "narlake_mountd_deadline_expirations_total",
                "Operations that ran into their deadline",
            ),
            read_bytes: counter(&registry, "narlake_mountd_read_bytes_total", "Bytes answered to reads"),
            cache_hit_bytes: counter(
                &registry,
                "narlake_mountd_cache_hit_bytes_total",
                "Bytes read from the local cache",
            ),
            cache_fill_bytes: counter(
                &registry,
                "narlake_mountd_cache_fill_bytes_total",
                "Bytes of file content fetched",
            ),
            cache_bytes: gauge(&registry, "narlake_mountd_cache_bytes", "Bytes the cache has on disk"),
            cache_limit_bytes: gauge(
                &registry,
                "narlake_mountd_cache_limit_bytes",
                "Most bytes the cache may have on disk",
            ),
            cache_files: gauge(&registry, "narlake_mountd_cache_files", "Files in the cache, complete or not"),
            cache_evictions: counter(&registry, "narlake_mountd_cache_evictions_total", "Files evicted from the cache"),
            cache_lingering_bytes: gauge(
                &registry,
                "narlake_mountd_cache_lingering_bytes",
                "Bytes of evicted files that somebody still has open",
            ),
            cache_pinned_bytes: gauge(
                &registry,
                "narlake_mountd_cache_pinned_bytes",
                "Bytes of pinned files, cached or not",
            ),
            cache_spared: counter(
                &registry,
                "narlake_mountd_cache_spared_total",
                "Files not evicted at first because the kernel had them in memory",
            ),
            cache_scrubbed_bytes: counter(
                &registry,
                "narlake_mountd_cache_scrubbed_bytes_total",
                "Bytes of cached files read in the background to find damage",
            ),
            cache_not_kept: counter(
                &registry,
                "narlake_mountd_cache_not_kept_total",
                "Fills that were served and could not be kept, a full disk for one",
            ),
            cache_damaged: counter(
                &registry,
                "narlake_mountd_cache_damaged_total",
                "Cached files found damaged, and fetched anew",
            ),
            remote_requests: counters(
                &registry,
                "narlake_mountd_remote_requests_total",
                "Requests to the server, by what for and how they ended",
                &["what", "result"],
            ),
            remote_received_bytes: counter(
                &registry,
                "narlake_mountd_remote_received_bytes_total",
                "Bytes received from the server",
            ),
            remote_seconds: histogram(
                &registry,
                "narlake_mountd_remote_duration_seconds",
                "Time of one request to the server",
            ),
            fetch: FetchMetrics {
                requests: counter(&registry, "narlake_mountd_fetch_requests_total", "Ranged reads of packs"),
                bytes: counter(
                    &registry,
                    "narlake_mountd_fetch_bytes_total",
                    "Bytes that ranged reads of packs returned",
                ),
                frames: counter(&registry, "narlake_mountd_fetch_frames_total", "Frames decoded"),
                locates: counter(&registry, "narlake_mountd_fetch_locates_total", "Questions where blobs are"),
                ahead_bytes: counter(
                    &registry,
                    "narlake_mountd_fetch_ahead_bytes_total",
                    "Bytes of frames read before anybody asked for them",
                ),
                ahead_used_bytes: counter(
                    &registry,
                    "narlake_mountd_fetch_ahead_used_bytes_total",
                    "Bytes of frames read ahead that somebody asked for afterwards",
                ),
                hedges: counter(
                    &registry,
                    "narlake_mountd_fetch_hedges_total",
                    "Reads of packs asked for a second time because the first took long",
                ),
                hedges_won: counter(
                    &registry,
                    "narlake_mountd_fetch_hedges_won_total",
                    "Reads of packs in which the second request was answered first",
                ),
            },
            records_untrusted: counter(
                &registry,
                "narlake_mountd_records_untrusted_total",
                "Path records refused because no trusted key signed them",
            ),
            objects: gauge(&registry, "narlake_mountd_objects", "Store objects that have a nodeid"),
            trees_loaded: counter(
                &registry,
                "narlake_mountd_trees_loaded_total",
                "Trees of store objects loaded from manifests",
            ),
            images_made: counter(
                &registry,
                "narlake_mountd_images_made_total",
                "Images of closures made for sealed views",
            ),
            tree_bytes: gauge(&registry, "narlake_mountd_tree_bytes", "Bytes that trees of store objects take on disk"),
            negative_names: gauge(
                &registry,
                "narlake_mountd_negative_names",
                "Names that the kernel was told do not exist, and that are remembered",
            ),
            views: gauge(&registry, "narlake_mountd_views", "Views beside the daemon's own"),
            overlays: gauge(&registry, "narlake_mountd_overlays", "Overlays over the mount"),
            overlay_refreshes: counter(&registry, "narlake_mountd_overlay_refreshes_total", "Refreshes of overlays"),
            paths_healed: counter(
                &registry,
                "narlake_mountd_paths_healed_total",
                "Paths made visible after the kernel had been told they do not exist",
            ),
            nix_connections: gauge(&registry, "narlake_mountd_nix_connections", "Connections to the Nix socket"),
            nix_requests: counters(
                &registry,
                "narlake_mountd_nix_requests_total",
                "Requests on the Nix socket, by operation",
                &["op"],
            ),
            nix_errors: counter(
                &registry,
                "narlake_mountd_nix_errors_total",
                "Requests on the Nix socket answered with an error",
            ),
            nix_refused: counter(
                &registry,
                "narlake_mountd_nix_refused_total",
                "Connections to Nix sockets by users who may not",
            ),
            realisations_untrusted: counter(
                &registry,
                "narlake_mountd_realisations_untrusted_total",
                "Realisations taken as absent because no trusted key signed them",
            ),
            ensure_seconds: histogram(
                &registry,
                "narlake_mountd_ensure_duration_seconds",
                "Time from an ensure to its answer",
            ),
            push_paths: counter(&registry, "narlake_mountd_push_paths_total", "Store paths uploaded for builds"),
            push_bytes: counter(&registry, "narlake_mountd_push_bytes_total", "Bytes of NAR uploaded for builds"),
            push_errors: counter(
                &registry,
                "narlake_mountd_push_errors_total",
                "Tries of uploads for builds that failed",
            ),
            push_dropped: counter(
                &registry,
                "narlake_mountd_push_dropped_total",
                "Builds not pushed because the spool was full",
            ),
            push_queue_entries: gauge(&registry, "narlake_mountd_push_queue_entries", "Builds that wait to be pushed"),
            push_oldest_seconds: gauge(
                &registry,
                "narlake_mountd_push_oldest_seconds",
                "How long the oldest of them has waited",
            ),
            push_failed_entries: gauge(
                &registry,
                "narlake_mountd_push_failed_entries",
                "Builds whose push was given up, as far as they are kept",
            ),
            server_up: register(
                &registry,
                Gauge::new("narlake_mountd_server_up", "1 while the server answers, 0 after it did not"),
            ),
            registry,
        };
        for operation in OPERATIONS {
            // So that a query finds a zero, not nothing.
            metrics.fuse_requests.with_label_values(&[*operation]);
            metrics.fuse_errors.with_label_values(&[*operation]);
        }
        #[cfg(target_os = "linux")]
        {
            let process = prometheus::process_collector::ProcessCollector::for_self();
            let _ = metrics.registry.register(Box::new(process));
        }
        metrics
    }

    /// Messages of the kernel so far, by operation, of those that came at all.
    #[must_use]
    pub fn fuse_request_counts(&self) -> Vec<(String, u64)> {
        let count = |operation: &&str| self.fuse_requests.with_label_values(&[*operation]).get();
        let counts = OPERATIONS.iter().map(|operation| ((*operation).to_owned(), count(operation)));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// The page that Prometheus scrapes.
    #[must_use]
    pub fn page(&self) -> Vec<u8> {
        let mut page = Vec::new();
        // Writing to memory does not fail, and families that encode badly are not ours.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut page);
        page
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers a metric. Names are written here, once each: a clash is a mistake of ours that any test meets.
fn register<T: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<T>) -> T {
    let metric = metric.unwrap_or_else(|error| panic!("define metric: {error}"));
    registry.register(Box::new(metric.clone())).unwrap_or_else(|error| panic!("register metric: {error}"));
    metric
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

fn histogram(registry: &Registry, name: &str, help: &str) -> Histogram {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
}
