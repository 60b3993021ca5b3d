//! Realisations: which store path a derivation's output turned out to be.
//!
//! A content-addressed derivation does not know its output paths before it is built, so caches hold a document per
//! output that names the path. Nix asks for it under one of two URLs:
//!
//! - `realisations/sha256:<hex>!<output>.doi`, the derivation by its hash modulo inputs (to 2.34). The document is
//!   `{"id", "outPath", "signatures", "dependentRealisations"}`, the last a map of such ids to base names.
//! - `build-trace-v2/<drv base name>/<output>.doi`, the derivation by its path (later).
//!
//! A cache stores the document as it came: clients check its signatures over fields that it need not know. Here it is
//! only checked to be one, and to speak of the output that its URL names.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::hash::Sha256Hash;
use super::store_path::{StorePath, StorePathName};
use crate::error::FormatError;
use crate::limits::REALISATION_MAX;

/// One output of a derivation known by its hash modulo inputs: `sha256:<hex>!<output>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DrvOutput {
    /// The derivation's hash.
    pub drv_hash: Sha256Hash,
    /// The output's name.
    pub output: StorePathName,
}

impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}!{}", self.drv_hash.to_hex(), self.output)
    }
}

impl FromStr for DrvOutput {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let error = FormatError::Syntax { field: "realisation id", offset: 0 };
        let (hash, output) = text.strip_prefix("sha256:").and_then(|rest| rest.split_once('!')).ok_or(error)?;
        Ok(Self { drv_hash: Sha256Hash::parse_hex(hash)?, output: output.parse()? })
    }
}

/// What a realisation document is found by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RealisationKey {
    /// By the derivation's hash modulo inputs.
    Hash(DrvOutput),
    /// By the derivation's path.
    Path {
        /// The derivation.
        drv: StorePath,
        /// The output's name.
        output: StorePathName,
    },
}

impl fmt::Display for RealisationKey {
    /// Writes the URL, relative to the cache, without percent-encoding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hash(id) => write!(f, "realisations/{id}.doi"),
            Self::Path { drv, output } => write!(f, "build-trace-v2/{drv}/{output}.doi"),
        }
    }
}

impl FromStr for RealisationKey {
    type Err = FormatError;

    /// Reads the URL, relative to the cache, after percent-decoding.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        let error = FormatError::Syntax { field: "realisation URL", offset: 0 };
        let stem = text.strip_suffix(".doi").ok_or(error.clone())?;
        if let Some(id) = stem.strip_prefix("realisations/") {
            return id.parse().map(Self::Hash);
        }
        let (drv, output) = stem.strip_prefix("build-trace-v2/").and_then(|rest| rest.split_once('/')).ok_or(error)?;
        Ok(Self::Path { drv: drv.parse()?, output: output.parse()? })
    }
}

/// What a realisation document says, as far as a cache needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Realisation {
    /// The path that the output is.
    pub out_path: StorePath,
    /// The realisations that this one was resolved through.
    pub dependent: BTreeMap<DrvOutput, StorePath>,
}

impl Realisation {
    /// Reads the document stored under a key.
    pub fn parse(key: &RealisationKey, bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > REALISATION_MAX {
            let (value, max) = (bytes.len() as u64, REALISATION_MAX as u64);
            return Err(FormatError::Limit { field: "length of realisation", value, max, offset: 0 });
        }
        let error = |field| FormatError::Syntax { field, offset: 0 };
        let document: Document = serde_json::from_slice(bytes).map_err(|_| error("realisation"))?;
        let id = document.id.map(|id| id.parse::<DrvOutput>()).transpose()?;
        match (key, &id) {
            (RealisationKey::Hash(key), Some(id)) if key == id => {}
            (RealisationKey::Path { .. }, None) => {}
            _ => return Err(error("realisation id")),
        }
        let dependent = document.dependent.into_iter().map(|(id, path)| Ok((id.parse()?, path.parse()?)));
        Ok(Self { out_path: document.out_path.parse()?, dependent: dependent.collect::<Result<_, FormatError>>()? })
    }
}

/// The fields that must be what they are; others pass.
#[derive(Deserialize)]
struct Document {
    id: Option<String>,
    #[serde(rename = "outPath")]
    out_path: String,
    #[serde(rename = "dependentRealisations", default)]
    dependent: BTreeMap<String, String>,
    // Strings to 2.34, objects later; the clients check them.
    #[serde(default, rename = "signatures")]
    _signatures: Vec<serde_json::Value>,
}

#[cfg(test)]
mod tests;
