//! The server over HTTP: the lake API for questions, the Nix binary cache protocol for content.
//!
//! One [`Client`] is one server. It bounds every wait: for a connection, for an answer to begin, for each further piece
//! of one. A request that failed for a reason that passes (the connection broke, the server is restarting) is sent
//! again, a few times, each later than the last; all of them may be repeated without harm. Of what the server sends
//! nothing is believed to be short, text, or well formed before it was looked at.
//!
//! The token goes to this server alone: not to where a redirect or a narinfo's URL may lead.

mod error;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use narlake_format::api::{Info, MissingRequest, MissingResponse, PREFIX};
use narlake_format::limits::NARINFO_MAX;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::listing::Listing;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RANGE};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode, Url};

pub use self::error::ClientError;
use crate::cli::AccessOptions;

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(10);

/// How long an upload may make no progress. Long, since a server that has many uploads under way takes further ones in
/// when it can, and keeps their connections waiting meanwhile.
const UPLOAD_IDLE: Duration = Duration::from_secs(300);

/// How long to wait before each further try. Together as long as a server takes to start again.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(8)];

/// Most paths of one question: an answer of a few megabytes that comes within the deadline.
const QUESTION_PATHS: usize = 20_000;

/// Largest JSON answer, in bytes.
const JSON_MAX: usize = 8 << 20;

/// Largest listing, in bytes: about four million entries.
const LISTING_MAX: usize = 512 << 20;

/// Most bytes of an error's text.
const MESSAGE_MAX: usize = 4096;

/// A server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// Ends in a slash, so that relative URLs lead below it.
    base: Url,
    token: Option<HeaderValue>,
    answer: Duration,
}

impl Client {
    /// A client for the server at this URL. Nothing is sent yet.
    ///
    /// # Errors
    /// When the token cannot be read.
    pub fn new(url: &Url, access: &AccessOptions) -> Result<Self, ClientError> {
        let mut base = url.clone();
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", url.path()));
        }
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .user_agent(concat!("narlake/", env!("CARGO_PKG_VERSION")));
        if base.scheme() == "http" {
            // Without TLS no certificates are needed, and a host that has none is no reason to fail.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|source| ClientError::Build { source })?;
        Ok(Self { http, base, token: token(access.token_file.as_deref())?, answer: access.timeout })
    }

    /// The server's URL, without a password that it may hold.
    #[must_use]
    pub fn url(&self) -> String {
        shown(&self.base)
    }

    /// Which lake this is. Asked once and not again: a server that cannot be reached is most often another one.
    ///
    /// # Errors
    /// When the server does not answer, or is none of ours.
    pub async fn info(&self) -> Result<Info, ClientError> {
        let url = self.api("info")?;
        let response = self.send(self.request(Method::GET, &url)).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(ClientError::NotNarlake { url: self.url() });
        }
        self.json(response).await.map_err(|error| match error {
            ClientError::Json { .. } => ClientError::NotNarlake { url: self.url() },
            error => error,
        })
    }

    /// Those of these paths that the cache does not have.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn missing(&self, paths: &[StorePath]) -> Result<Vec<StorePath>, ClientError> {
        let url = self.api("missing")?;
        let mut missing = Vec::new();
        for paths in paths.chunks(QUESTION_PATHS) {
            let question = MissingRequest { paths: paths.to_vec() };
            let answer: MissingResponse = self
                .retrying(async || {
                    let response = self.send(self.request(Method::POST, &url).json(&question)).await?;
                    self.json(response).await
                })
                .await?;
            missing.extend(answer.missing);
        }
        Ok(missing)
    }

    /// The narinfo of a path, if the cache has it.
    ///
    /// # Errors
    /// When the server does not answer, or what it sends is no narinfo.
    pub async fn nar_info(&self, dir: &StoreDir, hash: &StorePathHash) -> Result<Option<NarInfo>, ClientError> {
        let url = self.join(&format!("{hash}.narinfo"))?;
        let text = self.retrying(async || self.get(&url, NARINFO_MAX).await).await?;
        text.map(|text| NarInfo::parse(dir, &text).map_err(|source| ClientError::NarInfo { url: shown(&url), source }))
            .transpose()
    }

    /// The listing of a path, if there is one that can be read: there is none where a name is no text.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn listing(&self, hash: &StorePathHash) -> Result<Option<Listing>, ClientError> {
        let url = self.join(&format!("{hash}.ls"))?;
        let text = self.retrying(async || self.get(&url, LISTING_MAX).await).await?;
        Ok(text.and_then(|text| Listing::parse(&text).ok()))
    }

    /// A NAR, or `length` bytes of it from an offset on: exactly as many as are asked for, or an error.
    ///
    /// # Errors
    /// When the server does not answer, or not with that.
    pub async fn nar(
        &self,
        url: &str,
        range: Option<(u64, u64)>,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Send + use<>, ClientError> {
        let url = self.join(url)?;
        let response = self
            .retrying(async || {
                let mut request = self.request(Method::GET, &url);
                if let Some((offset, length)) = range {
                    request = request.header(RANGE, format!("bytes={offset}-{}", offset + length.saturating_sub(1)));
                }
                self.accepted(self.send(request).await?).await
            })
            .await?;
        // Where the server takes no notice of the range, all of it comes.
        let skip = match (range, response.status()) {
            (Some((offset, _)), StatusCode::OK) => offset,
            _ => 0,
        };
        Ok(exactly(self.pieces(response), shown(&url), skip, range.map(|(_, length)| length)))
    }

    /// Whether a NAR of this digest has been uploaded, so that a narinfo may name it.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn has_nar(&self, nar_hash: &Sha256Hash) -> Result<bool, ClientError> {
        let url = self.join(&upload_url(nar_hash))?;
        self.retrying(async || {
            let response = self.send(self.request(Method::HEAD, &url)).await?;
            match response.status() {
                // Nix's own servers say 403 for what is not there.
                StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => Ok(false),
                _ => self.accepted(response).await.map(|_| true),
            }
        })
        .await
    }

    /// Uploads a NAR, once: the stream cannot be had again. `sent` counts its bytes, and is how a standstill is
    /// noticed.
    ///
    /// Not cancel safe: the server may have taken the NAR or not. It is as if nothing happened until its narinfo is
    /// put.
    ///
    /// # Errors
    /// When the server does not take it, or the stream ends in an error.
    pub async fn put_nar(
        &self,
        nar_hash: &Sha256Hash,
        nar_size: u64,
        nar: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), ClientError> {
        let url = self.join(&upload_url(nar_hash))?;
        let counter = Arc::clone(sent);
        let counted = nar.inspect(move |piece| {
            let length = piece.as_ref().map_or(0, Bytes::len);
            counter.fetch_add(length as u64, Ordering::Relaxed);
        });
        let request = self
            .request(Method::PUT, &url)
            .header(CONTENT_TYPE, "application/x-nix-nar")
            .header(CONTENT_LENGTH, nar_size)
            .body(Body::wrap_stream(counted));
        let response = tokio::select! {
            response = request.send() => response.map_err(|source| ClientError::from_http(&url, source))?,
            () = standstill(sent) => return Err(ClientError::deadline(&url, UPLOAD_IDLE)),
        };
        self.accepted(response).await.map(drop)
    }

    /// Publishes a path whose NAR has been uploaded, and gives the narinfo that the cache now has: another one where
    /// the path was there already.
    ///
    /// Cancel safe: the path is published or it is not, and doing it again is harmless.
    ///
    /// # Errors
    /// When the server does not take it.
    pub async fn put_nar_info(&self, dir: &StoreDir, info: &NarInfo) -> Result<NarInfo, ClientError> {
        let url = self.join(&format!("{}.narinfo", info.store_path.hash))?;
        let text = info.to_text(dir);
        let answer = self
            .retrying(async || {
                let request =
                    self.request(Method::PUT, &url).header(CONTENT_TYPE, "text/x-nix-narinfo").body(text.clone());
                // Publishing reads and writes the bucket, which may be far away.
                let response = self.within(UPLOAD_IDLE, &url, request.send()).await?;
                let response = response.map_err(|source| ClientError::from_http(&url, source))?;
                let response = self.accepted(response).await?;
                self.whole(response, NARINFO_MAX).await
            })
            .await?;
        // Other binary caches answer with nothing: then it is ours that they have.
        if answer.is_empty() {
            return Ok(info.clone());
        }
        NarInfo::parse(dir, &answer).map_err(|source| ClientError::NarInfo { url: shown(&url), source })
    }

    /// Puts a small document that the cache keeps as it comes: a build log or a realisation, by its place in the cache.
    ///
    /// Cancel safe: doing it again is harmless.
    ///
    /// # Errors
    /// When the server does not take it.
    pub async fn put_document(&self, place: &str, media_type: &'static str, text: Bytes) -> Result<(), ClientError> {
        let url = self.join(place)?;
        self.retrying(async || {
            let request = self.request(Method::PUT, &url).header(CONTENT_TYPE, media_type).body(text.clone());
            let response = self.within(UPLOAD_IDLE, &url, request.send()).await?;
            let response = response.map_err(|source| ClientError::from_http(&url, source))?;
            self.accepted(response).await.map(drop)
        })
        .await
    }

    /// Repeats an attempt that failed for a reason that passes.
    async fn retrying<T>(&self, mut attempt: impl AsyncFnMut() -> Result<T, ClientError>) -> Result<T, ClientError> {
        for pause in PAUSES {
            match attempt().await {
                Err(error) if error.is_transient() => tokio::time::sleep(pause).await,
                outcome => return outcome,
            }
        }
        attempt().await
    }

    /// The pauses between the tries of something that has to be begun anew by the caller.
    pub fn pauses() -> impl Iterator<Item = Duration> {
        PAUSES.into_iter()
    }

    fn api(&self, name: &str) -> Result<Url, ClientError> {
        self.join(&format!("{}/{name}", PREFIX.trim_start_matches('/')))
    }

    fn join(&self, relative: &str) -> Result<Url, ClientError> {
        self.base.join(relative).map_err(|_| ClientError::Url { url: relative.to_owned() })
    }

    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        let request = self.http.request(method, url.clone());
        match &self.token {
            Some(token) if url.origin() == self.base.origin() => request.header("authorization", token.clone()),
            _ => request,
        }
    }

    /// The head of the answer.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let (client, request) = request.build_split();
        let request = request.map_err(|source| ClientError::Build { source })?;
        let url = request.url().clone();
        let response = self.within(self.answer, &url, client.execute(request)).await?;
        response.map_err(|source| ClientError::from_http(&url, source))
    }

    async fn within<T>(&self, limit: Duration, url: &Url, work: impl Future<Output = T>) -> Result<T, ClientError> {
        tokio::time::timeout(limit, work).await.map_err(|_| ClientError::deadline(url, limit))
    }

    /// The answer, if it is one of success.
    async fn accepted(&self, response: Response) -> Result<Response, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let url = shown(response.url());
        // What the server has to say is welcome, but its status says enough.
        let text = self.whole(response, MESSAGE_MAX).await.unwrap_or_default();
        Err(ClientError::Refused { url, status: status.as_u16(), message: error::message(status, &text) })
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        let response = self.accepted(response).await?;
        let url = shown(response.url());
        let text = self.whole(response, JSON_MAX).await?;
        serde_json::from_slice(&text).map_err(|source| ClientError::Json { url, source })
    }

    /// A whole small object, or none where there is none.
    async fn get(&self, url: &Url, max: usize) -> Result<Option<Vec<u8>>, ClientError> {
        let response = self.send(self.request(Method::GET, url)).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = self.accepted(response).await?;
        self.whole(response, max).await.map(Some)
    }

    async fn whole(&self, response: Response, max: usize) -> Result<Vec<u8>, ClientError> {
        let url = shown(response.url());
        let mut text = Vec::new();
        let mut pieces = std::pin::pin!(self.pieces(response));
        while let Some(piece) = pieces.next().await.transpose()? {
            if text.len() + piece.len() > max {
                return Err(ClientError::TooLong { url, max: max as u64 });
            }
            text.extend_from_slice(&piece);
        }
        Ok(text)
    }

    /// The body of an answer, each piece of it within the deadline.
    fn pieces(&self, response: Response) -> impl Stream<Item = Result<Bytes, ClientError>> + Send + use<> {
        let (limit, url) = (self.answer, response.url().clone());
        futures::stream::try_unfold(response, move |mut response| {
            let url = url.clone();
            async move {
                let piece = tokio::time::timeout(limit, response.chunk()).await;
                let piece = piece.map_err(|_| ClientError::deadline(&url, limit))?;
                let piece = piece.map_err(|source| ClientError::from_http(&url, source))?;
                Ok(piece.map(|piece| (piece, response)))
            }
        })
    }
}

/// Where a NAR is uploaded, relative to the cache.
#[must_use]
pub fn upload_url(nar_hash: &Sha256Hash) -> String {
    format!("nar/{}.nar", nar_hash.to_base32())
}

/// Without the first `skip` bytes, and then of this length. A body that is longer is let go of.
fn exactly(
    pieces: impl Stream<Item = Result<Bytes, ClientError>> + Send,
    url: String,
    skip: u64,
    length: Option<u64>,
) -> impl Stream<Item = Result<Bytes, ClientError>> + Send {
    let state = (Box::pin(pieces), skip, length);
    futures::stream::try_unfold(state, move |(mut pieces, mut skip, mut length)| {
        let url = url.clone();
        async move {
            while length != Some(0) {
                let Some(mut piece) = pieces.next().await.transpose()? else {
                    return if skip > 0 || length.is_some() { Err(ClientError::Short { url }) } else { Ok(None) };
                };
                let cut = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
                piece = piece.slice(cut..);
                skip -= cut as u64;
                if let Some(left) = &mut length {
                    piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= piece.len() as u64;
                }
                if !piece.is_empty() {
                    return Ok(Some((piece, (pieces, skip, length))));
                }
            }
            Ok(None)
        }
    })
}

/// Ends when the counter has stood still for too long.
async fn standstill(sent: &AtomicU64) {
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(UPLOAD_IDLE).await;
        let now = sent.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

/// The token of the file, else of the environment, as the header that shows it.
fn token(file: Option<&Path>) -> Result<Option<HeaderValue>, ClientError> {
    let (origin, text) = match file {
        Some(file) => {
            let unreadable = |source| ClientError::TokenFile { file: file.to_owned(), source };
            (file.display().to_string(), std::fs::read_to_string(file).map_err(unreadable)?)
        }
        None => match std::env::var("NARLAKE_TOKEN") {
            Ok(text) if !text.is_empty() => ("NARLAKE_TOKEN".to_owned(), text),
            _ => return Ok(None),
        },
    };
    let token = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    let header = token.and_then(|token| HeaderValue::from_str(&format!("Bearer {token}")).ok());
    let mut header = header.ok_or(ClientError::Token { origin })?;
    header.set_sensitive(true);
    Ok(Some(header))
}

/// A URL without a password, for messages.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Fails for URLs that cannot have one.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.to_string()
}

#[cfg(test)]
mod tests;
