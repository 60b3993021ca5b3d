//! Manifests and string tables, loaded and verified. A manifest is read part by part, so a tree of any size takes
//! little memory.

use std::collections::VecDeque;

use narlake_format::error::FormatError;
use narlake_format::id::{BlobKind, ManifestId, TableId};
use narlake_format::lake::manifest::{ManifestEvent, ManifestHeader, ManifestReader, PartRef};
use narlake_format::lake::strings::StringTable;

use bytes::Bytes;

use crate::error::Error;
use crate::fetch::Fetcher;

/// Parts asked for at once.
const PARTS_AHEAD: usize = 16;

/// A manifest being read.
pub struct Manifest {
    id: ManifestId,
    header: ManifestHeader,
    reader: ManifestReader,
    next: usize,
    fetched: VecDeque<Bytes>,
}

impl Manifest {
    /// Fetches the header.
    ///
    /// # Errors
    /// `Corrupt` where the manifest is nowhere, does not verify, or is not one.
    pub async fn open(fetcher: &Fetcher, id: &ManifestId) -> Result<Self, Error> {
        let bytes = one(fetcher, BlobKind::Manifest, (*id).into()).await?;
        let header = ManifestHeader::decode(&bytes).map_err(Error::format(format!("manifest {id}")))?;
        let reader = ManifestReader::new(&header);
        Ok(Self { id: *id, header, reader, next: 0, fetched: VecDeque::new() })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &ManifestHeader {
        &self.header
    }

    /// Hands the events of the next part to `on`. False when there is no further part and the tree is whole.
    ///
    /// # Errors
    /// `Corrupt` where a part is nowhere, does not verify, or breaks a rule of the format, and what `on` returns.
    pub async fn next_part<F>(&mut self, fetcher: &Fetcher, mut on: F) -> Result<bool, Error>
    where
        F: FnMut(ManifestEvent<'_>) -> Result<(), FormatError>,
    {
        if self.fetched.is_empty() {
            let ahead: Vec<_> = self.header.parts.iter().skip(self.next).take(PARTS_AHEAD).map(wanted).collect();
            if ahead.is_empty() {
                self.reader.finish().map_err(self.wrong("its end"))?;
                return Ok(false);
            }
            self.fetched = fetcher.fetch(&ahead).await?.into();
        }
        if let Some(bytes) = self.fetched.pop_front() {
            let part = self.next;
            self.next += 1;
            self.reader.part(&bytes, &mut on).map_err(self.wrong(&format!("part {part}")))?;
        }
        Ok(true)
    }

    fn wrong(&self, place: &str) -> impl FnOnce(FormatError) -> Error + use<> {
        Error::format(format!("manifest {}, {place}", self.id))
    }
}

fn wanted(part: &PartRef) -> (BlobKind, narlake_format::id::BlobId) {
    (BlobKind::Part, part.id.into())
}

/// Reads a whole manifest.
///
/// # Errors
/// As [`Manifest::open`] and [`Manifest::next_part`].
pub async fn load<F>(fetcher: &Fetcher, id: &ManifestId, mut on: F) -> Result<ManifestHeader, Error>
where
    F: FnMut(ManifestEvent<'_>) -> Result<(), FormatError>,
{
    let mut manifest = Manifest::open(fetcher, id).await?;
    while manifest.next_part(fetcher, &mut on).await? {}
    Ok(manifest.header)
}

/// Fetches a string table.
///
/// # Errors
/// `Corrupt` where it is nowhere, does not verify, or is not one.
pub async fn table(fetcher: &Fetcher, id: &TableId) -> Result<StringTable, Error> {
    let bytes = one(fetcher, BlobKind::Table, (*id).into()).await?;
    StringTable::decode(&bytes).map_err(Error::format(format!("string table {id}")))
}

async fn one(fetcher: &Fetcher, kind: BlobKind, id: narlake_format::id::BlobId) -> Result<Bytes, Error> {
    fetcher.fetch(&[(kind, id)]).await?.pop().ok_or(Error::MissingBlob { kind, id })
}
