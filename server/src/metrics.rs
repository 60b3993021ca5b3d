//! Every metric of the server: name, type, unit and why it is there. The engine registers its own in the same registry.
//! Labels come from closed sets: route patterns, methods, status codes, the reasons listed here. docs/metrics.md lists
//! the same names.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder as _, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder, exponential_buckets,
};

/// Media type of [`Metrics::render`].
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// All metrics of the server, and the registry they are in.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    storage: narlake_storage::Metrics,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    received_bytes: IntCounterVec,
    sent_bytes: IntCounterVec,
    responses_aborted: IntCounterVec,
    pushes_refused: IntCounterVec,
    /// Requests whose response has not been sent to its end.
    pub requests_in_flight: IntGauge,
    /// Open connections.
    pub connections: IntGauge,
    /// Uploads of NARs being read.
    pub uploads_in_flight: IntGauge,
    /// Uploads of NARs that wait for their turn. More than a moment above 0 asks for another server.
    pub uploads_waiting: IntGauge,
    /// Requests whose handler panicked. Anything but 0 is a bug.
    pub panics: IntCounter,
}

/// Why a push was refused before its content was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It showed no token.
    NoToken,
    /// It showed a token that is none of ours.
    WrongToken,
}

impl Refusal {
    const ALL: [Self; 2] = [Self::NoToken, Self::WrongToken];

    const fn label(self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::WrongToken => "wrong_token",
        }
    }
}

impl Metrics {
    /// Registers every metric of the server, of the engine and of the process in a registry of its own.
    ///
    /// # Panics
    /// Where two metrics have one name, which is a mistake of the program.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let register = Register(&registry);
        let metrics = Self {
            storage: narlake_storage::Metrics::new(&registry),
            requests: register.counters(
                "narlake_server_requests_total",
                "Requests answered, by route pattern, method and status.",
                &["route", "method", "status"],
            ),
            request_seconds: register.add(HistogramVec::new(
                HistogramOpts::new(
                    "narlake_server_request_seconds",
                    "Time from a request's head to the last byte of its response.",
                )
                .buckets(exponential_buckets(0.0005, 2.0, 20).expect("buckets grow")),
                &["route", "method"],
            )),
            received_bytes: register.counters(
                "narlake_server_received_bytes_total",
                "Bytes of request bodies, as received.",
                &["route"],
            ),
            sent_bytes: register.counters("narlake_server_sent_bytes_total", "Bytes of response bodies.", &["route"]),
            responses_aborted: register.counters(
                "narlake_server_responses_aborted_total",
                "Responses that ended early, by whether the server failed or the client went away.",
                &["route", "by"],
            ),
            pushes_refused: register.counters(
                "narlake_server_pushes_refused_total",
                "Pushes refused for their token, or the lack of one.",
                &["reason"],
            ),
            requests_in_flight: register
                .gauge("narlake_server_requests_in_flight", "Requests whose response has not been sent to its end."),
            connections: register.gauge("narlake_server_connections", "Open connections."),
            uploads_in_flight: register.gauge("narlake_server_uploads_in_flight", "Uploads of NARs being read."),
            uploads_waiting: register
                .gauge("narlake_server_uploads_waiting", "Uploads of NARs that are held until others end."),
            panics: register.add(IntCounter::new("narlake_server_panics_total", "Requests whose handler panicked.")),
            registry: registry.clone(),
        };
        for refusal in Refusal::ALL {
            metrics.pushes_refused.with_label_values(&[refusal.label()]);
        }
        let build = register.add(GaugeVec::new(
            Opts::new("narlake_server_build_info", "Always 1; the version is in the label."),
            &["version"],
        ));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        registry.register(Box::new(ProcessCollector::for_self())).expect("each name is registered once");
        metrics
    }

    /// The engine's metrics, in the same registry.
    #[must_use]
    pub const fn storage(&self) -> &narlake_storage::Metrics {
        &self.storage
    }

    /// Makes the series of a route exist before its first request, so that rates start at 0.
    pub fn know_route(&self, route: &str) {
        self.received_bytes.with_label_values(&[route]);
        self.sent_bytes.with_label_values(&[route]);
        for by in ["server", "client"] {
            self.responses_aborted.with_label_values(&[route, by]);
        }
    }

    /// Counts a request whose response has ended.
    pub fn answered(&self, route: &str, method: &str, status: u16, took: Duration, sent: u64) {
        self.requests.with_label_values(&[route, method, &status.to_string()]).inc();
        self.request_seconds.with_label_values(&[route, method]).observe(took.as_secs_f64());
        self.sent_bytes.with_label_values(&[route]).inc_by(sent);
    }

    /// Counts bytes of a request's body.
    pub fn received(&self, route: &str, bytes: u64) {
        self.received_bytes.with_label_values(&[route]).inc_by(bytes);
    }

    /// Counts a response that ended early, because the server failed or else because the client went away.
    pub fn aborted(&self, route: &str, by_server: bool) {
        self.responses_aborted.with_label_values(&[route, if by_server { "server" } else { "client" }]).inc();
    }

    /// Counts a push refused for its token.
    pub fn refused(&self, refusal: Refusal) {
        self.pushes_refused.with_label_values(&[refusal.label()]).inc();
    }

    /// All metrics in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "cannot write the metrics");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts something that is under way, until dropped.
#[derive(Debug)]
pub struct InFlight(IntGauge);

impl InFlight {
    /// Counts one more.
    #[must_use]
    pub fn of(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: prometheus::Result<C>) -> C {
        let collector = collector.expect("names and labels are well-formed");
        self.0.register(Box::new(collector.clone())).expect("each name is registered once");
        collector
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }
}
