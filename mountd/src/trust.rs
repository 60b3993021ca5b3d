//! Whom this worker believes: the keys whose signature a path record needs before anything of it is shown.
//!
//! Nix accepts whatever its lower store says, without a signature. So this is the place where content enters the
//! trusted side: a record counts once a trusted key has signed its manifest, its string table and Nix's fingerprint
//! together; everything below the record hangs on it by hashes.

use std::sync::Arc;

use narlake_format::lake::record::PathRecord;
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::signature::PublicKey;
use narlake_format::nix::store_path::{StoreDir, StorePath};

use crate::lru::Weigh;

/// A path record that a trusted key has signed. There is no other way to make one than [`TrustedKeys::verify`].
#[derive(Clone, Debug)]
pub struct TrustedRecord(Arc<PathRecord>);

impl std::ops::Deref for TrustedRecord {
    type Target = PathRecord;

    fn deref(&self) -> &PathRecord {
        &self.0
    }
}

impl Weigh for TrustedRecord {
    fn bytes(&self) -> u64 {
        let info = self.0.info();
        let paths = info.references.iter().chain([&info.store_path]).chain(&info.deriver);
        let paths: usize = paths.map(|path| size_of::<StorePath>() + path.name.as_str().len()).sum();
        let signatures = info.signatures.len() + self.0.lake_signatures().len();
        let table = self.0.inline_table().map_or(0, StringTable::encoded_len);
        // A signature is 64 bytes and the name of a key.
        (size_of::<PathRecord>() + paths + info.url.len() + signatures * 160 + table) as u64
    }
}

/// A realisation that a trusted key has signed. There is no other way to make one than
/// [`TrustedKeys::verify_realisation`].
#[derive(Clone, Debug)]
pub struct TrustedRealisation(Arc<Realisation>);

impl std::ops::Deref for TrustedRealisation {
    type Target = Realisation;

    fn deref(&self) -> &Realisation {
        &self.0
    }
}

impl Weigh for TrustedRealisation {
    fn bytes(&self) -> u64 {
        // An id is a digest and a short name, a path about 100 bytes; a signature 64 bytes and the name of a key.
        (size_of::<Realisation>() + 100 + self.0.dependent.len() * 320 + self.0.signatures.len() * 160) as u64
    }
}

/// The keys, and the store directory that the signatures are for.
#[derive(Clone, Debug)]
pub struct TrustedKeys {
    store_dir: StoreDir,
    keys: Vec<PublicKey>,
}

/// A record without a valid signature of a trusted key: a mistake in the configuration, or an attack.
#[derive(Debug, thiserror::Error)]
#[error("{path} is not signed by a trusted key (it has signatures of: {signers}); check --trusted-key")]
pub struct Untrusted {
    /// The store path.
    pub path: String,
    /// Names of the keys that claim to have signed it.
    pub signers: String,
}

impl TrustedKeys {
    /// Trusts these keys, for this store.
    #[must_use]
    pub const fn new(store_dir: StoreDir, keys: Vec<PublicKey>) -> Self {
        Self { store_dir, keys }
    }

    /// The store directory.
    #[must_use]
    pub const fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    /// Checks the record's signatures.
    ///
    /// # Errors
    /// When none of them is valid and by a trusted key.
    pub fn verify(&self, record: PathRecord) -> Result<TrustedRecord, Untrusted> {
        if record.is_signed_by(&self.store_dir, &self.keys) {
            return Ok(TrustedRecord(Arc::new(record)));
        }
        let names: Vec<&str> = record.lake_signatures().iter().map(|signature| signature.key_name()).collect();
        let signers = if names.is_empty() { "nobody".into() } else { names.join(", ") };
        Err(Untrusted { path: record.info().store_path.display_in(&self.store_dir).to_string(), signers })
    }

    /// The realisation, if a trusted key has signed that it is the one of this output.
    #[must_use]
    pub fn verify_realisation(&self, key: &RealisationKey, realisation: Realisation) -> Option<TrustedRealisation> {
        realisation.is_signed_by(key, &self.keys).then(|| TrustedRealisation(Arc::new(realisation)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
