//! The exchange of versions that opens a connection, from the server's side.
//!
//! ```text
//! client  magic 0x6e697863
//! server  magic 0x6478696f, version            at once: a client before Nix 2.25 says its version after this
//! client  version
//! client  list of features                     from 1.38
//! server  list of features                     from 1.38
//! client  0, or 1 and a CPU number; 0          CPU affinity and reserved space, both obsolete
//! server  string with the server's name; trust from 1.35; STDERR_LAST
//! ```
//!
//! A client of a version that is not spoken is told so in the form of errors of that version, as the end of its side of
//! the handshake.

use std::fmt;

use super::reply::encode_error;
use super::wire::{Cursor, Decoded, Stop, decode, put_list, put_string, put_u64};
use super::{STDERR_ERROR, STDERR_LAST, WorkerError};
use crate::limits::{WORKER_FEATURE_NAME_MAX, WORKER_FEATURES_MAX};

/// What the client starts with.
pub const MAGIC_CLIENT: u64 = 0x6e69_7863;
/// What the server answers with.
pub const MAGIC_SERVER: u64 = 0x6478_696f;

/// A version of the protocol: major number times 256 plus minor number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Version(pub u64);

impl Version {
    /// The oldest version that this server speaks: the first that carries the server's name.
    pub const MIN: Self = Self(0x121);
    /// The newest, which it advertises.
    pub const MAX: Self = Self(0x126);
    const WITH_ERRORS: Self = Self(0x11a);
    const WITH_TRUST: Self = Self(0x123);
    const WITHOUT_FEATURES: Self = Self(0x125);
    const WITH_FEATURES: Self = Self(0x126);

    const fn major(self) -> u64 {
        self.0 >> 8
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.0 & 0xff)
    }
}

/// Realisations are asked for by the derivation's path, and told without it.
const REALISATION_BY_PATH: &str = "realisation-with-path-not-hash";

/// What both sides can do beyond the version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features {
    /// Realisations are asked for by the derivation's path, not by its hash.
    pub realisation_by_path: bool,
}

impl Features {
    /// Those that this server has.
    pub const ALL: Self = Self { realisation_by_path: true };

    fn names(self) -> Vec<&'static str> {
        if self.realisation_by_path { vec![REALISATION_BY_PATH] } else { Vec::new() }
    }

    /// Those of the server that the client names as well.
    fn common(named: &[&[u8]]) -> Self {
        Self { realisation_by_path: named.contains(&REALISATION_BY_PATH.as_bytes()) }
    }
}

/// What a handshake has agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    /// The lower one of both versions.
    pub version: Version,
    /// What both sides can do.
    pub features: Features,
}

/// What the server says it thinks of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Trust {
    /// It does not say.
    Unknown = 0,
    /// The client may import what nobody signed.
    Trusted = 1,
    /// The client may not.
    NotTrusted = 2,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    Version,
    Features,
    Obsolete,
    Done,
}

/// The server's side of the handshake.
pub struct Handshake {
    state: State,
    session: Session,
    name: Box<str>,
    trust: Trust,
}

impl Handshake {
    /// A handshake that nothing has been said in. The name is what the client shows as the daemon's version.
    #[must_use]
    pub fn new(name: &str, trust: Trust) -> Self {
        let session = Session { version: Version::MAX, features: Features::default() };
        Self { state: State::Magic, session, name: name.into(), trust }
    }

    /// Takes the next step if the buffer holds what the client says for it, and appends the answer to `out`, also where
    /// the step ends in an error.
    ///
    /// `Complete` says how many bytes to drop from the buffer, and carries the session once the handshake is done;
    /// until then, call again.
    pub fn step(&mut self, buffer: &[u8], out: &mut Vec<u8>) -> Result<Decoded<Option<Session>>, WorkerError> {
        decode(buffer, |cursor| {
            match self.state {
                State::Magic => {
                    let magic = cursor.u64()?;
                    if magic != MAGIC_CLIENT {
                        return Err(WorkerError::Magic { magic }.into());
                    }
                    put_u64(out, MAGIC_SERVER);
                    put_u64(out, Version::MAX.0);
                    self.state = State::Version;
                }
                State::Version => self.version(cursor, out)?,
                State::Features => {
                    let named = cursor.list_to(WORKER_FEATURES_MAX, WORKER_FEATURE_NAME_MAX)?;
                    self.session.features = Features::common(&named);
                    put_list(out, Features::ALL.names().iter());
                    self.state = State::Obsolete;
                }
                State::Obsolete => {
                    if cursor.u64()? != 0 {
                        cursor.u64()?;
                    }
                    cursor.u64()?;
                    put_string(out, &self.name);
                    if self.session.version >= Version::WITH_TRUST {
                        put_u64(out, self.trust as u64);
                    }
                    put_u64(out, STDERR_LAST);
                    self.state = State::Done;
                }
                State::Done => {}
            }
            Ok((self.state == State::Done).then_some(self.session))
        })
    }

    fn version(&mut self, cursor: &mut Cursor<'_>, out: &mut Vec<u8>) -> Result<(), Stop> {
        let version = Version(cursor.u64()?);
        if version < Version::MIN || version.major() != Version::MAX.major() {
            let error = WorkerError::Version { version };
            if version >= Version::WITH_ERRORS {
                encode_error(&error.to_string(), out);
            } else {
                put_u64(out, STDERR_ERROR);
                put_string(out, &error.to_string());
                put_u64(out, 1);
            }
            return Err(error.into());
        }
        self.session.version = version.min(Version::MAX);
        let has_features = self.session.version >= Version::WITH_FEATURES;
        self.state = if has_features { State::Features } else { State::Obsolete };
        Ok(())
    }
}

/// All that a server says to a client with which it does not speak, whatever this one says: a handshake of a version
/// in which that does not depend on the client, and the reason in its end's place.
#[must_use]
pub fn refusal(name: &str, reason: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_u64(&mut out, MAGIC_SERVER);
    put_u64(&mut out, Version::WITHOUT_FEATURES.0);
    put_string(&mut out, name);
    put_u64(&mut out, Trust::NotTrusted as u64);
    encode_error(reason, &mut out);
    out
}
