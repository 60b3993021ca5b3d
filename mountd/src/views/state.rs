//! What is written down of a view: `<cache dir>/views/<name>/view`, the BLAKE3 of the rest in hexadecimal, a newline, and
//! JSON. It is on disk before the view is mounted.
//!
//! Beside it are the records of a view with its own token, in `metadata`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use narlake_format::api::control::ViewSpec;
use narlake_format::nix::store_path::StorePathHash;
use serde::{Deserialize, Serialize};

/// A view as it is written down.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct State {
    pub(super) spec: ViewSpec,
    /// Hash parts of the paths of its closures; `None` if it shows any path.
    pub(super) members: Option<Vec<StorePathHash>>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    spec: ViewSpec,
    members: Option<Vec<String>>,
}

/// A state file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("write {path}", path = path.display())]
pub struct StateError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// Where a view with its own token keeps its records.
pub(super) fn records_dir(cache_dir: &Path, name: &str) -> PathBuf {
    cache_dir.join("views").join(name)
}

impl State {
    pub(super) fn write(&self, cache_dir: &Path) -> Result<(), StateError> {
        let dir = records_dir(cache_dir, &self.spec.name);
        let path = dir.join("view");
        let write = || {
            fs::create_dir_all(&dir)?;
            let temporary = dir.join("view.new");
            fs::write(&temporary, self.encode()?)?;
            File::open(&temporary)?.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&dir)?.sync_all()
        };
        write().map_err(|source| StateError { path: path.clone(), source })
    }

    fn encode(&self) -> io::Result<String> {
        let members = self.members.as_ref().map(|all| all.iter().map(ToString::to_string).collect());
        let json = serde_json::to_string(&Document { spec: self.spec.clone(), members })?;
        Ok(format!("{}\n{json}", blake3::hash(json.as_bytes()).to_hex()))
    }

    /// `None` if it is not what was written.
    fn decode(text: &str) -> Option<Self> {
        let (check, json) = text.split_once('\n')?;
        if blake3::hash(json.as_bytes()).to_hex().as_str() != check {
            return None;
        }
        let Document { spec, members } = serde_json::from_str(json).ok()?;
        let parse = |all: Vec<String>| all.iter().map(|hash| hash.parse().ok()).collect::<Option<Vec<_>>>();
        let members = match members {
            Some(all) => Some(parse(all)?),
            None => None,
        };
        Some(Self { spec, members })
    }
}

/// All that are written down, in order of their names. One that is damaged is left alone, and logged: it may not come
/// back as a view that shows more than it did.
pub(super) fn load_all(cache_dir: &Path) -> Vec<State> {
    let Ok(entries) = fs::read_dir(cache_dir.join("views")) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path().join("view");
        match fs::read_to_string(&path).map(|text| State::decode(&text)) {
            Ok(Some(state)) if entry.file_name().to_str() == Some(&state.spec.name) => found.push(state),
            // Being made when its daemon died.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => tracing::error!(file = %path.display(), "the view is not what was written, left out; create it again"),
        }
    }
    found.sort_by(|left, right| left.spec.name.cmp(&right.spec.name));
    found
}

/// Removes what there is of a view.
pub(super) fn remove(cache_dir: &Path, name: &str) {
    let dir = records_dir(cache_dir, name);
    // Should the second fail, there is no view in what is left.
    for removed in [fs::remove_file(dir.join("view")), fs::remove_dir_all(&dir)] {
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(dir = %dir.display(), %error, "remove what is written down of a view");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_none() {
        let spec = ViewSpec {
            name: "a".into(),
            mount: "/m".into(),
            roots: vec!["r".into()],
            token_file: None,
            nix_socket: None,
        };
        let members = Some(vec![StorePathHash::from_bytes([7; 20])]);
        let state = State { spec, members };
        let dir = tempfile::tempdir().unwrap();
        state.write(dir.path()).unwrap();
        assert_eq!(load_all(dir.path()), std::slice::from_ref(&state));
        let text = state.encode().unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] ^= 1;
            assert_eq!(State::decode(&String::from_utf8(changed).unwrap()), None, "{at}");
        }
        fs::write(dir.path().join("views/a/view"), "x").unwrap();
        assert!(load_all(dir.path()).is_empty());
        remove(dir.path(), "a");
        assert!(!dir.path().join("views/a").exists());
    }
}
