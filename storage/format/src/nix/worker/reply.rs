//! What a lower store answers.

use super::handshake::Features;
use super::request::Operation;
use super::wire::{Cursor, Decoded, Stop, decode, put_list, put_string, put_u64, text};
use super::{STDERR_ERROR, STDERR_LAST, WorkerError};
use crate::error::FormatError;
use crate::nix::content_address::ContentAddress;
use crate::nix::hash::Sha256Hash;
use crate::nix::narinfo::NarInfo;
use crate::nix::signature::Signature;
use crate::nix::store_path::{StoreDir, StorePath};

/// An answer. Which one belongs to which operation is written at the variants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// To `SetOptions`.
    Done,
    /// To `EnsurePath` and `AddTempRoot`.
    Accepted,
    /// To `IsValidPath`.
    Valid(bool),
    /// To `QueryPathInfo`; none where the path is not in the store.
    PathInfo(Option<PathInfo>),
    /// To `QueryPathFromHashPart`.
    Path(Option<StorePath>),
    /// To `QueryAllValidPaths`, `QueryReferrers`, `QueryValidDerivers` and `QueryValidPaths`.
    Paths(Vec<StorePath>),
    /// To `QueryRealisation` by the derivation's hash: the documents, at most one.
    Realisations(Vec<String>),
    /// To `QueryRealisation` by the derivation's path.
    Realised(Option<Realised>),
    /// To `QueryMissing`.
    Missing(Missing),
    /// To `NarFromPath`. The NAR follows, without any framing.
    Nar,
    /// In place of any other: why there is no answer. Ends nothing; the next request may follow.
    Error(String),
}

/// A path's metadata.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathInfo {
    /// The derivation that built the path.
    pub deriver: Option<StorePath>,
    /// The digest of its NAR.
    pub nar_hash: Sha256Hash,
    /// The paths that it refers to, itself included where it does. All must be valid in this store.
    pub references: Vec<StorePath>,
    /// Seconds since 1970 at which it came; 0 makes Nix take the current time.
    pub registration_time: u64,
    /// The length of its NAR.
    pub nar_size: u64,
    /// Whether this store built it.
    pub ultimate: bool,
    /// Signatures over its fingerprint.
    pub signatures: Vec<Signature>,
    /// What it is addressed by. Nix checks it against NAR digest, references and name.
    pub ca: Option<ContentAddress>,
}

impl PathInfo {
    /// What a narinfo says of its path.
    #[must_use]
    pub fn of(info: &NarInfo, registration_time: u64) -> Self {
        Self {
            deriver: info.deriver.clone(),
            nar_hash: info.nar_hash,
            references: info.references.clone(),
            registration_time,
            nar_size: info.nar_size,
            ultimate: false,
            signatures: info.signatures.clone(),
            ca: info.ca.clone(),
        }
    }
}

/// What an output turned out to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Realised {
    /// Its path.
    pub out_path: StorePath,
    /// Signatures over the realisation's fingerprint.
    pub signatures: Vec<Signature>,
}

/// What it would take to make paths valid.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Missing {
    /// Derivations to build.
    pub will_build: Vec<StorePath>,
    /// Paths to substitute.
    pub will_substitute: Vec<StorePath>,
    /// Paths that nobody knows.
    pub unknown: Vec<StorePath>,
    /// Bytes to download for the substitutes.
    pub download_size: u64,
    /// Bytes of NAR of the substitutes.
    pub nar_size: u64,
}

impl Reply {
    /// Appends the reply.
    pub fn encode(&self, dir: &StoreDir, out: &mut Vec<u8>) {
        if let Self::Error(message) = self {
            return encode_error(message, out);
        }
        put_u64(out, STDERR_LAST);
        match self {
            Self::Done | Self::Nar | Self::Error(_) => {}
            Self::Accepted => put_u64(out, 1),
            Self::Valid(valid) => put_u64(out, u64::from(*valid)),
            Self::PathInfo(None) => put_u64(out, 0),
            Self::PathInfo(Some(info)) => {
                put_u64(out, 1);
                put_path(dir, out, info.deriver.as_ref());
                put_string(out, &info.nar_hash.to_hex());
                put_paths(dir, out, &info.references);
                put_u64(out, info.registration_time);
                put_u64(out, info.nar_size);
                put_u64(out, u64::from(info.ultimate));
                put_list(out, info.signatures.iter().map(Signature::to_string));
                put_string(out, &info.ca.as_ref().map(ContentAddress::to_string).unwrap_or_default());
            }
            Self::Path(path) => put_path(dir, out, path.as_ref()),
            Self::Paths(paths) => put_paths(dir, out, paths),
            Self::Realisations(documents) => put_list(out, documents.iter()),
            Self::Realised(None) => put_u64(out, 0),
            Self::Realised(Some(realised)) => {
                put_u64(out, 1);
                put_path(dir, out, Some(&realised.out_path));
                put_list(out, realised.signatures.iter().map(Signature::to_string));
            }
            Self::Missing(missing) => {
                put_paths(dir, out, &missing.will_build);
                put_paths(dir, out, &missing.will_substitute);
                put_paths(dir, out, &missing.unknown);
                put_u64(out, missing.download_size);
                put_u64(out, missing.nar_size);
            }
        }
    }

    /// Reads the reply to an operation that starts a buffer, as a client does.
    pub fn decode(
        dir: &StoreDir,
        features: Features,
        operation: Operation,
        buffer: &[u8],
    ) -> Result<Decoded<Self>, WorkerError> {
        decode(buffer, |cursor| {
            let offset = 0;
            match cursor.u64()? {
                STDERR_LAST => {}
                STDERR_ERROR => return read_error(cursor),
                _ => return Err(FormatError::Syntax { field: "start of reply", offset }.into()),
            }
            Ok(match operation {
                Operation::SetOptions => Self::Done,
                Operation::EnsurePath | Operation::AddTempRoot => {
                    cursor.u64()?;
                    Self::Accepted
                }
                Operation::IsValidPath => Self::Valid(cursor.bool("validity")?),
                Operation::QueryPathInfo => Self::PathInfo(read_info(dir, cursor)?),
                Operation::QueryPathFromHashPart => Self::Path(read_path(dir, cursor)?),
                Operation::QueryAllValidPaths
                | Operation::QueryReferrers
                | Operation::QueryValidDerivers
                | Operation::QueryValidPaths => Self::Paths(read_paths(dir, cursor)?),
                Operation::QueryRealisation if features.realisation_by_path => {
                    Self::Realised(read_realised(dir, cursor)?)
                }
                Operation::QueryRealisation => Self::Realisations(
                    cursor.list()?.into_iter().map(|bytes| Ok(text(bytes)?.to_owned())).collect::<Result<_, Stop>>()?,
                ),
                Operation::QueryMissing => Self::Missing(Missing {
                    will_build: read_paths(dir, cursor)?,
                    will_substitute: read_paths(dir, cursor)?,
                    unknown: read_paths(dir, cursor)?,
                    download_size: cursor.u64()?,
                    nar_size: cursor.u64()?,
                }),
                Operation::NarFromPath => Self::Nar,
            })
        })
    }
}

/// The form of errors since 1.26: type, level, name, message, no position, no traces.
pub(super) fn encode_error(message: &str, out: &mut Vec<u8>) {
    put_u64(out, STDERR_ERROR);
    put_string(out, "Error");
    put_u64(out, 0);
    put_string(out, "Error");
    put_string(out, message);
    put_u64(out, 0);
    put_u64(out, 0);
}

fn read_error(cursor: &mut Cursor<'_>) -> Result<Reply, Stop> {
    cursor.bytes()?;
    cursor.u64()?;
    cursor.bytes()?;
    let message = text(cursor.bytes()?)?.to_owned();
    cursor.u64()?;
    for _ in 0..cursor.pairs()? {
        cursor.u64()?;
        cursor.bytes()?;
    }
    Ok(Reply::Error(message))
}

fn read_info(dir: &StoreDir, cursor: &mut Cursor<'_>) -> Result<Option<PathInfo>, Stop> {
    if !cursor.bool("validity")? {
        return Ok(None);
    }
    Ok(Some(PathInfo {
        deriver: read_path(dir, cursor)?,
        nar_hash: Sha256Hash::parse_hex(text(cursor.bytes()?)?)?,
        references: read_paths(dir, cursor)?,
        registration_time: cursor.u64()?,
        nar_size: cursor.u64()?,
        ultimate: cursor.bool("ultimate")?,
        signatures: read_signatures(cursor)?,
        ca: match text(cursor.bytes()?)? {
            "" => None,
            ca => Some(ca.parse()?),
        },
    }))
}

fn read_realised(dir: &StoreDir, cursor: &mut Cursor<'_>) -> Result<Option<Realised>, Stop> {
    if !cursor.bool("presence")? {
        return Ok(None);
    }
    let out_path = StorePath::parse_absolute(dir, text(cursor.bytes()?)?)?;
    Ok(Some(Realised { out_path, signatures: read_signatures(cursor)? }))
}

fn read_signatures(cursor: &mut Cursor<'_>) -> Result<Vec<Signature>, Stop> {
    cursor.list()?.into_iter().map(|bytes| Ok(text(bytes)?.parse()?)).collect()
}

fn read_path(dir: &StoreDir, cursor: &mut Cursor<'_>) -> Result<Option<StorePath>, Stop> {
    match text(cursor.bytes()?)? {
        "" => Ok(None),
        path => Ok(Some(StorePath::parse_absolute(dir, path)?)),
    }
}

fn read_paths(dir: &StoreDir, cursor: &mut Cursor<'_>) -> Result<Vec<StorePath>, Stop> {
    cursor.list()?.into_iter().map(|bytes| Ok(StorePath::parse_absolute(dir, text(bytes)?)?)).collect()
}

fn put_path(dir: &StoreDir, out: &mut Vec<u8>, path: Option<&StorePath>) {
    put_string(out, &path.map(|path| path.display_in(dir).to_string()).unwrap_or_default());
}

fn put_paths(dir: &StoreDir, out: &mut Vec<u8>, paths: &[StorePath]) {
    put_list(out, paths.iter().map(|path| path.display_in(dir).to_string()));
}
