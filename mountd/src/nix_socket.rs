//! The Nix socket: the lower store of Nix's local-overlay store, as far as it is asked for metadata.
//!
//! Nix believes this socket without a signature, and copies what it hears into its own database for good. So:
//!
//! - "valid" is said of a path that a trusted key signed and that every overlay shows at this moment
//!   ([`View::valid`]);
//! - "not valid" is said when the server says so, and never because it did not answer: that is an error, which makes
//!   Nix stop instead of building what exists.
//!
//! Requests of a connection are answered one after the other. The number of connections, the length of a request and
//! the time for a handshake are bounded. Nothing is ever written through this socket.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use narlake_format::error::chain;
use narlake_format::nix::store_path::StorePath;
use narlake_format::nix::worker::{Decoded, Handshake, Missing, PathInfo, Reply, Request, Trust, WorkerError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::Metrics;
use crate::view::{View, ViewError};

/// Connections at once; further ones wait to be accepted. nix-daemon keeps one for each client process.
const CONNECTIONS_MAX: usize = 512;

/// Time for a client to say who it is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for a request to arrive once it has begun, or for an answer to be taken.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// What clients are shown as the daemon's version.
const NAME: &str = concat!("narlake-mountd-", env!("CARGO_PKG_VERSION"));

/// Paths of one `QueryValidPaths` that are looked for at once.
const PATHS_AT_ONCE: usize = 16;

/// Serves a view on a socket.
#[derive(Clone)]
pub struct NixSocket {
    view: View,
    metrics: Metrics,
}

impl NixSocket {
    /// Answers for this view.
    #[must_use]
    pub fn new(view: View, metrics: &Metrics) -> Self {
        Self { view, metrics: metrics.clone() }
    }

    /// Accepts connections until told to stop, then ends those that are open.
    pub async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        let tracker = TaskTracker::new();
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accept(&listener, &permits) => accepted,
            };
            let (stream, permit) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: others have to close first.
                    tracing::warn!(%error, "accept a connection on the Nix socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (socket, stop) = (self.clone(), stop.clone());
            tracker.spawn(async move {
                socket.metrics.nix_connections.inc();
                tokio::select! {
                    () = stop.cancelled() => {}
                    ended = socket.converse(stream) => {
                        if let Err(error) = ended {
                            tracing::warn!(error = chain(&error), "connection to the Nix socket ended");
                        }
                    }
                }
                socket.metrics.nix_connections.dec();
                drop(permit);
            });
        }
        tracker.close();
        tracker.wait().await;
    }

    async fn converse(&self, stream: UnixStream) -> Result<(), ConnectionError> {
        let mut connection = Connection { stream, buffer: Vec::new() };
        let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, connection.handshake()).await;
        if !greeted.unwrap_or(Err(ConnectionError::Slow))? {
            return Ok(());
        }
        while let Some(request) = connection.request(&self.view).await? {
            let reply = match request {
                Ok(request) => self.answer(&request).await,
                Err(error) => Reply::Error(format!("malformed request: {error}")),
            };
            if matches!(reply, Reply::Error(_)) {
                self.metrics.nix_errors.inc();
            }
            connection.send(|out| reply.encode(self.view.store_dir(), out)).await?;
        }
        Ok(())
    }

    async fn answer(&self, request: &Request) -> Reply {
        self.metrics.nix_requests.with_label_values(&[request.operation().name()]).inc();
        match self.try_answer(request).await {
            Ok(reply) => reply,
            Err(error) => {
                let error = chain(&error);
                tracing::error!(op = request.operation().name(), error, "request on the Nix socket failed");
                Reply::Error(failure(&error))
            }
        }
    }

    async fn try_answer(&self, request: &Request) -> Result<Reply, ViewError> {
        let view = &self.view;
        Ok(match request {
            Request::SetOptions => Reply::Done,
            Request::IsValidPath(path) => Reply::Valid(view.valid(path).await?.is_some()),
            Request::QueryPathInfo(path) => {
                let record = view.valid(path).await?;
                Reply::PathInfo(record.map(|record| PathInfo::of(record.info(), 0)))
            }
            Request::QueryValidPaths { paths, .. } => Reply::Paths(self.valid_of(paths).await?),
            Request::QueryPathFromHashPart(hash) => {
                let path = view.find_hash(hash).await?.map(|record| record.info().store_path.clone());
                match path {
                    Some(path) => Reply::Path(view.valid(&path).await?.map(|_| path)),
                    None => Reply::Path(None),
                }
            }
            // Nix asks the upper's own database for these; of the lower it needs none.
            Request::QueryReferrers(_) | Request::QueryValidDerivers(_) => Reply::Paths(Vec::new()),
            Request::QueryRealisation(_) => Reply::Realisations(Vec::new()),
            Request::EnsurePath(path) | Request::AddTempRoot(path) => match view.valid(path).await? {
                Some(_) => Reply::Accepted,
                None => Reply::Error(format!("path '{}' is not valid", path.display_in(view.store_dir()))),
            },
            Request::QueryAllValidPaths => Reply::Paths(view.known_paths()),
            Request::QueryMissing(paths) => {
                let valid = self.valid_of(paths).await?;
                let unknown = paths.iter().filter(|path| !valid.contains(path)).cloned().collect();
                Reply::Missing(Missing { unknown, ..Missing::default() })
            }
            Request::NarFromPath(_) => {
                Reply::Error("NARs are served by the lake's server, not by its mount; use it as a substituter".into())
            }
        })
    }

    async fn valid_of(&self, paths: &[StorePath]) -> Result<Vec<StorePath>, ViewError> {
        let mut valid = Vec::new();
        for some in paths.chunks(PATHS_AT_ONCE) {
            let found = futures::future::try_join_all(some.iter().map(|path| self.view.valid(path))).await?;
            valid.extend(some.iter().zip(found).filter(|(_, record)| record.is_some()).map(|(path, _)| path.clone()));
        }
        Ok(valid)
    }
}

/// What Nix is told when there is no answer. Nix takes the words "is not valid" for one, so they are never in it, also
/// where a server, or a proxy before it, has put them into the text of an error.
fn failure(error: &str) -> String {
    format!("narlake-mountd cannot tell: {}", error.replace("is not valid", "is not-valid"))
}

async fn accept(
    listener: &UnixListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

/// Why a connection ended before its client closed it.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("talk to the client")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] WorkerError),
    #[error("client took too long")]
    Slow,
    #[error("client closed the connection inside a message")]
    CutOff,
}

struct Connection {
    stream: UnixStream,
    /// What has arrived and is not yet used.
    buffer: Vec<u8>,
}

impl Connection {
    /// False if the client left without saying anything.
    async fn handshake(&mut self) -> Result<bool, ConnectionError> {
        let mut handshake = Handshake::new(NAME, Trust::NotTrusted);
        loop {
            let mut out = Vec::new();
            match handshake.step(&self.buffer, &mut out) {
                Ok(Decoded::Complete { value, length }) => {
                    self.buffer.drain(..length);
                    self.stream.write_all(&out).await?;
                    if value.is_some() {
                        return Ok(true);
                    }
                }
                Ok(Decoded::Incomplete { .. }) => {
                    if self.stream.read_buf(&mut self.buffer).await? == 0 {
                        return if self.buffer.is_empty() { Ok(false) } else { Err(ConnectionError::CutOff) };
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next request; none if the client closed.
    async fn request(
        &mut self,
        view: &View,
    ) -> Result<Option<Result<Request, narlake_format::error::FormatError>>, ConnectionError> {
        // A client may be silent as long as it likes between requests, not inside one.
        if self.buffer.is_empty() && self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Ok(None);
        }
        let arrived = tokio::time::timeout(MESSAGE_TIMEOUT, self.rest_of_request(view)).await;
        match arrived.unwrap_or(Err(ConnectionError::Slow)) {
            Ok(request) => Ok(Some(request)),
            Err(ConnectionError::Protocol(error)) => {
                // Where the next request starts is not known: say why, then close.
                let reply = Reply::Error(error.to_string());
                self.send(|out| reply.encode(view.store_dir(), out)).await?;
                Err(error.into())
            }
            Err(error) => Err(error),
        }
    }

    async fn rest_of_request(
        &mut self,
        view: &View,
    ) -> Result<Result<Request, narlake_format::error::FormatError>, ConnectionError> {
        loop {
            match Request::decode(view.store_dir(), &self.buffer)? {
                Decoded::Complete { value, length } => {
                    self.buffer.drain(..length);
                    return Ok(value);
                }
                Decoded::Incomplete { needed } => {
                    // The decoder refuses what goes beyond its limits, so this does not grow for ever. And memory
                    // comes with the bytes, never on the word of a length alone.
                    while self.buffer.len() < needed {
                        self.buffer.reserve((needed - self.buffer.len()).min(64 * 1024));
                        if self.stream.read_buf(&mut self.buffer).await? == 0 {
                            return Err(ConnectionError::CutOff);
                        }
                    }
                }
            }
        }
    }

    async fn send(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        encode(&mut out);
        let sent = tokio::time::timeout(MESSAGE_TIMEOUT, self.stream.write_all(&out)).await;
        Ok(sent.map_err(|_| ConnectionError::Slow)??)
    }
}

/// Listens on a socket that only root reaches. What a process that is gone left there is removed.
///
/// # Errors
/// When another process listens there, or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
        }
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::failure;

    #[test]
    fn failures_are_no_answers() {
        assert!(!failure("server answers 404: path 'x' is not valid").contains("is not valid"));
    }
}
