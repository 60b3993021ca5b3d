//! The local Nix, asked through its commands: what belongs to a closure, and what is known of each path.
//!
//! `nix-store -qR` gives the closure. `nix path-info --json` gives the metadata; its shape differs between versions,
//! and [`parse_path_info`] reads all of them:
//!
//! | Nix | document |
//! |---|---|
//! | to 2.18 | `[{"path": "/nix/store/...", ...}, ...]` |
//! | from 2.19, `--json-format 1` | `{"/nix/store/...": {...}, ...}` |
//! | `--json-format 2` | `{"version": 2, "info": {"<hash>-<name>": {...}, ...}}`, base names, `ca` an object |
//!
//! Where there is `nix-store` but no `nix`, `nix-store --dump-db` tells all but signatures and content addresses.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::time::Duration;

use narlake_format::error::FormatError;
use narlake_format::limits::NAR_SIZE_MAX;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::registration::{self, Registration};
use narlake_format::nix::signature::Signature;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use serde::Deserialize;

use super::PushError;
use crate::client::upload_url;
use crate::nix::{self, ARGUMENTS, NixError};
use crate::output::printable;

/// Longest that a program of Nix may take. It reads a database, but another process may hold its lock for a while.
const LIMIT: Duration = Duration::from_secs(300);

/// A Nix that is there.
pub(crate) struct LocalNix {
    /// Whether there is `nix`, and not only `nix-store`.
    has_nix: bool,
    /// The store to ask, as Nix's `--store`; its own default without.
    store: Option<String>,
}

impl LocalNix {
    /// Finds Nix on the search path, to ask this store, or its default one.
    pub(crate) async fn find(store: Option<String>) -> Result<Option<Self>, PushError> {
        if !is_there("nix-store").await? {
            return Ok(None);
        }
        Ok(Some(Self { has_nix: is_there("nix").await?, store }))
    }

    /// The log of a derivation's build. It may be long: at most `max` bytes of it.
    pub(crate) async fn log(&self, dir: &StoreDir, drv: &StorePath, max: usize) -> Result<Vec<u8>, PushError> {
        let arguments = self.arguments(&["--read-log", "--"], &[drv.display_in(dir).to_string()]);
        Ok(nix::start_of("nix-store", &arguments, b"", LIMIT, max).await?)
    }

    /// What is known of the outputs of a content-addressed derivation, as documents of a cache.
    pub(crate) async fn realisations(&self, dir: &StoreDir, drv: &StorePath) -> Result<Vec<String>, PushError> {
        const COMMAND: [&str; 5] =
            ["--extra-experimental-features", "nix-command ca-derivations", "realisation", "info", "--json"];
        if !self.has_nix {
            return Ok(Vec::new());
        }
        let outputs = format!("{}^*", drv.display_in(dir));
        let text = execute("nix", &self.arguments(&COMMAND, &[outputs])).await?;
        let found: Vec<serde_json::Value> =
            serde_json::from_slice(&text).map_err(|source| unreadable("nix realisation info", source))?;
        // Outputs of other derivations have no such id.
        Ok(found.iter().filter(|document| document.get("id").is_some()).map(ToString::to_string).collect())
    }

    /// A command line that asks the right store.
    fn arguments(&self, command: &[&str], rest: &[String]) -> Vec<String> {
        let (options, end) = command.split_at(command.len() - usize::from(command.last() == Some(&"--")));
        let store = self.store.iter().flat_map(|store| ["--store".to_owned(), store.clone()]);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
        words(options).into_iter().chain(store).chain(words(end)).chain(rest.iter().cloned()).collect()
    }

    async fn run(
        &self,
        program: &str,
        command: &[&str],
        dir: &StoreDir,
        paths: &[StorePath],
    ) -> Result<Vec<u8>, PushError> {
        let paths: Vec<String> = paths.iter().map(|path| path.display_in(dir).to_string()).collect();
        execute(program, &self.arguments(command, &paths)).await
    }

    /// The closures of these paths together.
    pub(crate) async fn closure(&self, dir: &StoreDir, roots: &[StorePath]) -> Result<Vec<StorePath>, PushError> {
        let mut closure = Vec::new();
        for roots in roots.chunks(ARGUMENTS) {
            let text = self.run("nix-store", &["--query", "--requisites", "--"], dir, roots).await?;
            for line in String::from_utf8_lossy(&text).lines() {
                let path = StorePath::parse_absolute(dir, line).map_err(|source| unreadable("nix-store", source))?;
                closure.push(path);
            }
        }
        closure.sort_unstable();
        closure.dedup();
        Ok(closure)
    }

    /// What is known of each of these paths.
    pub(crate) async fn path_info(&self, dir: &StoreDir, paths: &[StorePath]) -> Result<Vec<NarInfo>, PushError> {
        let mut known = BTreeMap::new();
        for paths in paths.chunks(ARGUMENTS) {
            let infos = if self.has_nix {
                let text = self.path_info_json(dir, paths).await?;
                parse_path_info(dir, &text).map_err(|source| unreadable("nix path-info", source))?
            } else {
                let text = self.run("nix-store", &["--dump-db", "--"], dir, paths).await?;
                parse_database(dir, &text).map_err(|source| unreadable("nix-store --dump-db", source))?
            };
            known.extend(infos.into_iter().map(|info| (info.store_path.clone(), info)));
        }
        let mut take = |path: &StorePath| known.remove(path).ok_or_else(|| PushError::Unknown { path: path.clone() });
        paths.iter().map(&mut take).collect()
    }

    async fn path_info_json(&self, dir: &StoreDir, paths: &[StorePath]) -> Result<Vec<u8>, PushError> {
        const COMMAND: [&str; 4] = ["--extra-experimental-features", "nix-command", "path-info", "--json"];
        // Newer versions want to be told which shape, older ones do not know the flag.
        match self.run("nix", &[&COMMAND[..], &["--json-format", "1", "--"]].concat(), dir, paths).await {
            Err(PushError::Nix(NixError::Failed { message, .. })) if message.contains("--json-format") => {
                self.run("nix", &[&COMMAND[..], &["--"]].concat(), dir, paths).await
            }
            outcome => outcome,
        }
    }
}

async fn is_there(program: &str) -> Result<bool, PushError> {
    match execute(program, &["--version"]).await {
        Ok(_) => Ok(true),
        Err(PushError::Nix(error)) if error.is_absent() => Ok(false),
        Err(error) => Err(error),
    }
}

async fn execute(program: &str, arguments: &[impl AsRef<OsStr>]) -> Result<Vec<u8>, PushError> {
    Ok(nix::run(program, arguments, b"", LIMIT).await?)
}

fn unreadable(program: &str, source: impl std::error::Error + Send + Sync + 'static) -> PushError {
    PushError::Output { program: program.to_owned(), source: Box::new(source) }
}

/// Why the output of `nix path-info --json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathInfoError {
    /// It is no JSON, or of an unknown shape.
    #[error("read JSON")]
    Json(#[from] serde_json::Error),
    /// The text of a database is none.
    #[error("read the database")]
    Database(#[from] FormatError),
    /// A path or hash in it is none.
    #[error("read {text:?}")]
    Value {
        /// What stands there.
        text: String,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
}

/// What one version of Nix or another writes about a path.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PathInfo {
    #[serde(default)]
    path: Option<String>,
    nar_hash: String,
    nar_size: u64,
    #[serde(default)]
    references: Vec<String>,
    #[serde(default)]
    deriver: Option<String>,
    #[serde(default)]
    signatures: Vec<String>,
    #[serde(default)]
    ca: Option<Address>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Address {
    Text(String),
    Fields { method: String, hash: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Versioned { info: BTreeMap<String, Option<PathInfo>> },
    List(Vec<PathInfo>),
    Map(BTreeMap<String, Option<PathInfo>>),
}

/// Reads what `nix path-info --json` writes, in any of its shapes. Paths that Nix does not know are left out.
///
/// # Errors
/// When it is none of those shapes.
pub fn parse_path_info(dir: &StoreDir, text: &[u8]) -> Result<Vec<NarInfo>, PathInfoError> {
    let document: Document = serde_json::from_slice(text)?;
    let infos: Vec<(String, PathInfo)> = match document {
        Document::Versioned { info } | Document::Map(info) => {
            info.into_iter().filter_map(|(path, info)| Some((path, info?))).collect()
        }
        Document::List(infos) => infos.into_iter().filter_map(|mut info| Some((info.path.take()?, info))).collect(),
    };
    infos.into_iter().map(|(path, info)| info.into_narinfo(dir, &path)).collect()
}

impl PathInfo {
    fn into_narinfo(self, dir: &StoreDir, path: &str) -> Result<NarInfo, PathInfoError> {
        let store_path = |text: &str| value(text, text.parse().or_else(|_| StorePath::parse_absolute(dir, text)));
        let references = self.references.iter().map(|text| store_path(text)).collect::<Result<Vec<_>, _>>()?;
        let mut signatures =
            self.signatures.iter().map(|text| value(text, text.parse())).collect::<Result<Vec<_>, _>>()?;
        signatures.sort_unstable();
        signatures.dedup();
        let ca = match &self.ca {
            None => None,
            Some(Address::Text(text)) => Some(value(text, text.parse())?),
            Some(Address::Fields { method, hash }) => address(method, hash),
        };
        let deriver = self.deriver.as_deref().filter(|text| !matches!(*text, "" | "unknown-deriver"));
        let record = Registration {
            path: store_path(path)?,
            nar_hash: value(&self.nar_hash, self.nar_hash.parse())?,
            nar_size: self.nar_size,
            deriver: deriver.map(store_path).transpose()?,
            references,
        };
        narinfo(record, signatures, ca)
    }
}

/// A content address given by its fields. Only those by SHA-256 have a spelling that leads back to Nix's text; without
/// the others a path is one like any other.
fn address(method: &str, hash: &str) -> Option<ContentAddress> {
    let hash = hash.parse().ok()?;
    match method {
        "text" => Some(ContentAddress::Text(hash)),
        "flat" => Some(ContentAddress::Flat(hash)),
        "nar" => Some(ContentAddress::NixArchive(hash)),
        _ => None,
    }
}

/// A path of unknown size (0) cannot be signed for, nor sent with a promise of its length.
fn size(size: u64) -> Result<u64, FormatError> {
    match size {
        0 => Err(FormatError::Syntax { field: "narSize", offset: 0 }),
        size if size > NAR_SIZE_MAX => {
            Err(FormatError::Limit { field: "narSize", value: size, max: NAR_SIZE_MAX, offset: 0 })
        }
        size => Ok(size),
    }
}

fn value<T>(text: &str, parsed: Result<T, FormatError>) -> Result<T, PathInfoError> {
    parsed.map_err(|source| PathInfoError::Value { text: printable(text.as_bytes()), source })
}

/// Reads what `nix-store --dump-db` writes.
fn parse_database(dir: &StoreDir, text: &[u8]) -> Result<Vec<NarInfo>, PathInfoError> {
    let records = registration::parse(dir, text)?;
    records.into_iter().map(|record| narinfo(record, Vec::new(), None)).collect()
}

/// What the database says of a path, as it is published. References become a sorted set.
fn narinfo(
    record: Registration,
    signatures: Vec<Signature>,
    ca: Option<ContentAddress>,
) -> Result<NarInfo, PathInfoError> {
    let Registration { path: store_path, nar_hash, nar_size, deriver, mut references } = record;
    references.sort_unstable();
    references.dedup();
    Ok(NarInfo {
        url: upload_url(&nar_hash),
        compression: Compression::None,
        file_hash: Some(nar_hash),
        file_size: Some(nar_size),
        nar_hash,
        nar_size: value(&store_path.to_string(), size(nar_size))?,
        references,
        deriver,
        signatures,
        ca,
        extra: Vec::new(),
        store_path,
    })
}

#[cfg(test)]
mod tests;
