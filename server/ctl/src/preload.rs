//! The database of an overlay's Nix, filled in one go: what Nix would otherwise ask for path by path, over its socket and
//! in a transaction each, is loaded with `nix-store --load-db`.
//!
//! It goes into the same database through a store without a lower (`local?root=...`): through the overlay store Nix would
//! ask the lower about each path first, which is what this saves. Nothing is written for paths that Nix knows already.

use std::collections::HashSet;

use anyhow::Context as _;
use narlake_format::nix::registration::Registration;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use serde::Serialize;

use crate::nix::{self, ARGUMENTS, DATABASE, NixError};
use crate::registration::Closure;
use crate::store_uri::OverlayStore;

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Preloaded {
    /// Paths of the closures.
    pub paths: u64,
    /// Those of them that were not known before.
    pub new: u64,
}

/// Enters these closures in the database of the overlay's Nix.
///
/// Nix enters all of it or nothing.
///
/// # Errors
/// When Nix is not there, or fails.
pub async fn load(store: &OverlayStore, closure: &Closure) -> anyhow::Result<Preloaded> {
    let uri = store.database_uri();
    let paths = closure.records.len() as u64;
    let unknown = unknown(&uri, &closure.dir, &closure.records).await.context("ask Nix what it knows")?;
    let new: Vec<&Registration> = closure.records.iter().filter(|record| unknown.contains(&record.path)).collect();
    if !new.is_empty() {
        enter(&uri, &closure.dir, new.iter().copied()).await.context("enter the closure in Nix's database")?;
    }
    Ok(Preloaded { paths, new: new.len() as u64 })
}

/// Those of these paths that are not in the database.
async fn unknown(uri: &str, dir: &StoreDir, records: &[Registration]) -> Result<HashSet<StorePath>, NixError> {
    const PROGRAM: &str = "nix-store";
    let mut unknown = HashSet::new();
    for some in records.chunks(ARGUMENTS) {
        let paths = some.iter().map(|record| record.path.display_in(dir).to_string());
        let options = ["--check-validity", "--print-invalid", "--store", uri].map(str::to_owned);
        let arguments: Vec<String> = options.into_iter().chain(paths).collect();
        let text = nix::run(PROGRAM, &arguments, b"", DATABASE).await?;
        for line in String::from_utf8_lossy(&text).lines() {
            let output = |source| NixError::Output { program: PROGRAM.to_owned(), source };
            unknown.insert(StorePath::parse_absolute(dir, line).map_err(output)?);
        }
    }
    Ok(unknown)
}

/// Enters these records, which refer to nothing that is neither known nor among them.
pub(crate) async fn enter<'a>(
    uri: &str,
    dir: &StoreDir,
    records: impl Iterator<Item = &'a Registration>,
) -> Result<(), NixError> {
    let mut text = String::new();
    records.for_each(|record| record.write(dir, &mut text));
    nix::run("nix-store", &["--load-db", "--store", uri], text.as_bytes(), DATABASE).await.map(drop)
}
