//! The bucket: keys in, bytes out. The only truth, and the only module that knows `object_store`.
//!
//! Objects are created once and never changed, so a create that finds its key taken compares the contents: equal bytes
//! mean that an earlier try of the same write had succeeded, other bytes mean a conflict. Nothing rests on
//! compare-and-swap; some S3 servers accept the condition and ignore it.
//!
//! The stack, outermost first: [`retry::Retry`] repeats an attempt that may succeed later, [`meter::Meter`] under it
//! counts and times every attempt, `LimitStore` bounds the requests in flight, and the backend has its own retries
//! turned down so that time limits add up in one place.

mod conditional;
pub mod meter;
pub mod retry;
mod sign;

use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use narlake_format::lake::config::Document;
use object_store::aws::AmazonS3Builder;
use object_store::limit::LimitStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};

pub use self::conditional::Probe;
use self::meter::Meter;
use self::retry::{Retry, RetrySettings};
use self::sign::Signer;
use crate::error::{Error, ErrorKind};
use crate::metrics::Metrics;

/// Requests to the bucket that may be in flight at once.
const REQUESTS_MAX: usize = 128;

/// Where an S3 bucket is and how to be let in.
#[derive(Debug, Clone, Default)]
pub struct S3Settings {
    /// The bucket's name.
    pub bucket: String,
    /// Keys start with this, or with nothing.
    pub prefix: Option<String>,
    /// The endpoint's URL; that of AWS where absent.
    pub endpoint: Option<String>,
    /// The region; `us-east-1` where absent.
    pub region: Option<String>,
    /// Access key; taken from the host's AWS environment (instance or container role) where absent.
    pub access_key_id: Option<String>,
    /// Secret key.
    pub secret_access_key: Option<String>,
    /// Session token of temporary keys.
    pub session_token: Option<String>,
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key.
    pub key: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, in milliseconds since the Unix epoch, by the bucket's clock.
    pub modified_ms: u64,
}

/// What a create found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The object is new.
    Created,
    /// The object was there, with the same bytes.
    Same,
}

/// The bytes of an object to write, in one piece or several.
pub struct Body(PutPayload);

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(bytes.into())
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl From<Vec<Bytes>> for Body {
    fn from(parts: Vec<Bytes>) -> Self {
        Self(parts.into_iter().collect())
    }
}

/// A handle on one bucket. Cheap to clone.
#[derive(Clone)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    name: Arc<str>,
    signer: Option<Signer>,
}

impl Bucket {
    /// A directory of this host, made if absent. Writes are synced before they are answered.
    ///
    /// # Errors
    /// Where the directory cannot be made.
    pub fn local(directory: &FsPath, metrics: &Metrics) -> Result<Self, Error> {
        std::fs::create_dir_all(directory).map_err(|e| Error::state("create bucket directory", directory, e))?;
        let store = LocalFileSystem::new_with_prefix(directory)
            .map_err(|e| bucket_error("open", &directory.display().to_string(), e))?
            .with_fsync(true);
        Ok(Self::stacked(store, format!("directory {}", directory.display()), metrics))
    }

    /// A bucket of an S3 server.
    ///
    /// # Errors
    /// Where the settings make no sense. No request is sent yet.
    pub fn s3(settings: &S3Settings, metrics: &Metrics) -> Result<Self, Error> {
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(&settings.bucket)
            .with_region(settings.region.as_deref().unwrap_or("us-east-1"))
            .with_client_options(
                // The default limit of 30 s covers a whole body; ours are per attempt (`retry`) and per read.
                ClientOptions::new().with_timeout_disabled().with_read_timeout(Duration::from_secs(20)),
            )
            .with_retry(RetryConfig {
                backoff: BackoffConfig::default(),
                max_retries: 2,
                retry_timeout: Duration::from_secs(20),
            });
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint).with_allow_http(endpoint.starts_with("http://"));
        }
        if let Some(key) = &settings.access_key_id {
            builder = builder.with_access_key_id(key);
        }
        if let Some(secret) = &settings.secret_access_key {
            builder = builder.with_secret_access_key(secret);
        }
        if let Some(token) = &settings.session_token {
            builder = builder.with_token(token);
        }
        let name = format!("s3 bucket {}", settings.bucket);
        let store = builder.build().map_err(|e| bucket_error("open", &name, e))?;
        let keys = Arc::new(store.clone());
        let mut bucket = match &settings.prefix {
            Some(prefix) => {
                Self::stacked(object_store::prefix::PrefixStore::new(store, prefix.as_str()), name, metrics)
            }
            None => Self::stacked(store, name, metrics),
        };
        bucket.signer = Some(Signer { keys, prefix: settings.prefix.as_deref().map(Path::from) });
        Ok(bucket)
    }

    /// A bucket in this process's memory.
    #[must_use]
    pub fn memory(metrics: &Metrics) -> Self {
        Self::stacked(InMemory::new(), "memory".to_owned(), metrics)
    }

    /// Any backend under the usual stack: how a simulation brings its faults in.
    pub fn stacked<T: ObjectStore>(store: T, name: String, metrics: &Metrics) -> Self {
        let limited = LimitStore::new(store, REQUESTS_MAX);
        let metered = Meter::new(limited, metrics.bucket.clone());
        let store = Arc::new(Retry::new(metered, RetrySettings::default(), metrics.bucket.clone()));
        Self { store, name: name.into(), signer: None }
    }

    /// What to call this bucket in a log.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Creates an object. Where the key is taken, the contents decide (see the module's header).
    ///
    /// Not cancel safe: a dropped put may still happen. Keys are unique or named by content, so that leaves an
    /// unreferenced object at most.
    ///
    /// # Errors
    /// `Conflict` where the key holds other bytes.
    pub async fn put_new(&self, key: &str, bytes: impl Into<Body>) -> Result<Put, Error> {
        let Body(payload) = bytes.into();
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&path(key)?, payload.clone(), options).await {
            Ok(_) => Ok(Put::Created),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                let there = self.get(key).await?;
                if payload_equals(&payload, &there) {
                    Ok(Put::Same)
                } else {
                    Err(Error::Bucket {
                        operation: "create",
                        key: key.to_owned(),
                        kind: ErrorKind::Conflict,
                        source: "the key holds other bytes".into(),
                    })
                }
            }
            Err(error) => Err(bucket_error("create", key, error)),
        }
    }

    /// A whole object.
    ///
    /// # Errors
    /// `NotFound` where there is none.
    pub async fn get(&self, key: &str) -> Result<Bytes, Error> {
        self.read(key, GetOptions::default()).await
    }

    /// Bytes `range` of an object, all of them.
    ///
    /// # Errors
    /// `NotFound` where there is no such object, `Corrupt` where it ends before the range does.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, Error> {
        let expected = range.end - range.start;
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let short = |received: String| Error::Bucket {
            operation: "read",
            key: key.to_owned(),
            kind: ErrorKind::Corrupt,
            source: format!("bytes {}..{} asked for, {received}", range.start, range.end).into(),
        };
        match self.read(key, options).await {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            Ok(bytes) => Err(short(format!("{} received", bytes.len()))),
            // Backends do not tell a range beyond the end from an outage.
            Err(error) if error.kind() == ErrorKind::Unavailable => match self.head(key).await {
                Ok(Some(object)) if object.size < range.end => Err(short(format!("the object has {}", object.size))),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn read(&self, key: &str, options: GetOptions) -> Result<Bytes, Error> {
        // The retry layer sees only the request; a body that breaks off is read anew from here.
        let mut repeats = Repeats::default();
        loop {
            let result = self.store.get_opts(&path(key)?, options.clone()).await;
            let found = result.map_err(|error| bucket_error("read", key, error))?;
            let error = match within("read", BODY_LIMIT, found.bytes()).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            tracing::debug!(key, error = %error, "body broke off");
            if !repeats.another().await {
                return Err(bucket_error("read", key, error));
            }
        }
    }

    /// What is known of an object, `None` where there is none.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, Error> {
        match self.store.head(&path(key)?).await {
            Ok(meta) => Ok(Some(info(&meta))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(bucket_error("look at", key, error)),
        }
    }

    /// All objects whose key starts with `prefix` (which ends in `/`) and sorts behind `after`, sorted by key.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<ObjectInfo>, Error> {
        let at = path(prefix)?;
        let mut repeats = Repeats::default();
        loop {
            let stream = match after {
                Some(after) => self.store.list_with_offset(Some(&at), &path(after)?),
                None => self.store.list(Some(&at)),
            };
            let error = match collect(stream).await {
                Ok(mut found) => {
                    found.sort_by(|a, b| a.key.cmp(&b.key));
                    return Ok(found);
                }
                // A prefix that was never written is an empty one; a local directory says it does not exist.
                Err(object_store::Error::NotFound { .. }) => return Ok(Vec::new()),
                Err(error) => error,
            };
            if !retry::is_transient(&error) || !repeats.another().await {
                return Err(bucket_error("list", prefix, error));
            }
        }
    }

    /// The next components under `prefix` (which ends in `/`) that hold further objects, whole keys without a final
    /// slash, sorted.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, Error> {
        match self.store.list_with_delimiter(Some(&path(prefix)?)).await {
            Ok(found) => {
                let mut folders: Vec<String> = found.common_prefixes.iter().map(ToString::to_string).collect();
                folders.sort_unstable();
                Ok(folders)
            }
            Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(bucket_error("list", prefix, error)),
        }
    }

    /// Deletes an object; one that is not there counts as deleted.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        let at = path(key)?;
        // The backend deletes in streams, which the retry layer lets pass.
        let mut repeats = Repeats::default();
        loop {
            let error = match within("delete", BODY_LIMIT, self.store.delete(&at)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => return Ok(()),
                Err(error) => error,
            };
            if !retry::is_transient(&error) || !repeats.another().await {
                return Err(bucket_error("delete", key, error));
            }
        }
    }
}

/// Reads a JSON document found under `key`.
pub(crate) fn decode_document<D: Document>(key: &str, bytes: &[u8]) -> Result<D, Error> {
    D::decode(bytes).map_err(|error| Error::Bucket {
        operation: "decode",
        key: key.to_owned(),
        kind: ErrorKind::Corrupt,
        source: Box::new(error),
    })
}

/// How often a body or listing that broke off is read again, or a deletion repeated.
const REPEATS_MAX: u32 = 3;

/// The pause before the first repetition; each further one is twice as long.
const REPEAT_PAUSE: Duration = Duration::from_millis(50);

/// Repetitions of what the retry layer lets pass.
#[derive(Default)]
struct Repeats(u32);

impl Repeats {
    /// Whether there is to be another; it is time for it when this returns.
    async fn another(&mut self) -> bool {
        if self.0 == REPEATS_MAX {
            return false;
        }
        tokio::time::sleep(REPEAT_PAUSE * (1 << self.0)).await;
        self.0 += 1;
        true
    }
}

/// Time limit of one body (a pack at most), of one page of a listing, and of one attempt to delete. The retry layer
/// bounds everything else.
const BODY_LIMIT: Duration = Duration::from_secs(30);

async fn collect(
    mut listing: BoxStream<'static, object_store::Result<ObjectMeta>>,
) -> object_store::Result<Vec<ObjectInfo>> {
    let mut found = Vec::new();
    // For each page alone: all of them together may take long, and are worth the wait.
    while let Some(meta) = within("list", BODY_LIMIT, listing.try_next()).await? {
        found.push(info(&meta));
    }
    Ok(found)
}

async fn within<T>(
    operation: &'static str,
    limit: Duration,
    work: impl Future<Output = object_store::Result<T>>,
) -> object_store::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(retry::timed_out(operation, limit)))
}

fn path(key: &str) -> Result<Path, Error> {
    Path::parse(key.trim_end_matches('/')).map_err(|e| bucket_error("name", key, e.into()))
}

fn info(meta: &ObjectMeta) -> ObjectInfo {
    ObjectInfo {
        key: meta.location.to_string(),
        size: meta.size,
        modified_ms: u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0),
    }
}

fn payload_equals(payload: &PutPayload, bytes: &[u8]) -> bool {
    let mut rest = bytes;
    payload.content_length() == bytes.len()
        && payload.iter().all(|part| match rest.split_at_checked(part.len()) {
            Some((head, tail)) => {
                rest = tail;
                head == part
            }
            None => false,
        })
}

fn bucket_error(operation: &'static str, key: &str, error: object_store::Error) -> Error {
    use object_store::Error as E;
    let kind = match &error {
        E::NotFound { .. } => ErrorKind::NotFound,
        E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => ErrorKind::Conflict,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => ErrorKind::Denied,
        E::InvalidPath { .. }
        | E::NotSupported { .. }
        | E::NotImplemented { .. }
        | E::UnknownConfigurationKey { .. } => ErrorKind::Invalid,
        other => retry::io_cause(other).map_or(ErrorKind::Unavailable, crate::error::io_kind),
    };
    Error::Bucket { operation, key: key.to_owned(), kind, source: Box::new(error) }
}
