//! What a client may ask of a lower store.

use super::WorkerError;
use super::handshake::Features;
use super::wire::{Cursor, Decoded, Stop, decode, put_list, put_string, put_u64, text};
use crate::error::FormatError;
use crate::nix::realisation::RealisationKey;
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// The operations that this server has, by Nix's numbers.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u64)]
        pub enum Operation {
            $($(#[$doc])* $name = $code,)*
        }

        impl Operation {
            /// Every operation.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Nix's name for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

operations! {
    /// Whether a path is in the store.
    IsValidPath = 1,
    /// The paths that refer to a path.
    QueryReferrers = 6,
    /// Make a path valid, by substitution if need be.
    EnsurePath = 10,
    /// Keep a path while the connection lasts.
    AddTempRoot = 11,
    /// The client's settings.
    SetOptions = 19,
    /// Every path of the store.
    QueryAllValidPaths = 23,
    /// A path's metadata.
    QueryPathInfo = 26,
    /// The path with a hash part.
    QueryPathFromHashPart = 29,
    /// Those of some paths that are in the store.
    QueryValidPaths = 31,
    /// The derivations that a path is an output of.
    QueryValidDerivers = 33,
    /// A path's NAR.
    NarFromPath = 38,
    /// What it would take to make paths valid.
    QueryMissing = 40,
    /// What a content-addressed derivation's output turned out to be.
    QueryRealisation = 43,
}

impl Operation {
    /// The operation with a number.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.iter().copied().find(|operation| *operation as u64 == code)
    }
}

/// A request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// See [`Operation::IsValidPath`].
    IsValidPath(StorePath),
    /// See [`Operation::QueryReferrers`].
    QueryReferrers(StorePath),
    /// See [`Operation::EnsurePath`].
    EnsurePath(StorePath),
    /// See [`Operation::AddTempRoot`].
    AddTempRoot(StorePath),
    /// See [`Operation::SetOptions`]. The settings are about building and are passed over.
    SetOptions,
    /// See [`Operation::QueryAllValidPaths`].
    QueryAllValidPaths,
    /// See [`Operation::QueryPathInfo`].
    QueryPathInfo(StorePath),
    /// See [`Operation::QueryPathFromHashPart`].
    QueryPathFromHashPart(StorePathHash),
    /// See [`Operation::QueryValidPaths`].
    QueryValidPaths {
        /// The paths asked about.
        paths: Vec<StorePath>,
        /// Whether those that are missing should be substituted first.
        substitute: bool,
    },
    /// See [`Operation::QueryValidDerivers`].
    QueryValidDerivers(StorePath),
    /// See [`Operation::NarFromPath`].
    NarFromPath(StorePath),
    /// See [`Operation::QueryMissing`]. Each target by its path, or by its derivation where it is an output of one:
    /// which outputs are meant is passed over, since a lower store does not build.
    QueryMissing(Vec<StorePath>),
    /// See [`Operation::QueryRealisation`]. The derivation is named by its path where that is a feature of the session, else
    /// by its hash.
    QueryRealisation(RealisationKey),
}

impl Request {
    /// Reads the request that starts a buffer.
    ///
    /// An error inside means that a field holds what it must not: the request is to be answered with an error, and the
    /// connection goes on behind it. An error outside ends the connection.
    pub fn decode(
        dir: &StoreDir,
        features: Features,
        buffer: &[u8],
    ) -> Result<Decoded<Result<Self, FormatError>>, WorkerError> {
        decode(buffer, |cursor| Self::read(dir, features, cursor))
    }

    /// Appends the request, as a client sends it.
    pub fn encode(&self, dir: &StoreDir, out: &mut Vec<u8>) {
        put_u64(out, self.operation() as u64);
        match self {
            Self::IsValidPath(path)
            | Self::QueryReferrers(path)
            | Self::EnsurePath(path)
            | Self::AddTempRoot(path)
            | Self::QueryPathInfo(path)
            | Self::QueryValidDerivers(path)
            | Self::NarFromPath(path) => put_string(out, &path.display_in(dir).to_string()),
            Self::SetOptions => (0..SETTINGS + 1).for_each(|_| put_u64(out, 0)),
            Self::QueryAllValidPaths => {}
            Self::QueryPathFromHashPart(hash) => put_string(out, &hash.to_string()),
            Self::QueryValidPaths { paths, substitute } => {
                put_list(out, paths.iter().map(|path| path.display_in(dir).to_string()));
                put_u64(out, u64::from(*substitute));
            }
            Self::QueryMissing(paths) => put_list(out, paths.iter().map(|path| path.display_in(dir).to_string())),
            Self::QueryRealisation(RealisationKey::Hash(id)) => put_string(out, &id.to_string()),
            Self::QueryRealisation(RealisationKey::Path { drv, output }) => {
                put_string(out, &drv.display_in(dir).to_string());
                put_string(out, output.as_str());
            }
        }
    }

    /// What is asked.
    #[must_use]
    pub const fn operation(&self) -> Operation {
        match self {
            Self::IsValidPath(_) => Operation::IsValidPath,
            Self::QueryReferrers(_) => Operation::QueryReferrers,
            Self::EnsurePath(_) => Operation::EnsurePath,
            Self::AddTempRoot(_) => Operation::AddTempRoot,
            Self::SetOptions => Operation::SetOptions,
            Self::QueryAllValidPaths => Operation::QueryAllValidPaths,
            Self::QueryPathInfo(_) => Operation::QueryPathInfo,
            Self::QueryPathFromHashPart(_) => Operation::QueryPathFromHashPart,
            Self::QueryValidPaths { .. } => Operation::QueryValidPaths,
            Self::QueryValidDerivers(_) => Operation::QueryValidDerivers,
            Self::NarFromPath(_) => Operation::NarFromPath,
            Self::QueryMissing(_) => Operation::QueryMissing,
            Self::QueryRealisation(_) => Operation::QueryRealisation,
        }
    }

    /// Reads the whole frame before any field is looked at, so that a bad field leaves the connection in step.
    fn read(dir: &StoreDir, features: Features, cursor: &mut Cursor<'_>) -> Result<Result<Self, FormatError>, Stop> {
        let code = cursor.u64()?;
        let operation = Operation::from_code(code).ok_or(WorkerError::Operation { code })?;
        let path = |bytes: &[u8]| StorePath::parse_absolute(dir, text(bytes)?);
        Ok(match operation {
            Operation::IsValidPath => path(cursor.bytes()?).map(Self::IsValidPath),
            Operation::QueryReferrers => path(cursor.bytes()?).map(Self::QueryReferrers),
            Operation::EnsurePath => path(cursor.bytes()?).map(Self::EnsurePath),
            Operation::AddTempRoot => path(cursor.bytes()?).map(Self::AddTempRoot),
            Operation::SetOptions => {
                for _ in 0..SETTINGS {
                    cursor.u64()?;
                }
                for _ in 0..cursor.pairs()? {
                    cursor.bytes()?;
                    cursor.bytes()?;
                }
                Ok(Self::SetOptions)
            }
            Operation::QueryAllValidPaths => Ok(Self::QueryAllValidPaths),
            Operation::QueryPathInfo => path(cursor.bytes()?).map(Self::QueryPathInfo),
            Operation::QueryPathFromHashPart => {
                StorePathHash::parse_ascii(cursor.bytes()?).map(Self::QueryPathFromHashPart)
            }
            Operation::QueryValidPaths => {
                let paths = cursor.list()?;
                let substitute = cursor.bool("substitute")?;
                let paths: Result<_, _> = paths.into_iter().map(path).collect();
                paths.map(|paths| Self::QueryValidPaths { paths, substitute })
            }
            Operation::QueryValidDerivers => path(cursor.bytes()?).map(Self::QueryValidDerivers),
            Operation::NarFromPath => path(cursor.bytes()?).map(Self::NarFromPath),
            Operation::QueryMissing => {
                let target = |bytes: &[u8]| path(bytes.split(|byte| *byte == b'!').next().unwrap_or_default());
                cursor.list()?.into_iter().map(target).collect::<Result<_, _>>().map(Self::QueryMissing)
            }
            Operation::QueryRealisation if features.realisation_by_path => {
                let (drv, output) = (cursor.bytes()?, cursor.bytes()?);
                let output = text(output).and_then(str::parse);
                let key = path(drv).and_then(|drv| Ok(RealisationKey::Path { drv, output: output? }));
                key.map(Self::QueryRealisation)
            }
            Operation::QueryRealisation => {
                let id = text(cursor.bytes()?).and_then(str::parse);
                id.map(|id| Self::QueryRealisation(RealisationKey::Hash(id)))
            }
        })
    }
}

/// Numbers that a client's settings start with, before the count of named ones.
const SETTINGS: usize = 12;
