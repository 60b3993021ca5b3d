//! The server, over HTTP: path records, and the packs that content is in.
//!
//! A request is tried until it is answered or its deadline has passed, with growing pauses: a server that restarts is
//! a delay, not an error. A marked 404 for a path record is an answer, and the only one that means "does not exist".
//! What comes back is bounded before it is parsed, and believed by nobody yet: records go through `trust`, content
//! through the fetch engine's hashes.
//!
//! One attempt never takes the time of all: a connection that is silent, or as good as, is left for another. Where the
//! server gives out URLs of packs, they are read straight from the bucket ([`direct`]), else and if that fails through
//! the server. A token that is not taken is read from its file again.

mod answer;
mod direct;
mod error;
mod token;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use narlake_format::api::{self, ClosureLine, ClosureRequest, Info, LocateResponse};
use narlake_format::id::BlobId;
use narlake_format::lake::location::{Location, PackRef};
use narlake_format::lake::record::PathRecord;
use narlake_format::limits::{CLOSURE_MAX, NARINFO_MAX, PACK_MAX, REALISATION_MAX};
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::store_path::{StoreDir, StorePathHash};
use narlake_storage::ErrorKind;
use narlake_storage::fetch::BlobSource;
use reqwest::header::{AUTHORIZATION, CONTENT_RANGE, RANGE};
use reqwest::{Client, Method, StatusCode, Url};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::answer::Answer;
use self::direct::Direct;
pub use self::error::{Cause, RemoteError};
use self::token::Token;
use crate::metrics::Metrics;
use crate::view::RecordSource;

/// First pause between two attempts; it doubles up to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Time for a connection to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest and shortest time, by the deadline of all attempts, for an answer to begin, and then to bring something.
const PATIENCE_MAX: Duration = Duration::from_secs(10);
const PATIENCE_MIN: Duration = Duration::from_secs(2);

/// Attempts that fit into the deadline even if each of them is silent.
const ATTEMPTS_SILENT: u32 = 3;

/// How often one question is asked again because its answer made no sense: a bit that a bad way has turned is right the next time.
const GARBLED_MAX: u32 = 2;

/// Reads of packs at once.
const READS_MAX: usize = 16;

/// Largest `/info` or error text, in bytes.
const SMALL_MAX: usize = 256 * 1024;

/// Bytes of one location in a `locate` answer, at most: five numbers and brackets, or a pack's name.
const LOCATE_LINE_MAX: usize = 128;

/// Where the server is, and how to talk to it.
#[derive(Clone, Debug)]
pub struct RemoteSettings {
    /// Base URL of the server, or of one of its caches: what Nix is given as a substituter.
    pub server: Url,
    /// Sent as a bearer token, if set.
    pub token: Option<String>,
    /// Where the token is from: it is read again when the server does not take it any more.
    pub token_file: Option<PathBuf>,
    /// Time limit of one request, further attempts included.
    pub deadline: Duration,
}

/// A server.
#[derive(Clone)]
pub struct Remote {
    settings: RemoteSettings,
    client: Client,
    token: Arc<Token>,
    direct: Arc<Direct>,
    /// Varies the pauses between attempts; only has to differ.
    jitter: Arc<AtomicU64>,
    /// What record texts are parsed for; known once the server or the configuration has said.
    store_dir: StoreDir,
    /// Turns to read packs.
    reads: Arc<Semaphore>,
    metrics: Metrics,
}

impl Remote {
    /// Talks to this server about paths of this store.
    ///
    /// # Errors
    /// When the TLS library does not start.
    pub fn new(settings: RemoteSettings, store_dir: StoreDir, metrics: &Metrics) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .user_agent(concat!("narlake-mountd/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .build()?;
        let reads = Arc::new(Semaphore::new(READS_MAX));
        let token = Arc::new(Token::new(settings.token.clone(), settings.token_file.clone()));
        let direct = Arc::new(Direct::new(settings.server.scheme() == "https")?);
        // Workers that start together should not try again together.
        let jitter = Arc::new(AtomicU64::new(u64::from(std::process::id())));
        Ok(Self { settings, client, token, direct, jitter, store_dir, reads, metrics: metrics.clone() })
    }

    /// Longest time for one attempt to bring anything.
    fn patience(&self) -> Duration {
        (self.settings.deadline / ATTEMPTS_SILENT).clamp(PATIENCE_MIN, PATIENCE_MAX)
    }

    /// The same server, about paths of another store.
    #[must_use]
    pub fn with_store_dir(mut self, store_dir: StoreDir) -> Self {
        self.store_dir = store_dir;
        self
    }

    /// Which lake and cache the server serves, and what it signs with.
    ///
    /// # Errors
    /// When it does not answer, or is no lake server.
    pub async fn info(&self) -> Result<Info, RemoteError> {
        self.ask("info", "", || async {
            let response = self.send(Method::GET, "info", None, None).await?;
            json(&response.body(SMALL_MAX).await?)
        })
        .await
    }

    /// Tries until there is an answer or the time is up. Counts both.
    async fn ask<T, F>(
        &self,
        operation: &'static str,
        key: impl ToString,
        attempt: impl FnMut() -> F,
    ) -> Result<T, RemoteError>
    where
        F: Future<Output = Result<T, Cause>>,
    {
        let timer = self.metrics.remote_seconds.start_timer();
        let done = self.tried(attempt).await;
        timer.observe_duration();
        let result = if done.is_ok() { "ok" } else { "error" };
        self.metrics.remote_requests.with_label_values(&[operation, result]).inc();
        // Refusals are answers too: the server is there.
        let up = done.as_ref().err().is_none_or(|cause| cause.kind() != ErrorKind::Unavailable);
        self.metrics.server_up.set(if up { 1.0 } else { 0.0 });
        done.map_err(|cause| RemoteError { operation, key: key.to_string(), cause })
    }

    async fn tried<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, Cause>
    where
        F: Future<Output = Result<T, Cause>>,
    {
        let limit = self.settings.deadline;
        let until = Instant::now() + limit;
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let mut pause = PAUSE_MIN;
        let mut garbled = 0;
        let mut last = None;
        loop {
            let shown = self.token.current();
            let cause = match tokio::time::timeout_at(until, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(cause)) => cause,
                Err(_) => return Err(Cause::Deadline { limit_ms, last }),
            };
            if let Cause::Status { status: 401, text } = cause {
                if self.token.renew(shown).await {
                    continue;
                }
                return Err(self.token.refused(text));
            }
            if cause.is_garbled() && garbled < GARBLED_MAX {
                garbled += 1;
            } else if !cause.passes() {
                return Err(cause);
            }
            let wait = self.vary(pause);
            if Instant::now() + wait >= until {
                return Err(Cause::Deadline { limit_ms, last: Some(Box::new(cause)) });
            }
            last = Some(Box::new(cause));
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Between half of a pause and one and a half.
    fn vary(&self, pause: Duration) -> Duration {
        let seed = self.jitter.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (seed ^ (seed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 48;
        pause.mul_f64(0.5 + mixed as f64 / f64::from(1_u32 << 16))
    }

    /// Sends one request of the lake API; an answer that is not 2xx is an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<(&'static str, Bytes)>,
        range: Option<&Range<u64>>,
    ) -> Result<Answer, Cause> {
        self.send_to(method, &format!("{}/{path}", api::PREFIX), body, range).await
    }

    /// The same to any path below the server's URL, which begins with a slash.
    async fn send_to(
        &self,
        method: Method,
        path: &str,
        body: Option<(&'static str, Bytes)>,
        range: Option<&Range<u64>>,
    ) -> Result<Answer, Cause> {
        let base = self.settings.server.as_str().trim_end_matches('/');
        let mut request = self.client.request(method, format!("{base}{path}"));
        if let Some(token) = self.token.current() {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        if let Some((media_type, body)) = body {
            request = request.header(reqwest::header::CONTENT_TYPE, media_type).body(body);
        }
        let response = Answer::to(request, self.patience(), &self.metrics).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if status == StatusCode::NOT_FOUND && response.headers().contains_key(api::ABSENT_HEADER) {
            return Err(Cause::Absent);
        }
        let damaged = response.headers().contains_key(api::DAMAGED_HEADER);
        let text = response.body(SMALL_MAX).await.unwrap_or_default();
        let text: String = String::from_utf8_lossy(&text).trim().chars().take(200).collect();
        if damaged {
            return Err(Cause::Damaged(text));
        }
        Err(Cause::Status { status: status.as_u16(), text })
    }

    /// Reads a closure's lines; nothing is handed on before the last of them has come.
    async fn closure_once(&self, request: &Bytes) -> Result<(Vec<PathRecord>, Vec<StorePathHash>), Cause> {
        let body = Some(("application/json", request.clone()));
        let mut response = self.send(Method::POST, "closure", body, None).await?;
        let (mut records, mut missing) = (Vec::new(), Vec::new());
        let mut done = None;
        let mut buffer = BytesMut::new();
        while let Some(part) = response.part().await? {
            buffer.extend_from_slice(&part);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                match json(&line)? {
                    ClosureLine::Record(text) => {
                        records.push(PathRecord::parse(&self.store_dir, text.as_bytes()).map_err(Cause::Record)?);
                    }
                    ClosureLine::Missing(hash) => missing.push(hash),
                    ClosureLine::Done(lines) => done = Some(lines),
                }
                if records.len() + missing.len() > CLOSURE_MAX {
                    return Err(Cause::TooLarge { max: CLOSURE_MAX });
                }
            }
            // JSON escapes a record's text to at most six bytes for one.
            if buffer.len() > 6 * NARINFO_MAX {
                return Err(Cause::TooLarge { max: 6 * NARINFO_MAX });
            }
        }
        if done == Some((records.len() + missing.len()) as u64) {
            Ok((records, missing))
        } else {
            Err(Cause::Incomplete("the closure broke off"))
        }
    }
}

#[async_trait]
impl RecordSource for Remote {
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError> {
        let path = format!("paths/{hash}");
        self.ask("look up", hash, || async {
            let Some(response) = present(self.send(Method::GET, &path, None, None).await)? else { return Ok(None) };
            let text = response.body(NARINFO_MAX).await?;
            let record = PathRecord::parse(&self.store_dir, &text).map_err(Cause::Record)?;
            if record.info().store_path.hash != *hash {
                return Err(Cause::Incomplete("the record is of another path"));
            }
            Ok(Some(record))
        })
        .await
    }

    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError> {
        let request = ClosureRequest { roots: roots.to_vec(), have: Vec::new() };
        let request = serde_json::to_vec(&request).map_err(Cause::Json);
        let key = || roots.first().map(ToString::to_string).unwrap_or_default();
        let request: Bytes =
            request.map_err(|cause| RemoteError { operation: "get the closure of", key: key(), cause })?.into();
        let (records, missing) = self.ask("get the closure of", key(), || self.closure_once(&request)).await?;
        records.into_iter().for_each(on);
        Ok(missing)
    }

    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError> {
        // Of the characters of outputs and derivations, this one alone means something else in a URL.
        let path = format!("/{key}").replace('?', "%3F");
        self.ask("look up the realisation", key, || async {
            let Some(response) = present(self.send_to(Method::GET, &path, None, None).await)? else { return Ok(None) };
            let text = response.body(REALISATION_MAX).await?;
            Realisation::parse(key, &text).map(Some).map_err(Cause::Format)
        })
        .await
    }
}

#[async_trait]
impl BlobSource for Remote {
    async fn locate(&self, ids: &[BlobId]) -> Result<Vec<Option<Location>>, narlake_storage::Error> {
        let body = Bytes::from(api::encode_locate(ids));
        let key = ids.first().map(ToString::to_string).unwrap_or_default();
        let max = SMALL_MAX + ids.len() * LOCATE_LINE_MAX;
        let located = self.ask("locate", &key, || async {
            let body = Some(("application/octet-stream", body.clone()));
            let response = self.send(Method::POST, "locate", body, None).await?;
            let answer: LocateResponse = json(&response.body(max).await?)?;
            let locations = answer.locations().map_err(Cause::Format)?;
            if locations.len() == ids.len() {
                Ok(locations)
            } else {
                Err(Cause::Incomplete("not all ids are answered"))
            }
        });
        Ok(located.await?)
    }

    async fn read(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, narlake_storage::Error> {
        let path = format!("packs/{pack}");
        let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let read = self.ask("read", pack, || async {
            // For this attempt alone: a pack that is tried for long keeps nobody from the others while it pauses.
            let _turn = self.reads.acquire().await;
            if let Some(bytes) = self.read_direct(pack, &range).await {
                return Ok(bytes);
            }
            let response = self.send(Method::GET, &path, None, Some(&range)).await?;
            if response.status() != StatusCode::PARTIAL_CONTENT {
                return Err(Cause::Incomplete("the server does not answer with a range"));
            }
            let bytes = response.body(length.min(PACK_MAX)).await?;
            if bytes.len() == length { Ok(bytes) } else { Err(Cause::Incomplete("the pack's bytes broke off")) }
        });
        Ok(read.await?)
    }

    async fn size(&self, pack: &PackRef) -> Result<u64, narlake_storage::Error> {
        let path = format!("packs/{pack}");
        let size = self.ask("size", pack, || async {
            let response = self.send(Method::GET, &path, None, Some(&(0..1))).await?;
            // bytes 0-0/<size>
            let total = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()?.rsplit_once('/'));
            let total = total.and_then(|(_, total)| total.parse().ok());
            total.ok_or(Cause::Incomplete("the server does not say how long the pack is"))
        });
        Ok(size.await?)
    }
}

/// The answer; none where the server itself says that it does not have what was asked for.
fn present(answer: Result<Answer, Cause>) -> Result<Option<Answer>, Cause> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Cause::Absent) => Ok(None),
        // A proxy, or another server: nobody who knows has said that it does not exist.
        Err(Cause::Status { status: 404, .. }) => {
            Err(Cause::Incomplete("404, but not as the server says that something is absent"))
        }
        Err(other) => Err(other),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Cause> {
    serde_json::from_slice(body).map_err(Cause::Json)
}
