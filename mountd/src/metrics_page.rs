//! `/metrics` over HTTP, for Prometheus: one small page, so one small server.
//!
//! A request's head is read up to a bound and a deadline, answered, and the connection closed.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::Metrics;

/// Longest head of a request, in bytes.
const HEAD_MAX: usize = 8 * 1024;

/// Longest time for a request and its answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connections at once; further ones are closed.
const CONNECTIONS_MAX: usize = 16;

/// Serves the page until told to stop.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    stop: CancellationToken,
) -> std::io::Result<impl Future<Output = ()>> {
    let listener = TcpListener::bind(address).await?;
    Ok(async move {
        let tracker = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) if tracker.len() < CONNECTIONS_MAX => {
                    let metrics = metrics.clone();
                    tracker.spawn(async move {
                        // Whoever left half-way did not want the page.
                        let _ = tokio::time::timeout(TIMEOUT, answer(stream, &metrics)).await;
                    });
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "accept a connection for metrics");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

async fn answer(mut stream: TcpStream, metrics: &Metrics) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let (status, body) = respond(line, metrics);
    let header = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(header.as_bytes()).await?;
    if !line.starts_with(b"HEAD ") {
        stream.write_all(&body).await?;
    }
    stream.shutdown().await
}

fn respond(line: &[u8], metrics: &Metrics) -> (&'static str, Vec<u8>) {
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    match (method, path) {
        (b"GET" | b"HEAD", b"/metrics") => ("200 OK", metrics.page()),
        (b"GET" | b"HEAD", _) => ("404 Not Found", b"the metrics are at /metrics\n".to_vec()),
        _ => ("405 Method Not Allowed", b"only GET\n".to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, status: &str) {
        assert_eq!(respond(line.as_bytes(), &Metrics::new()).0, status, "{line}");
    }

    #[test]
    fn one_page() {
        check("GET /metrics HTTP/1.1", "200 OK");
        check("HEAD /metrics?x=1 HTTP/1.1", "200 OK");
        check("GET / HTTP/1.1", "404 Not Found");
        check("POST /metrics HTTP/1.1", "405 Method Not Allowed");
        check("", "405 Method Not Allowed");
    }

    /// Every family has a zero from the start, in the form that Prometheus parses.
    #[test]
    fn the_page_has_every_metric() {
        let page = String::from_utf8(Metrics::new().page()).unwrap();
        for name in
            ["cache_bytes", "fuse_requests_total", "read_bytes_total", "server_up", "deadline_expirations_total"]
        {
            assert!(page.contains(&format!("# TYPE narlake_mountd_{name} ")), "{name}");
        }
        assert!(page.contains("narlake_mountd_fuse_requests_total{op=\"lookup\"} 0"));
    }
}
