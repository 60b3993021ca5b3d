//! The Nix socket: the lower store of Nix's local-overlay store, as far as it is asked for metadata.
//!
//! Nix believes this socket without a signature, and copies what it hears into its own database for good. So:
//!
//! - "valid" is said of a path that a trusted key signed and that every overlay shows at this moment
//!   ([`View::valid`]);
//! - "not valid" is said when the server says so, and never because it did not answer: that is an error, which makes
//!   Nix stop instead of building what exists.
//!
//! Each view that Nix may ask about has a socket of its own, and is all that this one answers for. Who may connect is
//! checked ([`Access`]). Requests of a connection are answered one after the other ([`connection`]). The number of
//! connections, the length of a request and the time for a handshake are bounded. Nothing is ever written through this
//! socket.

mod access;
mod connection;

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use narlake_format::error::chain;
use narlake_format::nix::realisation::RealisationKey;
use narlake_format::nix::store_path::StorePath;
use narlake_format::nix::worker::{Missing, PathInfo, Realised, Reply, Request};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::access::{Access, listen};
use self::connection::{Connection, ConnectionError};
use crate::fs::LazyStore;
use crate::fs::nar::Nar;
use crate::metrics::Metrics;
use crate::view::{View, ViewError};

/// Connections at once; further ones wait to be accepted. nix-daemon keeps one for each client process.
const CONNECTIONS_MAX: usize = 512;

/// Clients that are being told that they may not; further ones are not told.
const REFUSALS_MAX: usize = 16;

/// NARs that are being sent at once, of all connections; each takes a megabyte or two of memory.
const NARS_MAX: usize = 16;

/// Longest wait for one's turn to be sent a NAR.
const NAR_TURN_TIMEOUT: Duration = Duration::from_secs(30);

/// What clients are shown as the daemon's version.
const NAME: &str = concat!("narlake-mountd-", env!("CARGO_PKG_VERSION"));

/// Serves a view on a socket.
#[derive(Clone)]
pub struct NixSocket {
    view: View,
    store: LazyStore,
    access: Access,
    nars: Arc<Semaphore>,
    metrics: Metrics,
}

impl NixSocket {
    /// Answers for this view, of which this store shows the content, whoever has access.
    #[must_use]
    pub fn new(view: View, store: LazyStore, access: Access, metrics: &Metrics) -> Self {
        Self { view, store, access, nars: Arc::new(Semaphore::new(NARS_MAX)), metrics: metrics.clone() }
    }

    /// Accepts connections until told to stop, then ends those that are open.
    pub async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        let tracker = TaskTracker::new();
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
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
            match self.access.stranger(&stream) {
                Ok(None) => {}
                Ok(Some(uid)) => {
                    drop(permit);
                    self.refuse(stream, uid, &refusals);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "ask who connects to the Nix socket");
                    continue;
                }
            }
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

    fn refuse(&self, stream: UnixStream, uid: u32, refusals: &Arc<Semaphore>) {
        self.metrics.nix_refused.inc();
        // Whoever tries again and again is counted each time, and logged now and then.
        if self.metrics.nix_refused.get().is_power_of_two() {
            tracing::warn!(uid, "a user who may not connects to the Nix socket");
        }
        if let Ok(turn) = Arc::clone(refusals).try_acquire_owned() {
            tokio::spawn(async move {
                access::refuse(stream, uid).await;
                drop(turn);
            });
        }
    }

    async fn converse(&self, stream: UnixStream) -> Result<(), ConnectionError> {
        let dir = self.view.store_dir();
        let mut connection = Connection::new(stream);
        if !connection.handshake().await? {
            return Ok(());
        }
        while let Some(request) = connection.request(dir).await? {
            let reply = match request {
                Ok(Request::NarFromPath(path)) => match self.send_nar(&path, &mut connection).await? {
                    None => continue,
                    Some(refused) => refused,
                },
                Ok(request) => self.answer(&request).await,
                Err(error) => Reply::Error(format!("malformed request: {error}")),
            };
            if matches!(reply, Reply::Error(_)) {
                self.metrics.nix_errors.inc();
            }
            connection.send(|out| reply.encode(dir, out)).await?;
        }
        Ok(())
    }

    /// Sends the NAR of a path, or gives the reply that says why not. Once the NAR has begun there is no way to say so
    /// but to close.
    async fn send_nar(&self, path: &StorePath, connection: &mut Connection) -> Result<Option<Reply>, ConnectionError> {
        let request = Request::NarFromPath(path.clone());
        self.count(&request);
        let Ok(Ok(_turn)) = tokio::time::timeout(NAR_TURN_TIMEOUT, self.nars.acquire()).await else {
            return Ok(Some(Reply::Error(failure("too many NARs are being sent, try again"))));
        };
        let record = match self.view.valid(path).await {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(Some(self.invalid(path))),
            Err(error) => return Ok(Some(failed(&request, &error))),
        };
        let mut nar: Nar = match self.store.nar(&record).await {
            Ok(nar) => nar,
            Err(error) => return Ok(Some(failed(&request, &error))),
        };
        let mut sent = 0;
        loop {
            match nar.next().await {
                Ok(Some(piece)) => {
                    if sent == 0 {
                        connection.send(|out| Reply::Nar.encode(self.view.store_dir(), out)).await?;
                    }
                    connection.send_bytes(&piece).await?;
                    sent += piece.len() as u64;
                }
                Ok(None) => return Ok(None),
                Err(error) if sent == 0 => return Ok(Some(failed(&request, &error))),
                Err(source) => {
                    self.metrics.nix_errors.inc();
                    return Err(ConnectionError::Nar { sent, source });
                }
            }
        }
    }

    async fn answer(&self, request: &Request) -> Reply {
        self.count(request);
        self.try_answer(request).await.unwrap_or_else(|error| failed(request, &error))
    }

    fn count(&self, request: &Request) {
        self.metrics.nix_requests.with_label_values(&[request.operation().name()]).inc();
    }

    fn invalid(&self, path: &StorePath) -> Reply {
        Reply::Error(format!("path '{}' is not valid", path.display_in(self.view.store_dir())))
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
            Request::QueryValidPaths { paths, .. } => Reply::Paths(view.valid_of(paths).await?),
            Request::QueryPathFromHashPart(hash) => {
                let path = view.find_hash(hash).await?.map(|record| record.info().store_path.clone());
                match path {
                    Some(path) => Reply::Path(view.valid(&path).await?.map(|_| path)),
                    None => Reply::Path(None),
                }
            }
            // Nix asks the upper's own database for these; of the lower it needs none.
            Request::QueryReferrers(_) | Request::QueryValidDerivers(_) => Reply::Paths(Vec::new()),
            Request::QueryRealisation(key) => {
                let found = view.realisation(key).await?;
                match key {
                    RealisationKey::Hash(_) => {
                        Reply::Realisations(found.iter().map(|found| found.to_document(key)).collect())
                    }
                    RealisationKey::Path { .. } => Reply::Realised(found.map(|found| Realised {
                        out_path: found.out_path.clone(),
                        signatures: found.signatures.clone(),
                    })),
                }
            }
            Request::EnsurePath(path) | Request::AddTempRoot(path) => match view.valid(path).await? {
                Some(_) => Reply::Accepted,
                None => self.invalid(path),
            },
            Request::QueryAllValidPaths => Reply::Paths(view.all_paths().await?),
            // What the view does not show, nobody here builds or substitutes.
            Request::QueryMissing(paths) => {
                let valid: HashSet<StorePath> = view.valid_of(paths).await?.into_iter().collect();
                let unknown = paths.iter().filter(|path| !valid.contains(path)).cloned().collect();
                Reply::Missing(Missing { unknown, ..Missing::default() })
            }
            // Sent as it is made (`send_nar`).
            Request::NarFromPath(_) => Reply::Nar,
        })
    }
}

/// Logs why a request is not answered, and makes the reply that says so.
fn failed(request: &Request, error: &dyn std::error::Error) -> Reply {
    let error = chain(error);
    tracing::error!(op = request.operation().name(), error, "request on the Nix socket failed");
    Reply::Error(failure(&error))
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

#[cfg(test)]
mod tests {
    use super::failure;

    #[test]
    fn failures_are_no_answers() {
        assert!(!failure("server answers 404: path 'x' is not valid").contains("is not valid"));
    }
}
