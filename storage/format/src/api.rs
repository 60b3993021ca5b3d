//! What the server, mountd and the `narlake` command say to each other: the bodies of the lake API under `/api/v1`.
//!
//! JSON, but where said otherwise; values have the spelling they have everywhere else. Unknown fields are ignored, so
//! that a newer server can say more to an older client; a change that an older client would misread raises
//! [`API_VERSION`] and gets a new prefix.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /info` | | [`Info`] |
//! | `GET /paths/<hash32>` | | path record text; 404 with [`ABSENT_HEADER`] is authoritative |
//! | `POST /closure` | [`ClosureRequest`] | one [`ClosureLine`] a line, references first |
//! | `POST /missing` | [`MissingRequest`] | [`MissingResponse`] |
//! | `POST /locate` | 32 bytes for each blob id | [`LocateResponse`] |
//! | `GET /packs/<domain>/<ulid>` with `Range` | | bytes of the pack |
//! | `GET /packs/<domain>/<ulid>/url` | | [`PackUrl`] |

pub mod control;
pub mod spool;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::FormatError;
use crate::id::{BlobId, CacheId, ID_LEN, LakeId};
use crate::lake::json;
use crate::lake::location::{Location, PackRef};
use crate::nix::signature::PublicKey;
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// Version of the lake API.
pub const API_VERSION: u32 = 1;

/// Path under which version 1 of the lake API is served.
pub const PREFIX: &str = "/api/v1";

/// Header that marks the server's own "the cache has no such path", or realisation. A 404 without it, from a proxy or for
/// a wrong URL, says nothing about the path.
pub const ABSENT_HEADER: &str = "narlake-absent";

/// Header that marks an answer which failed because what is stored is missing or damaged: to ask again at once is no use.
pub const DAMAGED_HEADER: &str = "narlake-damaged";

/// Media type of an answer of one JSON document a line.
pub const NDJSON: &str = "application/x-ndjson";

/// Most blob ids of one `locate` request.
pub const LOCATE_MAX: usize = 64 * 1024;

/// Answer of `GET /info`: which lake and cache this is, and what it signs with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Info {
    /// The newest version of the API that the server speaks.
    pub api_version: u32,
    /// The lake.
    #[serde(with = "json::text")]
    pub lake: LakeId,
    /// The store directory of all its paths.
    #[serde(with = "json::text")]
    pub store_dir: StoreDir,
    /// The cache that the request reached.
    #[serde(with = "json::text")]
    pub cache: CacheId,
    /// The keys that the cache's signatures are checked with.
    #[serde(with = "json::texts")]
    pub public_keys: Vec<PublicKey>,
}

/// Body of `POST /closure`: which closures, and what of them need not be sent.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ClosureRequest {
    /// Hash parts of the paths whose closures are wanted.
    #[serde(with = "json::texts")]
    pub roots: Vec<StorePathHash>,
    /// Hash parts of paths that the client has, with all they refer to.
    #[serde(with = "json::texts", default)]
    pub have: Vec<StorePathHash>,
}

/// One line of the answer of `POST /closure`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClosureLine {
    /// The record of a path, as text. Those it refers to came before.
    Record(String),
    /// A path of the closure that the cache does not have.
    Missing(#[serde(with = "json::text")] StorePathHash),
    /// The last line, with the number of those before it: an answer without it was cut off.
    Done(u64),
}

/// Body of `POST /missing`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MissingRequest {
    /// The paths to look for.
    #[serde(with = "json::texts")]
    pub paths: Vec<StorePath>,
}

/// Answer of `POST /missing`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MissingResponse {
    /// Those of the paths asked for that the cache does not have.
    #[serde(with = "json::texts")]
    pub missing: Vec<StorePath>,
}

/// Writes the body of `POST /locate`: the ids end to end.
#[must_use]
pub fn encode_locate(ids: &[BlobId]) -> Vec<u8> {
    ids.iter().flat_map(BlobId::as_bytes).copied().collect()
}

/// Reads the body of `POST /locate`.
///
/// # Errors
/// When it is not whole ids, or too many.
pub fn decode_locate(body: &[u8]) -> Result<Vec<BlobId>, FormatError> {
    let (ids, rest) = body.as_chunks::<ID_LEN>();
    let offset = (body.len() - rest.len()) as u64;
    if !rest.is_empty() {
        return Err(FormatError::Truncated { field: "blob id", offset });
    }
    if ids.len() > LOCATE_MAX {
        let (value, max) = (ids.len() as u64, LOCATE_MAX as u64);
        return Err(FormatError::Limit { field: "number of blob ids", value, max, offset });
    }
    Ok(ids.iter().map(|id| BlobId::from_bytes(*id)).collect())
}

/// Answer of `POST /locate`, in the order of the ids asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LocateResponse {
    /// The packs that the locations name.
    #[serde(with = "json::texts")]
    packs: Vec<PackRef>,
    /// For each id, index into `packs`, frame offset, frame length, offset in the frame and length, or null.
    locations: Vec<Option<[u32; 5]>>,
}

impl LocateResponse {
    /// The answer that gives these locations.
    ///
    /// # Panics
    /// If there are 2^32 packs, which no request can ask for.
    #[must_use]
    pub fn new(locations: &[Option<Location>]) -> Self {
        let mut response = Self::default();
        let mut numbers = HashMap::new();
        for location in locations {
            let line = location.map(|location| {
                let number = *numbers.entry(location.pack).or_insert_with(|| {
                    response.packs.push(location.pack);
                    u32::try_from(response.packs.len() - 1).expect("fewer packs than ids")
                });
                [number, location.frame_offset, location.frame_length, location.offset, location.length]
            });
            response.locations.push(line);
        }
        response
    }

    /// The locations.
    ///
    /// # Errors
    /// When one names a pack that the answer does not list.
    pub fn locations(&self) -> Result<Vec<Option<Location>>, FormatError> {
        let place = |&[number, frame_offset, frame_length, offset, length]: &[u32; 5]| {
            let pack = usize::try_from(number).ok().and_then(|number| self.packs.get(number));
            let pack = *pack.ok_or(FormatError::Syntax { field: "pack number", offset: u64::from(number) })?;
            Ok(Location { pack, frame_offset, frame_length, offset, length })
        };
        self.locations.iter().map(|line| line.as_ref().map(place).transpose()).collect()
    }
}

/// Answer of `GET /packs/<domain>/<ulid>/url`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PackUrl {
    /// A URL at which the pack's bytes can be read by ranges, without a token; null where the server offers none. What
    /// it reads is no more to be believed than what the server sends.
    pub url: Option<String>,
    /// For how many seconds it is valid; where there is none, for how many there is no use in asking again.
    pub valid_s: u64,
}

#[cfg(test)]
mod tests;
