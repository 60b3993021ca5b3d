//! A content-addressed path must be the one that its content stands for: no signature is asked of it by anybody.

use futures::{Stream, StreamExt};
use narlake_format::nar::{Event, NarError, Reader};
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use narlake_format::nix::hash_modulo::HashModulo;
use narlake_format::nix::store_path::STORE_HASH_CHARS;

use super::{Content, Publication};
use crate::error::{Error, Rejection};

impl Publication<'_> {
    /// Checks the narinfo's CA field, if it has one, against path and content.
    pub(super) async fn check_content_address(&self, content: &Content) -> Result<(), Error> {
        let Some(ca) = &self.info.ca else { return Ok(()) };
        let wrong = || self.rejected(Rejection::ContentAddress(ca.to_string()));
        if !self.info.content_address_holds(&self.lake.info().store_dir) {
            return Err(wrong());
        }
        let nar = self.lake.nar_of(self.cache.domain(), content.manifest, &content.strings);
        let own = &self.info.store_path;
        let holds = match ca {
            ContentAddress::NixArchive(hash) if self.info.references.contains(own) => {
                is_modulo_hash(nar.await?, &own.hash.to_ascii(), hash).await?
            }
            ContentAddress::NixArchive(hash) => *hash == self.info.nar_hash,
            ContentAddress::Text(hash) | ContentAddress::Flat(hash) => flat_hash(nar.await?).await? == Some(*hash),
            ContentAddress::Other(_) => {
                return Err(self.rejected(Rejection::UnsupportedContentAddress(ca.to_string())));
            }
        };
        if holds { Ok(()) } else { Err(wrong()) }
    }
}

/// Whether this is the address of a NAR that names its own path.
async fn is_modulo_hash(
    nar: impl Stream<Item = Result<bytes::Bytes, Error>>,
    own: &[u8; STORE_HASH_CHARS],
    address: &Sha256Hash,
) -> Result<bool, Error> {
    let mut nar = std::pin::pin!(nar);
    let mut hasher = HashModulo::new(own);
    while let Some(bytes) = nar.next().await {
        hasher.update(&bytes?);
    }
    Ok(hasher.is(address))
}

/// SHA-256 of the one file that a NAR holds, `None` where it holds something else.
async fn flat_hash(nar: impl Stream<Item = Result<bytes::Bytes, Error>>) -> Result<Option<Sha256Hash>, Error> {
    let mut nar = std::pin::pin!(nar);
    let mut reader = Reader::new();
    let mut hasher = Sha256Hasher::new();
    let mut is_file = true;
    while let Some(bytes) = nar.next().await {
        reader.feed(&bytes?, &mut |event| {
            match event {
                Event::File { .. } | Event::EndFile => {}
                Event::Data(bytes) => hasher.update(bytes),
                _ => is_file = false,
            }
            Ok::<(), NarError>(())
        })?;
    }
    reader.finish()?;
    Ok(is_file.then(|| hasher.finish()))
}
