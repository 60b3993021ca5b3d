//! A running server, and paths to push to it.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use narlake_format::nar::{Event, Writer};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use narlake_server::app::{App, Parts};
use narlake_server::coding;
use narlake_server::config::Config;
use narlake_server::metrics::Metrics;
use narlake_storage::{Bucket, OsEntropy, SystemClock};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use tempfile::TempDir;

/// A server that is stopped when the test ends.
pub(crate) struct Server {
    pub(crate) app: App,
    pub(crate) client: Client,
    _dir: Arc<TempDir>,
}

impl Server {
    /// With a bucket in memory.
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// With a bucket in memory and other settings.
    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let metrics = Metrics::new();
        let bucket = Bucket::memory(metrics.storage());
        Self::over(Arc::new(tempfile::tempdir().unwrap()), bucket, metrics, change).await
    }

    /// With a bucket in this directory, new or not.
    pub(crate) async fn in_dir(dir: &Arc<TempDir>) -> Self {
        let metrics = Metrics::new();
        let bucket = Bucket::local(&dir.path().join("bucket"), metrics.storage()).unwrap();
        Self::over(Arc::clone(dir), bucket, metrics, |_| {}).await
    }

    async fn over(dir: Arc<TempDir>, bucket: Bucket, metrics: Metrics, change: impl FnOnce(&mut Config)) -> Self {
        let mut config =
            Config { listen: ([127, 0, 0, 1], 0).into(), data_dir: dir.path().into(), ..Config::default() };
        config.limits.drain_s = 1;
        change(&mut config);
        let parts = Parts { bucket, clock: Arc::new(SystemClock), entropy: Arc::new(OsEntropy), metrics };
        let app = App::start(&config, parts).await.unwrap();
        Self { app, client: Client::new(), _dir: dir }
    }

    /// The URL of a resource of the default cache.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.app.address())
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.url(path))
    }

    /// Status and text of a request.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> (StatusCode, String) {
        let response = self.request(method, path).body(body).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    pub(crate) async fn put(&self, path: &str, body: impl Into<reqwest::Body>) -> (StatusCode, String) {
        self.call(Method::PUT, path, body).await
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, String) {
        self.call(Method::GET, path, "").await
    }

    /// Status and body.
    pub(crate) async fn fetch(&self, path: &str) -> (StatusCode, Bytes) {
        let response = self.request(Method::GET, path).send().await.unwrap();
        (response.status(), response.bytes().await.unwrap())
    }

    /// Sends a path as Nix does: its NAR, then its narinfo.
    pub(crate) async fn push(&self, object: &Object) -> Object {
        let (status, text) = self.put(&object.url, object.file.clone()).await;
        assert_eq!(status, StatusCode::CREATED, "{text}");
        let (status, text) = self.put(&object.narinfo_name(), object.narinfo()).await;
        assert!(status.is_success(), "{status} {text}");
        object.clone()
    }

    /// The narinfo that is served.
    pub(crate) async fn narinfo(&self, object: &Object) -> NarInfo {
        let (status, text) = self.get(&object.narinfo_name()).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        NarInfo::parse(&StoreDir::default(), text.as_bytes()).unwrap()
    }

    /// The NAR, as the served narinfo leads to it.
    pub(crate) async fn nar(&self, object: &Object) -> Bytes {
        let (status, nar) = self.fetch(&self.narinfo(object).await.url).await;
        assert_eq!(status, StatusCode::OK);
        nar
    }

    /// One sample of the metrics, 0 if it is not there.
    pub(crate) async fn metric(&self, sample: &str) -> f64 {
        let (_, text) = self.get("metrics").await;
        text.lines().find_map(|line| line.strip_prefix(sample)?.trim().parse().ok()).unwrap_or_default()
    }
}

/// A store object on its way to a cache.
#[derive(Clone)]
pub(crate) struct Object {
    pub(crate) nar: Vec<u8>,
    /// The NAR, compressed.
    pub(crate) file: Vec<u8>,
    /// Where the file goes.
    pub(crate) url: String,
    pub(crate) info: NarInfo,
}

impl Object {
    pub(crate) async fn new(name: &str, nar: Vec<u8>, compression: Compression, references: &[StorePath]) -> Self {
        let file = compress(&nar, compression).await;
        let file_hash = Sha256Hash::of(&file);
        let url = format!("nar/{}.nar{}", file_hash.to_base32(), compression.suffix());
        let info = NarInfo {
            store_path: store_path(name),
            url: url.clone(),
            compression,
            file_hash: Some(file_hash),
            file_size: Some(file.len() as u64),
            nar_hash: Sha256Hash::of(&nar),
            nar_size: nar.len() as u64,
            references: references.to_vec(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            extra: Vec::new(),
        };
        Self { nar, file, url, info }
    }

    /// A file, not compressed, without references.
    pub(crate) async fn file(name: &str, contents: &[u8]) -> Self {
        Self::new(name, nar_of_file(contents), Compression::None, &[]).await
    }

    pub(crate) fn path(&self) -> StorePath {
        self.info.store_path.clone()
    }

    pub(crate) fn hash(&self) -> String {
        self.info.store_path.hash.to_string()
    }

    pub(crate) fn narinfo_name(&self) -> String {
        format!("{}.narinfo", self.hash())
    }

    pub(crate) fn narinfo(&self) -> String {
        self.info.to_text(&StoreDir::default())
    }
}

/// A path of this name, its hash part made from it.
pub(crate) fn store_path(name: &str) -> StorePath {
    let digest = Sha256Hash::of(name.as_bytes());
    let hash = StorePathHash::from_bytes(digest.as_bytes()[..20].try_into().unwrap());
    StorePath { hash, name: name.parse().unwrap() }
}

pub(crate) fn nar(events: &[Event<'_>]) -> Vec<u8> {
    let mut nar = Vec::new();
    let mut writer = Writer::new();
    for event in events {
        writer.event(*event, &mut nar).unwrap();
    }
    writer.finish().unwrap();
    nar
}

pub(crate) fn nar_of_file(contents: &[u8]) -> Vec<u8> {
    let size = contents.len() as u64;
    nar(&[Event::File { executable: false, size }, Event::Data(contents), Event::EndFile])
}

/// A directory with a file, an executable and a symlink, which mention other paths.
pub(crate) fn nar_of_tree(mentions: &[StorePath]) -> Vec<u8> {
    let text: String = mentions.iter().map(|path| format!("uses /nix/store/{path}/bin\n")).collect();
    let target = mentions.first().map_or_else(|| "tool".to_owned(), |path| format!("/nix/store/{path}/bin"));
    let script = sample(300_000);
    nar(&[
        Event::Directory,
        Event::Entry { name: b"link" },
        Event::Symlink { target: target.as_bytes() },
        Event::Entry { name: b"text" },
        Event::File { executable: false, size: text.len() as u64 },
        Event::Data(text.as_bytes()),
        Event::EndFile,
        Event::Entry { name: b"tool" },
        Event::File { executable: true, size: script.len() as u64 },
        Event::Data(&script),
        Event::EndFile,
        Event::EndDirectory,
    ])
}

/// Bytes that compress to about half.
pub(crate) fn sample(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    (0..length)
        .map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if at % 2 == 0 { state.to_le_bytes()[3] } else { b'x' }
        })
        .collect()
}

pub(crate) async fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    recode(bytes, |stream| coding::encode(stream, compression)).await.unwrap()
}

pub(crate) async fn decompress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    let bounds = coding::Bounds { bytes_max: u64::MAX, expansion_max: u64::MAX, decoder_bytes_max: u64::MAX };
    recode(bytes, |stream| coding::decode(stream, compression, bounds)).await.unwrap()
}

async fn recode(bytes: &[u8], code: impl FnOnce(coding::ByteStream) -> coding::ByteStream) -> io::Result<Vec<u8>> {
    let pieces: Vec<_> = bytes.chunks(65_536).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let pieces: Vec<Bytes> = code(stream::iter(pieces).boxed()).try_collect().await?;
    Ok(pieces.concat())
}
