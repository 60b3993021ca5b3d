//! Text formats: those of Nix's binary caches, path records, keys, condemned packs.

use anyhow::{Context as _, bail};
use narlake_format::lake::condemned;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::cache_info::CacheInfo;
use narlake_format::nix::listing::{Listing, Node};
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::realisation::{DrvOutput, Realisation, RealisationKey};
use narlake_format::nix::signature::{PublicKey, SecretKey};
use narlake_format::nix::store_path::StoreDir;

use super::document;
use super::finding::{Finding, Value};
use crate::cli::Format;

/// What a text seems to be whose first word does not tell.
pub(super) fn recognise(bytes: &[u8]) -> Option<Format> {
    let text = str::from_utf8(bytes).ok()?;
    let has = |field: &str| text.lines().any(|line| line.starts_with(field));
    if has("StorePath: ") {
        return Some(Format::Narinfo);
    }
    if has("StoreDir:") {
        return Some(Format::CacheInfo);
    }
    if !bytes.is_empty() && condemned::decode(bytes).is_ok() {
        return Some(Format::Condemned);
    }
    key(bytes).is_ok().then_some(Format::Key)
}

/// A narinfo, or with our lines a path record.
pub(super) fn narinfo(bytes: &[u8]) -> anyhow::Result<Finding> {
    let dir = store_dir(bytes)?;
    if bytes.windows(b"\nX-Narlake-".len()).any(|window| window == b"\nX-Narlake-") {
        let record = PathRecord::parse(&dir, bytes)?;
        let mut facts = facts_of(&dir, record.info());
        facts.extend([
            ("manifest", Value::text(record.manifest())),
            ("strings", Value::text(record.table())),
            ("inline_strings", record.inline_table().map_or(Value::None, |table| table.len().into())),
            ("lake_signatures", Value::list(record.lake_signatures())),
            ("lake_fingerprint", Value::text(record.lake_fingerprint(&dir))),
        ]);
        return Ok(Finding::new("path record", facts));
    }
    let info = NarInfo::parse(&dir, bytes)?;
    Ok(Finding::new("narinfo", facts_of(&dir, &info)))
}

fn facts_of(dir: &StoreDir, info: &NarInfo) -> Vec<(&'static str, Value)> {
    vec![
        ("store_path", Value::text(info.store_path.display_in(dir))),
        ("url", Value::text(&info.url)),
        ("compression", Value::text(info.compression)),
        ("file_hash", Value::optional(info.file_hash)),
        ("file_size", info.file_size.map_or(Value::None, Value::Number)),
        ("nar_hash", Value::text(info.nar_hash)),
        ("nar_size", info.nar_size.into()),
        ("references", Value::list(&info.references)),
        ("deriver", Value::optional(info.deriver.as_ref())),
        ("signatures", Value::list(&info.signatures)),
        ("ca", Value::optional(info.ca.as_ref())),
        ("ca_holds", info.ca.as_ref().map_or(Value::None, |_| info.content_address_holds(dir).into())),
        ("other_fields", Value::list(info.extra.iter().map(|(name, value)| format!("{name}: {value}")))),
        ("fingerprint", Value::text(info.fingerprint(dir))),
    ]
}

/// The store directory is not a field of its own: it is what the path starts with.
fn store_dir(bytes: &[u8]) -> anyhow::Result<StoreDir> {
    let line = bytes.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"StorePath: "));
    let path = str::from_utf8(line.context("narinfo lacks StorePath")?).context("read StorePath")?;
    let (dir, _) = path.rsplit_once('/').context("StorePath is not an absolute path")?;
    dir.parse().context("read StorePath")
}

pub(super) fn cache_info(bytes: &[u8]) -> anyhow::Result<Finding> {
    let info = CacheInfo::parse(bytes)?;
    let facts = vec![
        ("store_dir", Value::text(info.store_dir)),
        ("want_mass_query", info.want_mass_query.into()),
        ("priority", info.priority.map_or(Value::None, Value::from)),
    ];
    Ok(Finding::new("nix-cache-info", facts))
}

pub(super) fn listing(bytes: &[u8], entries: bool) -> anyhow::Result<Finding> {
    // The error of the format does not say where in the JSON it is.
    document::syntax(bytes)?;
    let listing = Listing::parse(bytes)?;
    let mut counts = Counts::default();
    let mut rows = Vec::new();
    counts.take(&listing.root, ".", &mut |row| {
        if entries {
            rows.push(row);
        }
    });
    let facts = vec![
        ("directories", counts.directories.into()),
        ("files", counts.files.into()),
        ("symlinks", counts.symlinks.into()),
        ("file_bytes", counts.bytes.into()),
    ];
    let finding = Finding::new("listing", facts);
    let columns = &["path", "type", "size", "executable", "nar_offset", "target"];
    Ok(if entries { finding.with("entries", columns, rows) } else { finding })
}

#[derive(Default)]
struct Counts {
    directories: u64,
    files: u64,
    symlinks: u64,
    bytes: u64,
}

impl Counts {
    fn take(&mut self, node: &Node, path: &str, row: &mut impl FnMut(Vec<Value>)) {
        let mut show = |kind, size, executable: bool, offset, target| {
            row(vec![Value::text(path), Value::text(kind), size, executable.into(), offset, target]);
        };
        match node {
            Node::Directory { entries } => {
                self.directories += 1;
                show("directory", Value::None, false, Value::None, Value::None);
                for (name, node) in entries {
                    let path = if path == "." { name.clone() } else { format!("{path}/{name}") };
                    self.take(node, &path, row);
                }
            }
            Node::Regular { size, executable, nar_offset } => {
                self.files += 1;
                self.bytes = self.bytes.saturating_add(*size);
                let offset = nar_offset.map_or(Value::None, Value::Number);
                show("regular", Value::Number(*size), *executable, offset, Value::None);
            }
            Node::Symlink { target } => {
                self.symlinks += 1;
                show("symlink", Value::None, false, Value::None, Value::text(target));
            }
        }
    }
}

/// A realisation says itself what it is of, or nothing says it: then it was found by the derivation's path.
pub(super) fn realisation(bytes: &[u8]) -> anyhow::Result<Finding> {
    #[derive(serde::Deserialize)]
    struct Own {
        id: Option<String>,
        #[serde(rename = "outPath")]
        out_path: String,
    }
    let own: Own = serde_json::from_slice(bytes)?;
    let key = match &own.id {
        Some(id) => RealisationKey::Hash(id.parse::<DrvOutput>()?),
        // The reader wants a key of this kind, and compares nothing with it.
        None => RealisationKey::Path { drv: own.out_path.parse()?, output: "out".parse()? },
    };
    let realisation = Realisation::parse(&key, bytes)?;
    let facts = vec![
        ("id", Value::optional(own.id)),
        ("out_path", Value::text(realisation.out_path)),
        ("dependent", Value::list(realisation.dependent.iter().map(|(id, path)| format!("{id} = {path}")))),
    ];
    Ok(Finding::new("realisation", facts))
}

/// Of a secret key no more is shown than of its public part.
pub(super) fn key(bytes: &[u8]) -> anyhow::Result<Finding> {
    let text = str::from_utf8(bytes)?.trim_end();
    let (format, public) = match (text.parse::<PublicKey>(), text.parse::<SecretKey>()) {
        (Ok(public), _) => ("public key", public),
        (Err(_), Ok(secret)) => ("secret key", secret.public()),
        (Err(error), Err(_)) => bail!(error),
    };
    Ok(Finding::new(format, vec![("name", Value::text(public.name())), ("public_key", Value::text(&public))]))
}

pub(super) fn condemned(bytes: &[u8]) -> anyhow::Result<Finding> {
    let rows = condemned::decode(bytes)?.into_iter().map(|pack| vec![Value::text(pack)]).collect();
    Ok(Finding::new("condemned packs", Vec::new()).with("packs", &["pack"], rows))
}
