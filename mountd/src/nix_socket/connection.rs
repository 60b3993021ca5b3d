//! One client: its handshake, its requests as they come in, and what it is sent.
//!
//! Every wait inside a message is bounded, and so is what is kept of one that has not all come.

use std::io;
use std::time::Duration;

use narlake_format::error::FormatError;
use narlake_format::nix::store_path::StoreDir;
use narlake_format::nix::worker::{Decoded, Features, Handshake, Reply, Request, Trust, WorkerError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::NAME;
use crate::fs::nar::NarFailure;

/// Time for a client to say who it is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for a request to arrive once it has begun, or for an answer to be taken.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a connection ended before its client closed it.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("talk to the client")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] WorkerError),
    #[error("client took too long")]
    Slow,
    #[error("client closed the connection inside a message")]
    CutOff,
    #[error("a NAR broke off after {sent} bytes")]
    Nar {
        sent: u64,
        #[source]
        source: NarFailure,
    },
}

/// A client that is being talked to.
pub(super) struct Connection {
    stream: UnixStream,
    /// What has arrived and is not yet used.
    buffer: Vec<u8>,
    /// What requests and replies look like, once the handshake is done.
    features: Features,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), features: Features::default() }
    }

    /// False if the client left without saying anything.
    pub(super) async fn handshake(&mut self) -> Result<bool, ConnectionError> {
        let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.greet()).await;
        greeted.unwrap_or(Err(ConnectionError::Slow))
    }

    async fn greet(&mut self) -> Result<bool, ConnectionError> {
        let mut handshake = Handshake::new(NAME, Trust::NotTrusted);
        let mut begun = false;
        loop {
            let mut out = Vec::new();
            match handshake.step(&self.buffer, &mut out) {
                Ok(Decoded::Complete { value, length }) => {
                    begun = true;
                    self.buffer.drain(..length);
                    self.stream.write_all(&out).await?;
                    if let Some(session) = value {
                        self.features = session.features;
                        return Ok(true);
                    }
                }
                Ok(Decoded::Incomplete { .. }) => {
                    if self.stream.read_buf(&mut self.buffer).await? == 0 {
                        let silent = !begun && self.buffer.is_empty();
                        return if silent { Ok(false) } else { Err(ConnectionError::CutOff) };
                    }
                }
                Err(error) => {
                    // Why, if the client is one that can be told.
                    self.stream.write_all(&out).await?;
                    return Err(error.into());
                }
            }
        }
    }

    /// The next request; none if the client closed.
    pub(super) async fn request(
        &mut self,
        dir: &StoreDir,
    ) -> Result<Option<Result<Request, FormatError>>, ConnectionError> {
        // A client may be silent as long as it likes between requests, not inside one.
        if self.buffer.is_empty() && self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Ok(None);
        }
        let arrived = tokio::time::timeout(MESSAGE_TIMEOUT, self.rest_of_request(dir)).await;
        match arrived.unwrap_or(Err(ConnectionError::Slow)) {
            Ok(request) => Ok(Some(request)),
            Err(ConnectionError::Protocol(error)) => {
                // Where the next request starts is not known: say why, then close.
                let reply = Reply::Error(error.to_string());
                self.send(|out| reply.encode(dir, out)).await?;
                Err(error.into())
            }
            Err(error) => Err(error),
        }
    }

    async fn rest_of_request(&mut self, dir: &StoreDir) -> Result<Result<Request, FormatError>, ConnectionError> {
        loop {
            match Request::decode(dir, self.features, &self.buffer)? {
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

    pub(super) async fn send(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        encode(&mut out);
        self.send_bytes(&out).await
    }

    pub(super) async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let sent = tokio::time::timeout(MESSAGE_TIMEOUT, self.stream.write_all(bytes)).await;
        Ok(sent.map_err(|_| ConnectionError::Slow)??)
    }
}
