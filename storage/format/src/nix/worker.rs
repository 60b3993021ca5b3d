//! The worker protocol: how Nix talks to a daemon, as far as a read-only lower store needs it.
//!
//! Versions 1.33 to 1.38, advertised as 1.38, which is what Nix 2.26 to 2.36 speak with such a server, with the one feature
//! that a lower store has a use for ([`Features`]).
//! After the [`handshake`] the client sends one [`request`] at a time and waits for its [`reply`]; whoever serves the
//! socket appends what it reads to a buffer and calls the decoders again until they are complete. No reply carries log
//! messages. docs/format/worker-protocol.md lists every message byte for byte.
//!
//! [`wire`] has the two primitives that all messages are made of: a number is a `u64`, little endian; a string is its
//! length, its bytes, and zeros up to a multiple of 8.

pub mod handshake;
pub mod reply;
pub mod request;
pub mod wire;

pub use handshake::{Features, Handshake, Session, Trust, Version};
pub use reply::{Missing, PathInfo, Realised, Reply};
pub use request::{Operation, Request};
pub use wire::Decoded;

use crate::error::FormatError;

/// Ends the log messages before a reply.
pub const STDERR_LAST: u64 = 0x616c_7473;
/// Starts an error in place of a reply.
pub const STDERR_ERROR: u64 = 0x6378_7470;

/// Why a connection cannot go on: nobody knows any more where the next message starts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkerError {
    /// The client did not start with the protocol's magic number.
    #[error("client speaks another protocol, it started with {magic:#x}")]
    Magic {
        /// What it sent.
        magic: u64,
    },
    /// The client's version is too old, or has another major number.
    #[error(
        "client speaks version {version} of the worker protocol, this server speaks {} to {}",
        Version::MIN,
        Version::MAX
    )]
    Version {
        /// Its version.
        version: Version,
    },
    /// The client asks for an operation that this server does not have; how long the request is cannot be known.
    #[error("operation {code} is not supported by this store")]
    Operation {
        /// The operation's number.
        code: u64,
    },
    /// A message is longer than a limit, or its framing is broken.
    #[error("malformed worker protocol message")]
    Frame {
        /// What is wrong; offsets count from the start of the message.
        #[source]
        source: FormatError,
    },
}

#[cfg(test)]
mod tests;
