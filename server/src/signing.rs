//! The keys that narinfos are signed with: read from the files that the configuration names, or made once and kept in
//! the data directory.
//!
//! Several keys sign side by side, which is how a key is rotated: add the new one, wait until clients trust it, take
//! the old one away. A key that this server made is written whole or not at all, readable by its user alone, and never
//! replaced; losing it means that clients must be told of a new one.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use narlake_format::error::FormatError;
use narlake_format::nix::signature::{PublicKey, SecretKey};
use narlake_storage::Entropy;

/// Name, in the data directory, of the key that the server makes.
const KEY_FILE: &str = "signing-key";

/// The keys that narinfos are signed with.
#[derive(Debug, Clone)]
pub struct Signers {
    keys: Vec<SecretKey>,
}

/// A key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The file cannot be read or written.
    #[error("{operation} signing key {path}")]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file does not hold a secret key.
    #[error("signing key {path} is not <name>:<base64 of 64 bytes>")]
    Format {
        /// The file.
        path: PathBuf,
        /// Which part.
        #[source]
        source: FormatError,
    },
}

impl Signers {
    /// Reads the keys, or, where no file is named, the one in the data directory, which is made if it is not there.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(files: &[PathBuf], data_dir: &Path, entropy: &dyn Entropy) -> Result<Self, SigningError> {
        if !files.is_empty() {
            return Ok(Self { keys: files.iter().map(|path| read(path)).collect::<Result<_, _>>()? });
        }
        let path = data_dir.join(KEY_FILE);
        if !path.exists() {
            make(&path, entropy)?;
        }
        Ok(Self { keys: vec![read(&path)?] })
    }

    /// The keys to sign with.
    #[must_use]
    pub fn keys(&self) -> &[SecretKey] {
        &self.keys
    }

    /// What clients put into `trusted-public-keys`.
    #[must_use]
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.iter().map(SecretKey::public).collect()
    }
}

fn read(path: &Path) -> Result<SecretKey, SigningError> {
    let io = |operation| move |source| SigningError::Io { operation, path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(io("read"))?;
    let mode = fs::metadata(path).map_err(io("look at"))?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), mode = format!("{:o}", mode & 0o777), "signing key is readable by others");
    }
    text.trim().parse().map_err(|source| SigningError::Format { path: path.to_owned(), source })
}

fn make(path: &Path, entropy: &dyn Entropy) -> Result<(), SigningError> {
    let io = |operation| move |source| SigningError::Io { operation, path: path.to_owned(), source };
    let mut seed = [0; 32];
    entropy.fill(&mut seed);
    // Clients look a key up by its name: two servers must not make keys of one name.
    let mut unique = [0; 4];
    entropy.fill(&mut unique);
    let name = format!("narlake-{:08x}-1", u32::from_le_bytes(unique));
    let key =
        SecretKey::generate(&name, seed).map_err(|source| SigningError::Format { path: path.to_owned(), source })?;

    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(io("make the directory of"))?;
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("remove a half-written")(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(io("create"))?;
    file.write_all(format!("{}\n", key.to_secret_text()).as_bytes()).map_err(io("write"))?;
    file.sync_all().map_err(io("sync"))?;
    // A link, not a rename: should another server have made a key meanwhile, that one stays.
    match fs::hard_link(&temporary, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io("name")(error)),
        _ => {}
    }
    fs::remove_file(&temporary).map_err(io("clean up after"))?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(io("sync the directory of"))
}

#[cfg(test)]
mod tests {
    use narlake_storage::OsEntropy;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_only_its_user_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let first = Signers::open(&[], &data, &OsEntropy).unwrap().public_keys();
        let again = Signers::open(&[], &data, &OsEntropy).unwrap().public_keys();
        assert_eq!(first, again);
        let mode = fs::metadata(data.join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
        let other = Signers::open(&[], &dir.path().join("other"), &OsEntropy).unwrap().public_keys();
        assert_ne!(first[0].name(), other[0].name());
    }

    #[test]
    fn a_crash_while_making_it_leaves_nothing_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("signing-key.new"), "half a k").unwrap();
        assert_eq!(Signers::open(&[], dir.path(), &OsEntropy).unwrap().keys().len(), 1);
    }

    #[test]
    fn named_files_are_all_used_and_none_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = ["a-1", "b-1"]
            .iter()
            .map(|name| {
                let path = dir.path().join(name);
                fs::write(&path, SecretKey::generate(name, [7; 32]).unwrap().to_secret_text()).unwrap();
                path
            })
            .collect();
        let signers = Signers::open(&files, &dir.path().join("data"), &OsEntropy).unwrap();
        assert_eq!(signers.keys().iter().map(SecretKey::name).collect::<Vec<_>>(), ["a-1", "b-1"]);
        assert!(!dir.path().join("data").exists());
    }

    #[test]
    fn what_is_no_key_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broken");
        for text in ["", "a-1", "a-1:AAAA", ":"] {
            fs::write(&path, text).unwrap();
            let error = Signers::open(std::slice::from_ref(&path), dir.path(), &OsEntropy).unwrap_err().to_string();
            assert!(error.contains("broken"), "{error}");
        }
        let missing = Signers::open(&[dir.path().join("missing")], dir.path(), &OsEntropy).unwrap_err();
        assert!(missing.to_string().contains("read signing key"), "{missing}");
    }
}
