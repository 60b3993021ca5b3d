//! Files and directories that become store paths by their content, as `nix-store --add` makes them.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use narlake_format::limits::STORE_NAME_MAX;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePathName, is_name_byte};

use super::Object;
use crate::client::upload_url;
use crate::dump::{self, Digest};
use crate::output::{Output, Progress};

/// The narinfo of a tree with this NAR, of this name, without references: type `source`, addressed by the NAR.
///
/// # Panics
/// Never: only references could make the computation fail.
#[must_use]
pub fn source_info(dir: &StoreDir, name: &StorePathName, digest: &Digest) -> NarInfo {
    let ca = ContentAddress::NixArchive(digest.nar_hash);
    let store_path = ca.store_path(dir, name, &[], false).expect("a path without references");
    NarInfo {
        store_path,
        url: upload_url(&digest.nar_hash),
        compression: Compression::None,
        file_hash: Some(digest.nar_hash),
        file_size: Some(digest.nar_size),
        nar_hash: digest.nar_hash,
        nar_size: digest.nar_size,
        references: Vec::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ca),
        extra: Vec::new(),
    }
}

/// The name of a store path made of a file of this name: the same, but for what store paths cannot have. None where
/// nothing is left.
#[must_use]
pub fn name_of(file_name: &[u8]) -> Option<StorePathName> {
    if let Some(name) = str::from_utf8(file_name).ok().and_then(|name| name.parse().ok()) {
        return Some(name);
    }
    let replaced: String = file_name
        .iter()
        .map(|byte| if is_name_byte(*byte) { char::from(*byte) } else { '-' })
        .take(STORE_NAME_MAX)
        .collect();
    // Dashes that stand for nothing, and dots that no name starts with.
    replaced.trim_start_matches(['-', '.']).trim_end_matches('-').parse().ok()
}

/// The name to give to a file: the one that was asked for, or its own.
pub(super) fn choose_name(
    file: &Path,
    asked: Option<&StorePathName>,
    output: &Output,
) -> anyhow::Result<StorePathName> {
    if let Some(name) = asked {
        return Ok(name.clone());
    }
    let own = file.file_name().unwrap_or_default();
    let name = name_of(own.as_encoded_bytes())
        .with_context(|| format!("{} has no name that a store path can have; give one with --name", file.display()))?;
    if name.as_str() != own {
        output.note(format_args!("{} is named {name} in the store", file.display()));
    }
    Ok(name)
}

/// The first of two passes over a tree: what its store path is. The second one sends it, if the lake lacks it.
pub(super) async fn measure(
    dir: &StoreDir,
    file: PathBuf,
    name: StorePathName,
    counter: &Progress,
) -> anyhow::Result<Object> {
    counter.say(file.display());
    let (tree, seen) = (file.clone(), counter.clone());
    let work = tokio::task::spawn_blocking(move || dump::measure(&tree, |bytes| seen.add(bytes)));
    let digest = work.await.context("hash a tree")??;
    Ok(Object { info: source_info(dir, &name, &digest), file })
}
