//! The exchange of versions that opens a connection, from the server's side.
//!
//! ```text
//! client  magic 0x6e697863, version
//! server  magic 0x6478696f, version            at once: the client sends no more before it has this
//! client  list of features                     from 1.38
//! server  list of features, empty              from 1.38
//! client  0, or 1 and a CPU number; 0          CPU affinity and reserved space, both obsolete
//! server  string with the server's name; trust from 1.35; STDERR_LAST
//! ```

use std::fmt;

use super::wire::{Cursor, Decoded, Stop, decode, put_list, put_string, put_u64};
use super::{STDERR_LAST, WorkerError};

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
    const WITH_TRUST: Self = Self(0x123);
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
    Hello,
    Features,
    Obsolete,
    Done,
}

/// The server's side of the handshake.
pub struct Handshake {
    state: State,
    version: Version,
    name: Box<str>,
    trust: Trust,
}

impl Handshake {
    /// A handshake that nothing has been said in. The name is what the client shows as the daemon's version.
    #[must_use]
    pub fn new(name: &str, trust: Trust) -> Self {
        Self { state: State::Hello, version: Version::MAX, name: name.into(), trust }
    }

    /// Takes the next step if the buffer holds what the client says for it, and appends the answer to `out`.
    ///
    /// `Complete` says how many bytes to drop from the buffer, and carries the version once the handshake is done;
    /// until then, call again.
    pub fn step(&mut self, buffer: &[u8], out: &mut Vec<u8>) -> Result<Decoded<Option<Version>>, WorkerError> {
        decode(buffer, |cursor| {
            match self.state {
                State::Hello => self.hello(cursor, out)?,
                State::Features => {
                    cursor.list()?;
                    put_list::<&str>(out, [].into_iter());
                    self.state = State::Obsolete;
                }
                State::Obsolete => {
                    if cursor.u64()? != 0 {
                        cursor.u64()?;
                    }
                    cursor.u64()?;
                    put_string(out, &self.name);
                    if self.version >= Version::WITH_TRUST {
                        put_u64(out, self.trust as u64);
                    }
                    put_u64(out, STDERR_LAST);
                    self.state = State::Done;
                }
                State::Done => {}
            }
            Ok((self.state == State::Done).then_some(self.version))
        })
    }

    fn hello(&mut self, cursor: &mut Cursor<'_>, out: &mut Vec<u8>) -> Result<(), Stop> {
        let magic = cursor.u64()?;
        if magic != MAGIC_CLIENT {
            return Err(WorkerError::Magic { magic }.into());
        }
        let version = Version(cursor.u64()?);
        if version < Version::MIN || version.major() != Version::MAX.major() {
            return Err(WorkerError::Version { version }.into());
        }
        put_u64(out, MAGIC_SERVER);
        put_u64(out, Version::MAX.0);
        self.version = version.min(Version::MAX);
        self.state = if self.version >= Version::WITH_FEATURES { State::Features } else { State::Obsolete };
        Ok(())
    }
}
