//! Packs read straight from the bucket, at URLs that the server gives out.
//!
//! Nobody waits for a URL: the first reads of a pack go through the server while it is asked for. A URL is used until
//! shortly before it expires. One that the bucket does not take is asked for anew, once; whatever else goes wrong, the
//! read goes through the server, and so do all others for a while. The token is for the server alone, and a redirection
//! elsewhere is not followed. Bytes are as little believed as the server's.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use narlake_format::api::PackUrl;
use narlake_format::lake::location::PackRef;
use reqwest::header::RANGE;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, StatusCode, Url};
use tokio::time::Instant;

use super::answer::Answer;
use super::{CONNECT_TIMEOUT, Cause, Remote, SMALL_MAX, json};
use crate::lru::{Lru, Weigh, lru};

/// Memory for URLs: 4,000 of them.
const URLS_BYTES: u64 = 4 << 20;

/// Questions for URLs at once.
const ASKING_MAX: usize = 4;

/// How long before its end a URL is not used any more: a request may be on its way that long.
const MARGIN: Duration = Duration::from_secs(20);

/// Longest time for the bucket to begin its answer: the server is there as well, and has been waiting.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long everything goes through the server after the bucket, or the server itself, failed.
const PAUSE: Duration = Duration::from_secs(60);

/// How long a server is not asked that knows nothing of URLs: an older one.
const SILENT: Duration = Duration::from_secs(600);

/// A pack's URL, and until when it is used.
struct Signed {
    url: Url,
    until: Instant,
}

impl Weigh for Signed {
    fn bytes(&self) -> u64 {
        (size_of::<Self>() + self.url.as_str().len()) as u64
    }
}

pub(super) struct Direct {
    client: Client,
    /// Only URLs with TLS: what came privately from the server should not come openly from elsewhere.
    tls: bool,
    urls: Lru<PackRef, Arc<Signed>>,
    // Held to look and to note, never across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asking: HashSet<PackRef>,
    /// Until when no URL is asked for.
    unasked: Option<Instant>,
    /// Until when no URL is used.
    unused: Option<Instant>,
}

/// What became of a read from the bucket.
enum Read {
    Done(Bytes),
    /// The bucket does not take the URL.
    Refused,
    Failed(Cause),
}

impl Direct {
    pub(super) fn new(tls: bool) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .user_agent(concat!("narlake-mountd/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT.min(PATIENCE))
            .redirect(Policy::none())
            .build()?;
        Ok(Self { client, tls, urls: lru(4096, URLS_BYTES), state: Mutex::default() })
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn keep(&self, pack: &PackRef, answer: &PackUrl) -> Option<Arc<Signed>> {
        let (now, valid) = (Instant::now(), Duration::from_secs(answer.valid_s.min(604_800)));
        let Some(url) = &answer.url else {
            self.with(|state| state.unasked = Some(now + valid));
            return None;
        };
        let url = Url::parse(url).ok().filter(|url| url.scheme() == "https" || (url.scheme() == "http" && !self.tls));
        let Some(url) = url else {
            tracing::warn!(%pack, "the server gives out a URL of a pack that is not used: not https, as its own is");
            self.with(|state| state.unasked = Some(now + SILENT));
            return None;
        };
        let signed = Arc::new(Signed { url, until: now + valid.saturating_sub(MARGIN.min(valid / 4)) });
        self.urls.insert(*pack, Arc::clone(&signed));
        Some(signed)
    }
}

/// Strikes a question off the list, however it ends.
struct Asking {
    direct: Arc<Direct>,
    pack: PackRef,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.direct.with(|state| state.asking.remove(&self.pack));
    }
}

impl Remote {
    /// Bytes of a pack from the bucket; `None` if they are to be had from the server.
    pub(super) async fn read_direct(&self, pack: &PackRef, range: &Range<u64>) -> Option<Bytes> {
        let now = Instant::now();
        if self.direct.with(|state| state.unused.is_some_and(|until| now < until)) {
            return None;
        }
        let Some(signed) = self.direct.urls.get(pack).filter(|signed| now < signed.until) else {
            self.ask_for_url(pack, now);
            return None;
        };
        let mut read = self.read_at(&signed.url, range).await;
        if matches!(read, Read::Refused) {
            self.direct.urls.remove(pack);
            let signed = self.url_of(pack).await?;
            read = self.read_at(&signed.url, range).await;
        }
        let (result, bytes) = match read {
            Read::Done(bytes) => ("ok", Some(bytes)),
            Read::Refused => {
                tracing::warn!(%pack, "the bucket refuses a new URL; reading through the server");
                ("error", None)
            }
            Read::Failed(cause) => {
                let error = narlake_format::error::chain(&cause);
                tracing::warn!(%pack, error, "read from the bucket; reading through the server");
                ("error", None)
            }
        };
        self.metrics.remote_requests.with_label_values(&["read from the bucket", result]).inc();
        if bytes.is_none() {
            self.direct.urls.remove(pack);
            self.direct.with(|state| state.unused = Some(Instant::now() + PAUSE));
        }
        bytes
    }

    async fn read_at(&self, url: &Url, range: &Range<u64>) -> Read {
        let request = self.direct.client.get(url.clone());
        let request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        let answer = match Answer::to(request, PATIENCE, &self.metrics).await {
            Ok(answer) => answer,
            Err(cause) => return Read::Failed(cause),
        };
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Read::Refused,
            status => {
                let text = "asked for a range of a pack".to_owned();
                return Read::Failed(Cause::Status { status: status.as_u16(), text });
            }
        }
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        match answer.body(length).await {
            Ok(bytes) if bytes.len() == length => Read::Done(bytes),
            Ok(_) => Read::Failed(Cause::Incomplete("the pack's bytes broke off")),
            Err(cause) => Read::Failed(cause),
        }
    }

    /// Asks for a pack's URL in the background, for the reads to come.
    fn ask_for_url(&self, pack: &PackRef, now: Instant) {
        let free = self.direct.with(|state| {
            let unasked = state.unasked.is_some_and(|until| now < until);
            !unasked && state.asking.len() < ASKING_MAX && state.asking.insert(*pack)
        });
        if free {
            let (remote, asking) = (self.clone(), Asking { direct: Arc::clone(&self.direct), pack: *pack });
            tokio::spawn(async move {
                remote.url_of(&asking.pack).await;
                drop(asking);
            });
        }
    }

    async fn url_of(&self, pack: &PackRef) -> Option<Arc<Signed>> {
        let asked = async {
            let answer = self.send(Method::GET, &format!("packs/{pack}/url"), None, None).await?;
            json::<PackUrl>(&answer.body(SMALL_MAX).await?)
        };
        match asked.await {
            Ok(answer) => self.direct.keep(pack, &answer),
            Err(cause) => {
                tracing::debug!(%pack, error = narlake_format::error::chain(&cause), "no URL of the pack");
                let pause = if cause.passes() { PAUSE } else { SILENT };
                self.direct.with(|state| state.unasked = Some(Instant::now() + pause));
                None
            }
        }
    }
}
