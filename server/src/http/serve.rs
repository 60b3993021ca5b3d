//! Connections: accepting them, bounding what they may cost, and ending them.
//!
//! HTTP/1.1 and HTTP/2 on one port, told apart by their first bytes. A connection that sends nothing is closed after
//! the header timeout, one that does not take what we send after the body's idle timeout ([`connection`](super::connection));
//! the size of a request's head is bounded; there are never more than `limits.connections_max` connections, later ones
//! wait in the listen queue.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::connection::{End, Timed, Watch};
use crate::config::Limits;
use crate::metrics::{InFlight, Metrics};

/// Largest head of a request, in bytes. The paths of Nix have 300.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 256;
/// How long to wait before accepting again when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who a request came from; an extension of it.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Serves connections until told to stop, then lets requests under way end, and breaks those off that do not in time.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, metrics: Metrics, stop: CancellationToken) {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout()).max_buf_size(HEAD_BYTES_MAX);
    http.http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(limits.body_idle_timeout())
        .keep_alive_timeout(limits.header_timeout());
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, peer, place)) = accepted else { continue };
        let router = router.clone();
        let watch = Watch::new(&limits);
        let watched = Arc::clone(&watch);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            let router = router.clone();
            let ticket = watched.request(request.version());
            async move {
                let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
                Ok::<_, Infallible>(response.map(|body| ticket.watch(body)))
            }
        });
        let stream = Timed::new(stream, limits.header_timeout(), limits.body_idle_timeout());
        let connection = http.serve_connection(TokioIo::new(stream), service).into_owned();
        let open = InFlight::of(&metrics.connections);
        let (stop, idle) = (stop.clone(), limits.body_idle_timeout());
        connections.spawn(async move {
            let _held = (place, open);
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                done = connection.as_mut() => Some(done),
                () = stop.cancelled() => None,
                end = watch.end() => match end {
                    End::Stuck => Some(Err("its client does not take what it is sent".into())),
                    End::Idle => None,
                },
            };
            let ended = match ended {
                Some(done) => done,
                None => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        done = connection => done,
                        () = watch.stuck() => Err("its client does not take what it is sent".into()),
                        // What is left of an answer may still be on its way; while stopping, requests may take longer.
                        () = sleep(idle), if !stop.is_cancelled() => Err("its client does not end it".into()),
                    }
                }
            };
            if let Err(error) = ended {
                // What a handler did was logged there; this is the client going away, or talking something else.
                tracing::debug!(%peer, %error, "connection ended");
            }
        });
    }
    drop(listener);
    tracing::info!(connections = connections.len(), seconds = limits.drain_s, "draining");
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.drain(), drained).await.is_err() {
        tracing::warn!(connections = connections.len(), "breaking off requests that did not end in time");
    }
    connections.shutdown().await;
}

type Accepted = (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> Option<Accepted> {
    // Never closed, so this only waits.
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => {
            // Answers are written whole; waiting for more of them only adds latency.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%peer, %error, "no TCP_NODELAY");
            }
            Some((stream, peer, place))
        }
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}
