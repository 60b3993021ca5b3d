//! Realisations: which store path a derivation's output turned out to be.
//!
//! A content-addressed derivation does not know its output paths before it is built, so caches hold a document per
//! output that names the path. Nix asks for it under one of two URLs:
//!
//! - `realisations/sha256:<hex>!<output>.doi`, the derivation by its hash modulo inputs (to 2.34). The document is
//!   `{"id", "outPath", "signatures", "dependentRealisations"}`, the last a map of such ids to base names.
//! - `build-trace-v2/<drv base name>/<output>.doi`, the derivation by its path (later).
//!
//! A cache stores the document as it came, with its own signatures added: clients check those over fields that a cache
//! need not know. A signature is over the [fingerprint](Realisation::fingerprint), which differs between the two forms.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::hash::Sha256Hash;
use super::signature::{PublicKey, SecretKey, Signature};
use super::store_path::{StorePath, StorePathName};
use crate::error::FormatError;
use crate::limits::{REALISATION_MAX, SIGNATURES_MAX};

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
    /// Signatures over its fingerprint, as far as they have the form of one.
    pub signatures: Vec<Signature>,
}

impl Realisation {
    /// Reads the document stored under a key.
    pub fn parse(key: &RealisationKey, bytes: &[u8]) -> Result<Self, FormatError> {
        check_length(bytes.len())?;
        let document: Document = serde_json::from_slice(bytes).map_err(|_| error("realisation"))?;
        let id = document.id.map(|id| id.parse::<DrvOutput>()).transpose()?;
        match (key, &id) {
            (RealisationKey::Hash(key), Some(id)) if key == id => {}
            (RealisationKey::Path { .. }, None) => {}
            _ => return Err(error("realisation id")),
        }
        let dependent = document.dependent.into_iter().map(|(id, path)| Ok((id.parse()?, path.parse()?)));
        let signatures = document.signatures.iter().filter_map(signature).take(SIGNATURES_MAX);
        Ok(Self {
            out_path: document.out_path.parse()?,
            dependent: dependent.collect::<Result<_, FormatError>>()?,
            signatures: signatures.collect(),
        })
    }

    /// What a signature of the realisation of this output is over: the JSON that Nix signs, its keys sorted.
    #[must_use]
    pub fn fingerprint(&self, key: &RealisationKey) -> String {
        // No character of a store path, an id or an output's name is escaped in JSON.
        let out = &self.out_path;
        match key {
            RealisationKey::Hash(id) => {
                let dependent = self.dependent.iter().map(|(id, path)| format!(r#""{id}":"{path}""#));
                let dependent = dependent.collect::<Vec<_>>().join(",");
                format!(r#"{{"dependentRealisations":{{{dependent}}},"id":"{id}","outPath":"{out}"}}"#)
            }
            RealisationKey::Path { drv, output } => {
                format!(r#"{{"key":{{"drvPath":"{drv}","outputName":"{output}"}},"value":{{"outPath":"{out}"}}}}"#)
            }
        }
    }

    /// Whether one of these keys has signed that this is the realisation of the output.
    #[must_use]
    pub fn is_signed_by(&self, key: &RealisationKey, keys: &[PublicKey]) -> bool {
        let fingerprint = self.fingerprint(key);
        let signed = |signature| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.signatures.iter().any(signed)
    }

    /// The document, with what is known of it and nothing else.
    #[must_use]
    pub fn to_document(&self, key: &RealisationKey) -> String {
        let by_hash = match key {
            RealisationKey::Hash(id) => Some(id),
            RealisationKey::Path { .. } => None,
        };
        let signatures = self.signatures.iter().map(|signature| spelled(key, signature)).collect();
        let dependent = self.dependent.iter().map(|(id, path)| (id.to_string(), path.to_string())).collect();
        let document = Document {
            id: by_hash.map(ToString::to_string),
            out_path: self.out_path.to_string(),
            dependent,
            signatures,
        };
        // Strings, a list and maps of strings: there is nothing in it that JSON cannot say.
        serde_json::to_string(&document).unwrap_or_default()
    }

    /// The document with signatures of these keys added where they are missing; all else in it stays what it was.
    pub fn sign(key: &RealisationKey, bytes: &[u8], signers: &[SecretKey]) -> Result<Vec<u8>, FormatError> {
        let realisation = Self::parse(key, bytes)?;
        let fingerprint = realisation.fingerprint(key);
        let own = signers.iter().map(|signer| signer.sign(fingerprint.as_bytes()));
        let own: Vec<Signature> = own.filter(|signature| !realisation.signatures.contains(signature)).collect();
        if own.is_empty() {
            return Ok(bytes.to_vec());
        }
        let mut document: Value = serde_json::from_slice(bytes).map_err(|_| error("realisation"))?;
        let fields = document.as_object_mut().ok_or(error("realisation"))?;
        let all = fields.entry("signatures").or_insert_with(|| Value::Array(Vec::new()));
        let all = all.as_array_mut().ok_or(error("signatures of realisation"))?;
        all.extend(own.iter().map(|signature| spelled(key, signature)));
        let signed = serde_json::to_vec(&document).map_err(|_| error("realisation"))?;
        check_length(signed.len())?;
        Ok(signed)
    }
}

const fn error(field: &'static str) -> FormatError {
    FormatError::Syntax { field, offset: 0 }
}

fn check_length(length: usize) -> Result<(), FormatError> {
    if length > REALISATION_MAX {
        let (value, max) = (length as u64, REALISATION_MAX as u64);
        return Err(FormatError::Limit { field: "length of realisation", value, max, offset: 0 });
    }
    Ok(())
}

/// A signature in either spelling: `"<key name>:<base 64>"` to 2.34, `{"keyName", "sig"}` later.
fn signature(value: &Value) -> Option<Signature> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Object(fields) => {
            let field = |name| fields.get(name).and_then(Value::as_str);
            format!("{}:{}", field("keyName")?, field("sig")?).parse().ok()
        }
        _ => None,
    }
}

fn spelled(key: &RealisationKey, signature: &Signature) -> Value {
    let text = signature.to_string();
    match (key, text.split_once(':')) {
        (RealisationKey::Path { .. }, Some((name, sig))) => serde_json::json!({ "keyName": name, "sig": sig }),
        _ => Value::String(text),
    }
}

/// The fields that must be what they are, in the order in which Nix writes them; others pass.
#[derive(Serialize, Deserialize)]
struct Document {
    #[serde(rename = "dependentRealisations", default)]
    dependent: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "outPath")]
    out_path: String,
    #[serde(default)]
    signatures: Vec<Value>,
}

#[cfg(test)]
mod tests;
