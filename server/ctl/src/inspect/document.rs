//! JSON: the documents of a lake's bucket, and which of the JSON formats a text is at all.

use anyhow::{Context as _, bail};
use narlake_format::lake::config::{CacheDocument, Document, FileDocument, LakeDocument, UploadDocument};
use serde::de::IgnoredAny;
use serde_json::Value as Json;

use super::finding::{Finding, Value};
use crate::cli::Format;

/// Which format a JSON object is of, by keys that only it has. Damaged JSON is a document, whose reader then says
/// where.
pub(super) fn recognise(bytes: &[u8]) -> Option<Format> {
    let Ok(Json::Object(object)) = serde_json::from_slice(bytes) else { return Some(Format::Document) };
    let has = |key: &str| object.contains_key(key);
    if has("root") {
        Some(Format::Listing)
    } else if has("outPath") {
        Some(Format::Realisation)
    } else {
        ["format", "visibility", "nar_hash"].into_iter().any(has).then_some(Format::Document)
    }
}

/// Checks that a text is JSON at all, with the place of the error if it is not.
pub(super) fn syntax(bytes: &[u8]) -> Result<(), serde_json::Error> {
    serde_json::from_slice::<IgnoredAny>(bytes).map(drop)
}

/// Reads a document of a lake's bucket.
pub(super) fn inspect(bytes: &[u8]) -> anyhow::Result<Finding> {
    let json: Json = serde_json::from_slice(bytes).context("read JSON")?;
    let has = |key: &str| json.get(key).is_some();
    // Each has a key that no other has.
    if has("format") {
        show::<LakeDocument>("lake document", bytes)
    } else if has("visibility") {
        show::<CacheDocument>("cache document", bytes)
    } else if has("packs") {
        show::<UploadDocument>("upload document", bytes)
    } else if has("compression") {
        show::<FileDocument>("uploaded file document", bytes)
    } else {
        bail!("it has none of the keys by which documents are told: format, visibility, packs, compression");
    }
}

/// The checked document, key by key as it is written.
fn show<T: Document>(format: &'static str, bytes: &[u8]) -> anyhow::Result<Finding> {
    let document = T::decode(bytes)?;
    let Json::Object(object) = serde_json::to_value(&document)? else { bail!("it is not an object") };
    let rows = object.into_iter().map(|(key, value)| vec![Value::Text(key), value_of(value)]).collect();
    Ok(Finding::new(format, Vec::new()).with("fields", &["field", "value"], rows))
}

fn value_of(json: Json) -> Value {
    match json {
        Json::Null => Value::None,
        Json::Bool(flag) => Value::Flag(flag),
        Json::Number(number) => number.as_u64().map_or_else(|| Value::text(&number), Value::Number),
        Json::String(text) => Value::Text(text),
        Json::Array(items) => {
            Value::list(items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned)))
        }
        Json::Object(_) => Value::text(&json),
    }
}
