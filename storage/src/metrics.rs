//! Every metric of the engine: name, type, unit and why it is there. The registry is passed in; labels come from closed
//! sets. docs/metrics.md lists the same names.

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, exponential_buckets,
};

/// Metrics of requests to the bucket.
#[derive(Debug, Clone)]
pub struct BucketMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    retries: IntCounterVec,
    read_bytes: IntCounter,
    written_bytes: IntCounter,
}

impl BucketMetrics {
    pub(crate) fn request(&self, operation: &'static str, failed: bool, took: Duration) {
        self.requests.with_label_values(&[operation, if failed { "error" } else { "ok" }]).inc();
        self.seconds.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    pub(crate) fn retried(&self, operation: &'static str) {
        self.retries.with_label_values(&[operation]).inc();
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.read_bytes.inc_by(bytes);
    }

    pub(crate) fn written(&self, bytes: u64) {
        self.written_bytes.inc_by(bytes);
    }
}

/// All metrics of the engine.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Requests to the bucket.
    pub bucket: BucketMetrics,
    /// NAR bytes taken in.
    pub ingest_nar_bytes: IntCounter,
    /// Chunks met while taking NARs in, by whether the lake had them (`known`) or not (`new`).
    pub ingest_chunks: IntCounterVec,
    /// Scrubbed bytes of new chunks, before compression.
    pub ingest_new_bytes: IntCounter,
    /// Time to take one NAR in and make it durable.
    pub ingest_seconds: Histogram,
    /// References of published paths whose hash scrubbing never met in the NAR: what the pattern rule misses.
    pub scrub_missed_references: IntCounter,
    /// Paths published, by outcome (`new`, `known`, `not_reproducible`).
    pub published: IntCounterVec,
    /// Packs written.
    pub packs_written: IntCounter,
    /// Bytes of packs written.
    pub packs_written_bytes: IntCounter,
    /// NAR bytes assembled and given out.
    pub export_nar_bytes: IntCounter,
    /// Content that did not verify when read. Anything but zero needs a person.
    pub verification_failures: IntCounter,
    /// Chunks, parts and tables that the index finds.
    pub index_blobs: IntGauge,
    /// Packs that the index covers.
    pub index_packs: IntGauge,
    /// Times that local state was set aside and rebuilt from the bucket.
    pub index_rebuilds: IntCounter,
    /// 1 where the bucket refuses a create of a taken key, else 0.
    pub bucket_conditional_create: IntGauge,
    /// The bucket's clock minus this host's, at the last probe.
    pub bucket_clock_offset_seconds: IntGauge,
}

impl Metrics {
    /// Registers every metric of the engine.
    ///
    /// # Panics
    /// Where the registry already holds one of these names: two engines in one registry are a mistake of the program.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        let register = Register(registry);
        let latency = exponential_buckets(0.0005, 2.0, 18).expect("buckets grow");
        Self {
            bucket: BucketMetrics {
                requests: register.counters(
                    "narlake_bucket_requests_total",
                    "Requests to the bucket, attempts counted one by one.",
                    &["operation", "result"],
                ),
                seconds: register.histograms(
                    "narlake_bucket_request_seconds",
                    "Time to the bucket's answer, per attempt.",
                    &["operation"],
                    latency.clone(),
                ),
                retries: register.counters(
                    "narlake_bucket_retries_total",
                    "Requests to the bucket that were repeated.",
                    &["operation"],
                ),
                read_bytes: register.counter("narlake_bucket_read_bytes_total", "Bytes read from the bucket."),
                written_bytes: register.counter("narlake_bucket_written_bytes_total", "Bytes written to the bucket."),
            },
            ingest_nar_bytes: register.counter("narlake_ingest_nar_bytes_total", "NAR bytes taken in."),
            ingest_chunks: register.counters(
                "narlake_ingest_chunks_total",
                "Chunks met while taking NARs in, by whether the lake had them.",
                &["state"],
            ),
            ingest_new_bytes: register.counter(
                "narlake_ingest_new_bytes_total",
                "Bytes of chunks that the lake did not have, before compression.",
            ),
            ingest_seconds: register.histogram(
                "narlake_ingest_seconds",
                "Time to take one NAR in and make it durable.",
                exponential_buckets(0.001, 2.0, 20).expect("buckets grow"),
            ),
            scrub_missed_references: register.counter(
                "narlake_scrub_missed_references_total",
                "References of published paths whose hash scrubbing never met in the NAR.",
            ),
            published: register.counters("narlake_published_total", "Paths published, by outcome.", &["outcome"]),
            packs_written: register.counter("narlake_packs_written_total", "Packs written."),
            packs_written_bytes: register.counter("narlake_packs_written_bytes_total", "Bytes of packs written."),
            export_nar_bytes: register.counter("narlake_export_nar_bytes_total", "NAR bytes assembled and given out."),
            verification_failures: register
                .counter("narlake_verification_failures_total", "Content that did not verify when it was read."),
            index_blobs: register.gauge("narlake_index_blobs", "Chunks, parts and tables that the index finds."),
            index_packs: register.gauge("narlake_index_packs", "Packs that the index covers."),
            index_rebuilds: register.counter(
                "narlake_index_rebuilds_total",
                "Times that local state was set aside and rebuilt from the bucket.",
            ),
            bucket_conditional_create: register.gauge(
                "narlake_bucket_conditional_create",
                "1 where the bucket refuses a create of a taken key, else 0.",
            ),
            bucket_clock_offset_seconds: register.gauge(
                "narlake_bucket_clock_offset_seconds",
                "The clock of the bucket minus that of this host, at the last probe.",
            ),
        }
    }
}

struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<C: prometheus::core::Collector + Clone + 'static>(&self, collector: prometheus::Result<C>) -> C {
        let collector = collector.expect("names and labels are well-formed");
        self.0.register(Box::new(collector.clone())).expect("each name is registered once");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: Vec<f64>) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels))
    }
}

/// Counters of a fetch engine, to be registered by whoever has a page for them. Cloning shares them.
#[derive(Debug, Clone)]
pub struct FetchMetrics {
    /// Ranged reads of packs.
    pub requests: IntCounter,
    /// Bytes those returned.
    pub bytes: IntCounter,
    /// Frames decoded.
    pub frames: IntCounter,
    /// Questions where blobs are.
    pub locates: IntCounter,
    /// Bytes of frames that were read before anybody asked for them.
    pub ahead_bytes: IntCounter,
    /// Bytes of those that somebody asked for afterwards.
    pub ahead_used_bytes: IntCounter,
    /// Reads that were asked for a second time because the first took long.
    pub hedges: IntCounter,
    /// Reads of those in which the second answer came first.
    pub hedges_won: IntCounter,
}

impl FetchMetrics {
    /// Counters that are on no page.
    #[must_use]
    pub fn unregistered() -> Self {
        let counter = |name: &str| {
            // The names are here, and well-formed: a mistake is ours, and any test meets it.
            IntCounter::new(name, name).unwrap_or_else(|error| panic!("define {name}: {error}"))
        };
        Self {
            requests: counter("requests"),
            bytes: counter("bytes"),
            frames: counter("frames"),
            locates: counter("locates"),
            ahead_bytes: counter("ahead_bytes"),
            ahead_used_bytes: counter("ahead_used_bytes"),
            hedges: counter("hedges"),
            hedges_won: counter("hedges_won"),
        }
    }
}
