//! `<hash>.ls`: what files a path has, made from its manifest as it is sent.
//!
//! A client may upload its own listing. It is read and dropped: ours is made from what was verified, and nobody will
//! ever see the client's.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use narlake_format::error::FormatError;
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::scrub::PatchList;
use narlake_format::lake::strings::StringTable;
use narlake_format::nar::Event;
use narlake_format::nix::listing::{ListingError, ListingWriter};
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::fetch::Fetcher;
use narlake_storage::manifest::Manifest;
use narlake_storage::{Cache, Error};

use super::buffers::Buffer;
use super::error::HttpError;
use super::{State, body};

const ROUTE: &str = "/{hash}.ls";

/// Largest listing of a client's that is read, in bytes: ten million entries.
const LISTING_BYTES_MAX: u64 = 2 << 30;

/// Memory that making a listing takes, in bytes: a part of the manifest, its text, and the strings.
const ANSWER_BYTES: usize = 2 << 20;

/// The listing of a path.
pub async fn get(state: &State, cache: &Cache, hash: StorePathHash) -> Result<Response, HttpError> {
    let record = state.lake.lookup(cache, &hash).await?;
    let record = record.ok_or_else(|| HttpError::not_found(format!("{hash} is not in this cache")))?;
    let buffer = state.answers.take(ANSWER_BYTES).await?;
    let strings = state.lake.strings(cache, &record).await?;
    let fetcher = state.lake.fetcher(cache.domain());
    let manifest = Manifest::open(&fetcher, &record.manifest()).await?;
    let mut lister = Lister { fetcher, manifest, strings, writer: ListingWriter::new(), _buffer: buffer };
    // The first part is made before 200 is sent, and is the whole listing of nearly every path.
    let first = match lister.next().await {
        Ok(text) => text.unwrap_or_default(),
        Err(ListError::Lake(error)) => return Err(error.into()),
        Err(ListError::Listing(error)) => return Err(HttpError::not_found(format!("{hash} has no listing: {error}"))),
    };
    let rest =
        stream::try_unfold(lister, |mut lister| async move { Ok(lister.next().await?.map(|text| (text, lister))) });
    let text = stream::iter([Ok::<_, ListError>(first)]).chain(rest);
    let body = body::in_time(state, text);
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// Why a listing cannot be made.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error(transparent)]
    Lake(#[from] Error),
    #[error(transparent)]
    Listing(#[from] ListingError),
}

/// A listing being made, a part of the manifest at a time.
struct Lister {
    fetcher: Arc<Fetcher>,
    manifest: Manifest,
    strings: StringTable,
    writer: ListingWriter,
    _buffer: Buffer,
}

impl Lister {
    async fn next(&mut self) -> Result<Option<Bytes>, ListError> {
        let Self { fetcher, manifest, strings, writer, .. } = self;
        let mut text = Vec::new();
        let mut failed = None;
        let more = manifest
            .next_part(fetcher, |event| {
                if failed.is_none() {
                    failed = list(event, strings, writer, &mut text)?.err();
                }
                Ok(())
            })
            .await?;
        match failed {
            Some(error) => Err(error.into()),
            None if more => Ok(Some(text.into())),
            None => Ok(writer.finish().map(|()| None)?),
        }
    }
}

/// Lists one event. The outer error is of the manifest, the inner one of the listing.
fn list(
    event: ManifestEvent<'_>,
    strings: &StringTable,
    writer: &mut ListingWriter,
    text: &mut Vec<u8>,
) -> Result<Result<(), ListingError>, FormatError> {
    let event = match event {
        ManifestEvent::Directory => Event::Directory,
        ManifestEvent::Entry { name } => Event::Entry { name },
        ManifestEvent::EndDirectory => Event::EndDirectory,
        ManifestEvent::BeginFile { executable, size } => Event::File { executable, size },
        ManifestEvent::EndFile { .. } => Event::EndFile,
        // A listing says where content is, and not what.
        ManifestEvent::Chunk { .. } | ManifestEvent::Patch(_) => return Ok(Ok(())),
        ManifestEvent::Symlink { target, patches } => {
            let mut target = target.to_vec();
            PatchList::resolve(patches, strings, target.len() as u64)?.restore(0, &mut target);
            return Ok(writer.event(Event::Symlink { target: &target }, text));
        }
    };
    Ok(writer.event(event, text))
}

/// Takes a listing and forgets it.
pub async fn put(state: &State, headers: &HeaderMap, body: Body) -> Result<Response, HttpError> {
    body::ignored(state, ROUTE, headers, body, LISTING_BYTES_MAX).await?;
    Ok(StatusCode::CREATED.into_response())
}
