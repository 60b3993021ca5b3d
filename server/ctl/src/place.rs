//! A place in the store as people write it: `/nix/store/<hash>-<name>`, or `<hash>-<name>` alone, and what may follow.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;

use narlake_format::nix::store_path::{StoreDir, StorePath};

use crate::output::printable;

/// A store path, and a path inside its object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The store directory, where it was written.
    dir: Option<StoreDir>,
    /// The store path.
    pub path: StorePath,
    /// The names that lead on from its root, as they were written.
    pub inner: Vec<Vec<u8>>,
}

/// Text that names no place in a store.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected /nix/store/<hash>-<name>, or a file below it")]
pub struct PlaceError;

impl Place {
    /// Reads what was written.
    ///
    /// # Errors
    /// When there is no store path in it, or it is not at the start.
    pub fn parse(text: &OsStr) -> Result<Self, PlaceError> {
        let text = text.as_bytes();
        let absolute = text.first() == Some(&b'/');
        let mut names = text.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
        let (mut dir, mut path) = (String::new(), None);
        // The store directory is not known here: it is what stands before the first name of a store path.
        for name in names.by_ref() {
            let name = str::from_utf8(name).map_err(|_| PlaceError)?;
            if let Ok(found) = name.parse() {
                path = Some(found);
                break;
            }
            dir.push('/');
            dir.push_str(name);
        }
        let dir = match (absolute, dir.is_empty()) {
            (true, false) => Some(dir.parse().map_err(|_| PlaceError)?),
            (false, true) => None,
            _ => return Err(PlaceError),
        };
        Ok(Self { dir, path: path.ok_or(PlaceError)?, inner: names.map(<[u8]>::to_vec).collect() })
    }

    /// Whether the place is in this store, as far as was said.
    #[must_use]
    pub fn is_in(&self, dir: &StoreDir) -> bool {
        self.dir.as_ref().is_none_or(|own| own == dir)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(dir) = &self.dir {
            write!(f, "{dir}/")?;
        }
        write!(f, "{}", self.path)?;
        self.inner.iter().try_for_each(|name| write!(f, "/{}", printable(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-hello";

    #[test]
    fn places() {
        let check = |text: &str, dir: Option<&str>, inner: &[&str]| {
            let place = Place::parse(OsStr::new(text)).unwrap();
            assert_eq!(place.dir.as_ref().map(StoreDir::as_str), dir, "{text}");
            assert_eq!(place.path.to_string(), PATH);
            let names: Vec<_> = place.inner.iter().map(|name| str::from_utf8(name).unwrap()).collect();
            assert_eq!(names, inner, "{text}");
        };
        check(PATH, None, &[]);
        check(&format!("{PATH}/bin//hello"), None, &["bin", "hello"]);
        check(&format!("/nix/store/{PATH}"), Some("/nix/store"), &[]);
        check(&format!("/nix//store/{PATH}/./bin/"), Some("/nix/store"), &["bin"]);
        check(&format!("/gnu/store/{PATH}/../x"), Some("/gnu/store"), &["..", "x"]);
        // What follows the first store path is inside it, even if it looks like another.
        check(&format!("/nix/store/{PATH}/{PATH}"), Some("/nix/store"), &[PATH]);
    }

    #[test]
    fn no_places() {
        for text in ["", "/", ".", "/nix/store", "hello", &format!("store/{PATH}"), &format!("/{PATH}")] {
            assert_eq!(Place::parse(OsStr::new(text)), Err(PlaceError), "{text}");
        }
    }
}
