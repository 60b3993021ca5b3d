//! A binary cache in memory, over HTTP/1.1: the requests that the command sends, and nothing else.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use narlake_format::nar::{NarError, Reader};
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::listing::ListingWriter;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath};

/// What the cache holds, and what it was asked.
pub(crate) struct State {
    pub(crate) dir: StoreDir,
    /// Bodies by URL path.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Method and path of every request, in order.
    pub(crate) requests: Vec<String>,
    /// The token that a push needs.
    pub(crate) token: Option<String>,
    /// How many of the next requests that start like this are answered with this status, 0 for none at all.
    pub(crate) failures: Vec<(String, usize, u16)>,
    /// Listings are not to be had.
    pub(crate) no_listings: bool,
    /// Ranges are ignored.
    pub(crate) no_ranges: bool,
}

pub(crate) struct Cache {
    pub(crate) url: String,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Cache {
    pub(crate) fn start(dir: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            dir: dir.parse().unwrap(),
            files: BTreeMap::new(),
            requests: Vec::new(),
            token: None,
            failures: Vec::new(),
            no_listings: false,
            no_ranges: false,
        }));
        let shared = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || while serve(&stream, &state).is_some() {});
            }
        });
        Self { url, state }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The requests that were made with this method, without those before.
    pub(crate) fn take_requests(&self, method: &str) -> Vec<String> {
        let requests = std::mem::take(&mut self.state().requests);
        requests.into_iter().filter_map(|request| Some(request.strip_prefix(method)?.trim().to_owned())).collect()
    }

    /// Puts a path there whose NAR this is.
    pub(crate) fn insert(&self, path: &StorePath, nar: &[u8]) {
        let hash = Sha256Hash::of(nar);
        let url = format!("nar/{}-{}.nar", path.hash, hash.to_base32());
        let mut state = self.state();
        let text = format!(
            "StorePath: {}\nURL: {url}\nCompression: none\nNarHash: {hash}\nNarSize: {}\nReferences: \n",
            path.display_in(&state.dir),
            nar.len()
        );
        state.files.insert(format!("/{}.narinfo", path.hash), text.into_bytes());
        state.files.insert(format!("/{url}"), nar.to_vec());
    }
}

struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// Serves one request; none when the connection is to be closed.
fn serve(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    assert!(!headers.contains_key("transfer-encoding"), "bodies have a length that is known");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let request = Request { method, path, headers, body };
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{} {}", request.method, request.path));
    let (status, body) = state.answer(&request);
    drop(state);
    if status == 0 {
        return None;
    }
    let length = body.len();
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n\r\n").ok()?;
    if request.method != "HEAD" {
        stream.write_all(&body).ok()?;
    }
    Some(())
}

impl State {
    fn answer(&mut self, request: &Request) -> (u16, Vec<u8>) {
        let called = format!("{} {}", request.method, request.path);
        if let Some((_, left, status)) =
            self.failures.iter_mut().find(|(start, left, _)| *left > 0 && called.starts_with(start))
        {
            *left -= 1;
            return (*status, b"made to fail\n".to_vec());
        }
        let bearer = request.headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
        if request.method == "PUT" && self.token.is_some() && bearer != self.token.as_deref() {
            return (401, b"pushing needs a token\n".to_vec());
        }
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/api/v1/info") => {
                let text = format!(
                    r#"{{"api_version":1,"lake":"{0}","store_dir":"{1}","cache":"{0}","public_keys":[]}}"#,
                    "0123456789abcdefghjkmnpqrs", self.dir
                );
                (200, text.into_bytes())
            }
            ("POST", "/api/v1/missing") => (200, self.missing(&request.body)),
            ("PUT", path) if path.ends_with(".narinfo") => self.publish(path, &request.body),
            ("PUT", path) => {
                assert_eq!(path, format!("/nar/{}.nar", Sha256Hash::of(&request.body).to_base32()));
                self.files.insert(path.to_owned(), request.body.clone());
                (201, Vec::new())
            }
            (_, path) if path.ends_with(".ls") => self.listing(path),
            (_, path) => match self.files.get(path) {
                None => (404, b"it is not here\n".to_vec()),
                Some(file) => match request.headers.get("range").filter(|_| !self.no_ranges) {
                    None => (200, file.clone()),
                    Some(range) => {
                        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
                        (206, file[first..=last].to_vec())
                    }
                },
            },
        }
    }

    fn missing(&self, body: &[u8]) -> Vec<u8> {
        let mut question: serde_json::Value = serde_json::from_slice(body).unwrap();
        let is_missing = |path: &serde_json::Value| {
            let path: StorePath = path.as_str().unwrap().parse().unwrap();
            !self.files.contains_key(&format!("/{}.narinfo", path.hash))
        };
        question["paths"].as_array_mut().unwrap().retain(is_missing);
        serde_json::json!({ "missing": question["paths"] }).to_string().into_bytes()
    }

    /// As the real one: NAR and references must be there, the first content stays.
    fn publish(&mut self, path: &str, text: &[u8]) -> (u16, Vec<u8>) {
        if let Some(known) = self.files.get(path) {
            return (200, known.clone());
        }
        let info = NarInfo::parse(&self.dir, text).unwrap();
        assert_eq!(path, format!("/{}.narinfo", info.store_path.hash));
        assert!(info.content_address_holds(&self.dir), "content address of {}", info.store_path);
        let Some(nar) = self.files.get(&format!("/{}", info.url)) else { return (400, b"no such NAR".to_vec()) };
        assert_eq!((Sha256Hash::of(nar), nar.len() as u64), (info.nar_hash, info.nar_size));
        for reference in info.references.iter().filter(|reference| **reference != info.store_path) {
            if !self.files.contains_key(&format!("/{}.narinfo", reference.hash)) {
                return (400, format!("reference {reference} is not in this cache").into_bytes());
            }
        }
        self.files.insert(path.to_owned(), text.to_vec());
        (201, text.to_vec())
    }

    fn listing(&self, path: &str) -> (u16, Vec<u8>) {
        let narinfo = self.files.get(&path.replace(".ls", ".narinfo"));
        let Some(info) = narinfo.filter(|_| !self.no_listings) else { return (404, b"no listing".to_vec()) };
        let info = NarInfo::parse(&self.dir, info).unwrap();
        let nar = self.files.get(&format!("/{}", info.url)).unwrap();
        let (mut reader, mut writer, mut text) = (Reader::new(), ListingWriter::new(), Vec::new());
        let mut failed = false;
        let read: Result<(), NarError> = reader.feed(nar, &mut |event| {
            failed |= writer.event(event, &mut text).is_err();
            Ok(())
        });
        if failed || read.is_err() { (404, b"no listing".to_vec()) } else { (200, text) }
    }
}
