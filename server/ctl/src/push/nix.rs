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
use std::io;
use std::process::Stdio;
use std::time::Duration;

use narlake_format::error::FormatError;
use narlake_format::limits::NAR_SIZE_MAX;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use serde::Deserialize;
use tokio::process::Command;

use super::PushError;
use crate::client::upload_url;
use crate::output::printable;

/// Longest that a program of Nix may take. It reads a database, but another process may hold its lock for a while.
const LIMIT: Duration = Duration::from_secs(300);

/// Most paths on one command line: far from what the kernel allows, and few enough calls.
const ARGUMENTS: usize = 1000;

/// Most of what a program said that is repeated, in bytes.
const MESSAGE_MAX: usize = 2000;

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
        let mut log = self.run("nix-store", &["--read-log", "--"], dir, std::slice::from_ref(drv)).await?;
        log.truncate(max);
        Ok(log)
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
            Err(PushError::Failed { message, .. }) if message.contains("--json-format") => {
                self.run("nix", &[&COMMAND[..], &["--"]].concat(), dir, paths).await
            }
            outcome => outcome,
        }
    }
}

async fn is_there(program: &str) -> Result<bool, PushError> {
    match execute(program, &["--version"]).await {
        Ok(_) => Ok(true),
        Err(PushError::Run { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

async fn execute(program: &str, arguments: &[impl AsRef<OsStr>]) -> Result<Vec<u8>, PushError> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let program = || program.to_owned();
    let done = tokio::time::timeout(LIMIT, command.output()).await;
    let done = done.map_err(|_| PushError::Late { program: program(), seconds: LIMIT.as_secs() })?;
    let done = done.map_err(|source| PushError::Run { program: program(), source })?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    let said = done.stderr.trim_ascii();
    let end = said.get(said.len().saturating_sub(MESSAGE_MAX)..).unwrap_or_default();
    let lines: Vec<String> = end.split(|byte| *byte == b'\n').map(printable).collect();
    Err(PushError::Failed { program: program(), message: lines.join("; ") })
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
    ca: Option<ContentAddress>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ContentAddress {
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
        let mut references = self.references.iter().map(|text| store_path(text)).collect::<Result<Vec<_>, _>>()?;
        references.sort_unstable();
        references.dedup();
        let mut signatures =
            self.signatures.iter().map(|text| value(text, text.parse())).collect::<Result<Vec<_>, _>>()?;
        signatures.sort_unstable();
        signatures.dedup();
        let ca = match &self.ca {
            None => None,
            Some(ContentAddress::Text(text)) => Some(value(text, text.parse())?),
            Some(ContentAddress::Fields { method, hash }) => address(method, hash),
        };
        let deriver = self.deriver.as_deref().filter(|text| !matches!(*text, "" | "unknown-deriver"));
        let nar_hash: Sha256Hash = value(&self.nar_hash, self.nar_hash.parse())?;
        Ok(NarInfo {
            store_path: store_path(path)?,
            url: upload_url(&nar_hash),
            compression: Compression::None,
            file_hash: Some(nar_hash),
            file_size: Some(self.nar_size),
            nar_hash,
            nar_size: value(path, size(self.nar_size))?,
            references,
            deriver: deriver.map(store_path).transpose()?,
            signatures,
            ca,
            extra: Vec::new(),
        })
    }
}

/// A content address given by its fields. Only those by SHA-256 have a spelling that leads back to Nix's text; without
/// the others a path is one like any other.
fn address(method: &str, hash: &str) -> Option<narlake_format::nix::content_address::ContentAddress> {
    use narlake_format::nix::content_address::ContentAddress;
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

/// Reads what `nix-store --dump-db` writes: for each path, a field a line, path, NAR hash in hexadecimal, NAR size,
/// deriver or nothing, number of references, references.
fn parse_database(dir: &StoreDir, text: &[u8]) -> Result<Vec<NarInfo>, PathInfoError> {
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines();
    let mut infos = Vec::new();
    while let Some(path) = lines.next() {
        let mut line =
            |field| value(path, lines.next().ok_or(FormatError::Truncated { field, offset: text.len() as u64 }));
        let nar_hash = line("narHash")?;
        let nar_hash = value(nar_hash, Sha256Hash::parse_bare(nar_hash))?.to_string();
        let nar_size = number("narSize", line("narSize")?)?;
        let deriver = Some(line("deriver")?.to_owned());
        let mut references = Vec::new();
        for _ in 0..number("number of references", line("number of references")?)? {
            references.push(line("reference")?.to_owned());
        }
        let info = PathInfo { path: None, nar_hash, nar_size, references, deriver, signatures: Vec::new(), ca: None };
        infos.push(info.into_narinfo(dir, path)?);
    }
    Ok(infos)
}

fn number(field: &'static str, text: &str) -> Result<u64, PathInfoError> {
    value(text, text.parse().map_err(|_| FormatError::Syntax { field, offset: 0 }))
}

#[cfg(test)]
mod tests;
