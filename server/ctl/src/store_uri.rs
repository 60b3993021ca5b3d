//! What `--store` is given for a local-overlay store: `local-overlay://?root=...&upper-layer=...&lower-store=...`.
//!
//! Read so far as it says where things are. Values are decoded once, as Nix does from 2.34 on; the lower store is a URL
//! of its own inside, with its question mark spelled `%3F` or plain.

use std::path::{Path, PathBuf};

use narlake_format::nix::store_path::StoreDir;

/// Where Nix keeps its state, unless told otherwise.
const STATE: &str = "/nix/var/nix";

/// A local-overlay store.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OverlayStore {
    /// Below what `/nix` is.
    pub root: Option<PathBuf>,
    /// Where the store directory is.
    pub real: Option<PathBuf>,
    /// Where the database is.
    pub state: Option<PathBuf>,
    /// The directory that takes what is written.
    pub upper: Option<PathBuf>,
    /// The store below, as it is spelled.
    pub lower: Option<String>,
    /// The program that is run when the overlay has to forget something.
    pub remount_hook: Option<PathBuf>,
    /// Whether Nix looks at how it is mounted.
    pub check_mount: bool,
}

/// A URL of another kind.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{uri:?} is no local-overlay store: expected local-overlay://?upper-layer=DIR&lower-store=URL")]
pub struct NoOverlayStore {
    /// The URL.
    pub uri: String,
}

impl OverlayStore {
    /// Reads a URL.
    ///
    /// # Errors
    /// When it is of another kind of store.
    pub fn parse(uri: &str) -> Result<Self, NoOverlayStore> {
        let rest = uri.strip_prefix("local-overlay").map(|rest| rest.strip_prefix("://").unwrap_or(rest));
        let query = rest.and_then(|rest| if rest.is_empty() { Some("") } else { rest.strip_prefix('?') });
        let query = query.ok_or_else(|| NoOverlayStore { uri: uri.to_owned() })?;
        let mut store = Self { check_mount: true, ..Self::default() };
        for (name, value) in parameters(query) {
            match name {
                "root" => store.root = Some(value.into()).filter(|root: &PathBuf| root != Path::new("/")),
                "real" => store.real = Some(value.into()),
                "state" => store.state = Some(value.into()),
                "upper-layer" => store.upper = Some(value.into()),
                "lower-store" => store.lower = Some(value),
                "remount-hook" => store.remount_hook = Some(value.into()),
                "check-mount" => store.check_mount = !matches!(value.as_str(), "false" | "no" | "0"),
                _ => {}
            }
        }
        Ok(store)
    }

    /// Where the overlay is mounted.
    #[must_use]
    pub fn merged(&self, dir: &StoreDir) -> PathBuf {
        self.real.clone().unwrap_or_else(|| below(self.root.as_deref(), dir.as_str()))
    }

    /// Where the database and the GC roots are.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(|| below(self.root.as_deref(), STATE))
    }

    /// Where the files of the store below are.
    #[must_use]
    pub fn lower_dir(&self, dir: &StoreDir) -> Option<PathBuf> {
        let lower = self.lower.as_deref()?;
        let (place, query) = lower.split_once('?').unwrap_or((lower, ""));
        let values: Vec<(&str, String)> = parameters(query).collect();
        let value = |name: &str| values.iter().find(|(own, _)| *own == name).map(|(_, value)| PathBuf::from(value));
        if let Some(real) = value("real") {
            return Some(real);
        }
        // A store that is given by a directory is below it.
        let root = value("root").or_else(|| place.starts_with('/').then(|| place.into()));
        Some(below(root.as_deref(), dir.as_str()))
    }

    /// The same store as one without a lower: the database alone, for reading and for entering what is in the lower.
    ///
    /// Nix must not verify or collect through it: what the lower has would seem gone.
    #[must_use]
    pub fn database_uri(&self) -> String {
        let values = [("root", &self.root), ("real", &self.real), ("state", &self.state)];
        let values: Vec<String> = values
            .iter()
            .filter_map(|(name, value)| value.as_ref().map(|value| format!("{name}={}", encode(value))))
            .collect();
        if values.is_empty() { "local".to_owned() } else { format!("local?{}", values.join("&")) }
    }
}

impl std::fmt::Display for OverlayStore {
    /// As Nix is given it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("local-overlay://?")?;
        for (name, value) in [("root", &self.root), ("real", &self.real), ("state", &self.state)] {
            if let Some(value) = value {
                write!(f, "{name}={}&", encode(value))?;
            }
        }
        if let Some(hook) = &self.remount_hook {
            write!(f, "remount-hook={}&", encode(hook))?;
        }
        if !self.check_mount {
            f.write_str("check-mount=false&")?;
        }
        let lower = self.lower.as_deref().unwrap_or_default().replace('?', "%3F").replace('&', "%26");
        write!(f, "upper-layer={}&lower-store={lower}", self.upper.as_deref().map(encode).unwrap_or_default())
    }
}

fn below(root: Option<&Path>, dir: &str) -> PathBuf {
    root.map_or_else(|| dir.into(), |root| root.join(dir.trim_start_matches('/')))
}

fn parameters(query: &str) -> impl Iterator<Item = (&str, String)> {
    query.split('&').filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name, decode(value)))
}

/// Percent signs that start no escape stay what they are.
fn decode(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'%').then(|| after.get(..2)).flatten();
        let digits = escaped.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        match digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn encode(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.+~:=,@".contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mountd_prints() {
        let dir = StoreDir::default();
        let uri = "local-overlay://?root=/job&upper-layer=/u&lower-store=unix:///run/nix.sock%3Freal=/lower";
        let store = OverlayStore::parse(uri).unwrap();
        assert_eq!(store.merged(&dir), Path::new("/job/nix/store"));
        assert_eq!(store.state(), Path::new("/job/nix/var/nix"));
        assert_eq!(store.upper.as_deref(), Some(Path::new("/u")));
        assert_eq!(store.lower_dir(&dir), Some("/lower".into()));
        assert_eq!(store.database_uri(), "local?root=/job");
        assert_eq!(store.to_string(), uri);
        let store = OverlayStore::parse("local-overlay://?upper-layer=/u&lower-store=unix:///s%3Freal=/l").unwrap();
        assert_eq!((store.merged(&dir), store.state()), ("/nix/store".into(), "/nix/var/nix".into()));
        assert_eq!(store.database_uri(), "local");
    }

    #[test]
    fn what_others_write() {
        let dir = StoreDir::default();
        let lower = |text: &str| OverlayStore::parse(text).unwrap().lower_dir(&dir).unwrap();
        assert_eq!(lower("local-overlay?lower-store=/low?read-only=true"), Path::new("/low/nix/store"));
        assert_eq!(lower("local-overlay://?lower-store=%2Flow%3Fread-only%3Dtrue"), Path::new("/low/nix/store"));
        assert_eq!(lower("local-overlay://?lower-store=unix:///s%3Froot=/r%26x=y"), Path::new("/r/nix/store"));
        assert_eq!(lower("local-overlay://?lower-store=daemon"), Path::new("/nix/store"));
        let store =
            OverlayStore::parse("local-overlay://?real=/a%20b&state=/s&check-mount=false&remount-hook=/h&x=y&z");
        let store = store.unwrap();
        assert_eq!((store.merged(&dir), store.state()), ("/a b".into(), "/s".into()));
        assert_eq!((store.remount_hook.as_deref(), store.check_mount), (Some(Path::new("/h")), false));
        assert_eq!(store.database_uri(), "local?real=/a%20b&state=/s");
        assert_eq!(OverlayStore::parse(&store.to_string()).unwrap().merged(&dir), Path::new("/a b"));
        for other in ["", "daemon", "local", "unix:///s", "local-overlays://?x=y", "http://h"] {
            assert!(OverlayStore::parse(other).is_err(), "{other}");
        }
    }

    #[test]
    fn escapes() {
        for (text, expected) in [("a%2Fb", "a/b"), ("100%", "100%"), ("%zz%+4%4", "%zz%+4%4"), ("%C3%A4", "\u{e4}")] {
            assert_eq!(decode(text), expected);
        }
    }
}
