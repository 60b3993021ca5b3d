//! The Nix socket, byte for byte where Nix would notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::realisation::RealisationKey;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use narlake_format::nix::worker::{Decoded, Features, Operation, Realised, Reply, Request};
use narlake_mountd::fs::LazyStore;
use narlake_mountd::nix_socket::{Access, NixSocket, listen};
use narlake_mountd::view::View;
use tokio_util::sync::CancellationToken;

use crate::kit::{Mood, World, dir, file, link, noise, outside, program};

/// A client of the socket, with what it has agreed on.
pub(crate) struct Client(UnixStream, Features);

/// The feature that Nix has from 2.35 on.
const BY_PATH: &str = "realisation-with-path-not-hash";

fn number(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = number(text.len() as u64).to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

impl Client {
    fn connect(path: &PathBuf) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self(stream, Features::default())
    }

    fn send(&mut self, parts: &[&[u8]]) {
        self.0.write_all(&parts.concat()).unwrap();
    }

    fn expect(&mut self, parts: &[&[u8]]) {
        let expected = parts.concat();
        let mut found = vec![0; expected.len()];
        self.0.read_exact(&mut found).unwrap();
        assert_eq!(found, expected);
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// As Nix 2.26 to 2.34 greet.
    pub(crate) fn greet(path: &PathBuf) -> Self {
        Self::greet_with(path, &[])
    }

    fn greet_with(path: &PathBuf, features: &[&str]) -> Self {
        let mut client = Self::connect(path);
        client.send(&[&number(0x6e69_7863), &number(0x126)]);
        client.expect(&[&number(0x6478_696f), &number(0x126)]);
        let named: Vec<u8> = features.iter().flat_map(|feature| string(feature)).collect();
        client.send(&[&number(features.len() as u64), &named]);
        client.expect(&[&number(1), &string(BY_PATH)]);
        client.1.realisation_by_path = features.contains(&BY_PATH);
        client.send(&[&number(0), &number(0)]);
        let name = format!("narlake-mountd-{}", env!("CARGO_PKG_VERSION"));
        client.expect(&[&string(&name), &number(2), &number(0x616c_7473)]);
        // SetOptions: twelve numbers and one override.
        client.send(&[&number(19), &[0; 96], &number(1), &string("cores"), &string("2")]);
        client.expect(&[&number(0x616c_7473)]);
        client
    }

    pub(crate) fn ask(&mut self, request: &Request) -> Reply {
        let dir = StoreDir::default();
        let mut bytes = Vec::new();
        request.encode(&dir, &mut bytes);
        self.0.write_all(&bytes).unwrap();
        let mut buffer = Vec::new();
        loop {
            match Reply::decode(&dir, self.1, request.operation(), &buffer).unwrap() {
                Decoded::Complete { value, length } => {
                    assert_eq!(length, buffer.len());
                    return value;
                }
                Decoded::Incomplete { needed } => {
                    let start = buffer.len();
                    buffer.resize(needed, 0);
                    self.0.read_exact(&mut buffer[start..]).unwrap();
                }
            }
        }
    }

    /// The error that takes the place of an answer, in the form since 1.26.
    fn error(&mut self) -> String {
        self.expect(&[&number(0x6378_7470), &string("Error"), &number(0), &string("Error")]);
        let text = self.string();
        self.expect(&[&number(0), &number(0)]);
        text
    }

    fn string(&mut self) -> String {
        let length = usize::try_from(self.number()).unwrap();
        let mut bytes = vec![0; length.next_multiple_of(8)];
        self.0.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    /// A path's NAR, of which the length is known.
    pub(crate) fn nar(&mut self, path: &StorePath, length: u64) -> Vec<u8> {
        assert_eq!(self.ask(&Request::NarFromPath(path.clone())), Reply::Nar);
        let mut nar = vec![0; usize::try_from(length).unwrap()];
        self.0.read_exact(&mut nar).unwrap();
        nar
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

struct Server {
    path: PathBuf,
    stop: CancellationToken,
    view: View,
    store: LazyStore,
}

fn serve(world: &World) -> Server {
    let (path, access) = (world.dir.path().join("nix.sock"), Access::default());
    let store = world.store();
    let (view, store) = (store.view, store.lazy);
    let (stop, listener) = (CancellationToken::new(), access.listen(&path).unwrap());
    let socket = NixSocket::new(view.clone(), store.clone(), access, &world.metrics);
    tokio::spawn(socket.serve(listener, stop.clone()));
    Server { path, stop, view, store }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_triple_that_nix_asks_for_each_path() {
    let world = World::new().await;
    let leaf = world.push("leaf", &file(b"leaf"), &[]).await;
    let path = world.push("hello-2.12", &file(b"hello"), &[leaf.clone(), World::path("hello-2.12")]).await;
    let server = serve(&world);
    let record = server.view.find(&path).await.unwrap().unwrap();
    let absolute = |path: &StorePath| format!("/nix/store/{path}");
    outside(move || {
        let mut client = Client::greet(&server.path);
        let last = number(0x616c_7473);
        client.send(&[&number(1), &string(&absolute(&path))]);
        client.expect(&[&last, &number(1)]);
        client.send(&[&number(26), &string(&absolute(&path))]);
        let info = record.info();
        let mut references = info.references.clone();
        references.sort();
        client.expect(&[
            &last,
            &number(1),
            &string(""),
            &string(&info.nar_hash.to_hex()),
            &number(2),
            &string(&absolute(&references[0])),
            &string(&absolute(&references[1])),
            &number(0),
            &number(info.nar_size),
            &number(0),
            &number(1),
            &string(&info.signatures[0].to_string()),
            &string(""),
        ]);
        client.send(&[
            &number(31),
            &number(2),
            &string(&absolute(&path)),
            &string(&absolute(&World::path("x"))),
            &number(0),
        ]);
        client.expect(&[&last, &number(1), &string(&absolute(&path))]);
        client.send(&[&number(31), &number(0), &number(0)]);
        client.expect(&[&last, &number(0)]);
        // Unknown paths are no errors.
        client.send(&[&number(1), &string(&absolute(&World::path("x")))]);
        client.expect(&[&last, &number(0)]);
        client.send(&[&number(26), &string(&absolute(&World::path("x")))]);
        client.expect(&[&last, &number(0)]);
        // The same hash under another name is another path.
        let other = StorePath { hash: path.hash, name: "other".parse().unwrap() };
        client.send(&[&number(1), &string(&absolute(&other))]);
        client.expect(&[&last, &number(0)]);
    })
    .await;
    server.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_what_is_asked() {
    let world = World::new().await;
    let path = world.push("hello-2.12", &file(b"hello"), &[]).await;
    let server = serve(&world);
    outside(move || {
        let mut client = Client::greet(&server.path);
        let absent = World::path("absent");
        assert_eq!(client.ask(&Request::QueryPathFromHashPart(path.hash)), Reply::Path(Some(path.clone())));
        assert_eq!(client.ask(&Request::QueryPathFromHashPart(absent.hash)), Reply::Path(None));
        assert_eq!(client.ask(&Request::QueryReferrers(path.clone())), Reply::Paths(Vec::new()));
        assert_eq!(client.ask(&Request::QueryValidDerivers(path.clone())), Reply::Paths(Vec::new()));
        assert_eq!(client.ask(&Request::AddTempRoot(path.clone())), Reply::Accepted);
        assert_eq!(client.ask(&Request::EnsurePath(path.clone())), Reply::Accepted);
        assert!(matches!(client.ask(&Request::EnsurePath(absent.clone())), Reply::Error(_)));
        assert_eq!(client.ask(&Request::QueryAllValidPaths), Reply::Paths(vec![path.clone()]));
        match client.ask(&Request::QueryMissing(vec![path.clone(), absent.clone()])) {
            Reply::Missing(missing) => assert_eq!(missing.unknown, [absent]),
            other => panic!("{other:?}"),
        }
        match client.ask(&Request::NarFromPath(World::path("absent"))) {
            Reply::Error(message) => assert!(message.ends_with("is not valid"), "{message}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(client.ask(&Request::QueryRealisation(by_hash("out"))), Reply::Realisations(Vec::new()));
        assert_eq!(Operation::ALL.len(), 13, "a new operation needs an answer");
    })
    .await;
    server.stop.cancel();
}

/// An outage is an error, never "no": Nix would build what exists, and remember it.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_an_error() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(1);
    let known = world.push("known", &file(b"x"), &[]).await;
    let server = serve(&world);
    for mood in [Mood::Down, Mood::Stalls] {
        let (path, known) = (server.path.clone(), known.clone());
        server.view.find(&known).await.unwrap();
        world.source.set(mood);
        outside(move || {
            let mut client = Client::greet(&path);
            let absent = World::path("absent");
            for request in [
                Request::IsValidPath(absent.clone()),
                Request::QueryPathInfo(absent.clone()),
                Request::QueryPathFromHashPart(absent.hash),
                Request::QueryValidPaths { paths: vec![known.clone(), absent.clone()], substitute: false },
                Request::QueryMissing(vec![World::path("b"), absent.clone()]),
                Request::NarFromPath(absent),
                Request::QueryRealisation(by_hash("out")),
            ] {
                match client.ask(&request) {
                    Reply::Error(message) => assert!(!message.contains("is not valid"), "{message}"),
                    other => panic!("{request:?}: {other:?}"),
                }
            }
            // The connection goes on, and what is known stays known.
            assert_eq!(client.ask(&Request::IsValidPath(known)), Reply::Valid(true));
        })
        .await;
        world.source.set(Mood::Answers);
    }
    server.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_clients_are_told_and_dropped() {
    let world = World::new().await;
    let server = serve(&world);
    let path = server.path.clone();
    outside(move || {
        // Somebody else's protocol.
        let mut client = Client::connect(&path);
        client.send(&[b"GET / HTTP/1.1\r\n\r\n"]);
        assert!(client.is_closed());
        // An operation that writes: why, then the end.
        let mut client = Client::greet(&path);
        client.send(&[&number(7), &string("x")]);
        assert_eq!(client.number(), 0x6378_7470);
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest);
        assert!(String::from_utf8_lossy(&rest).contains("operation 7"));
        // A path that is none: an error, and the connection goes on.
        let mut client = Client::greet(&path);
        client.send(&[&number(1), &string("/etc/passwd")]);
        assert_eq!(client.number(), 0x6378_7470);
        // A length that nobody has.
        let mut client = Client::greet(&path);
        client.send(&[&number(1), &number(u64::MAX)]);
        assert_eq!(client.number(), 0x6378_7470);
        // More features than anybody has.
        let mut client = Client::connect(&path);
        client.send(&[&number(0x6e69_7863), &number(0x126), &number(1 << 40)]);
        client.expect(&[&number(0x6478_696f), &number(0x126)]);
        assert!(client.is_closed());
        // One that leaves in the middle.
        let mut client = Client::greet(&path);
        client.send(&[&number(1), &number(40)]);
        drop(client);
        Client::greet(&path);
    })
    .await;
    server.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_has_one_owner() {
    let world = World::new().await;
    let server = serve(&world);
    let taken = listen(&server.path);
    assert_eq!(taken.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&server.path).unwrap().permissions().mode() & 0o777, 0o600);
    server.stop.cancel();
    // What is no socket stays what it is.
    let precious = world.dir.path().join("precious");
    std::fs::write(&precious, "content").unwrap();
    assert_eq!(listen(&precious).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "content");
    // What a process that is gone left is taken over.
    let stale = world.dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    listen(&stale).unwrap();
}

fn by_hash(output: &str) -> RealisationKey {
    format!("realisations/sha256:{}!{output}.doi", "0".repeat(64)).parse().unwrap()
}

fn by_path(output: &str) -> RealisationKey {
    RealisationKey::Path { drv: World::path("x.drv"), output: output.parse().unwrap() }
}

/// Nix believes what it hears here without a signature: a realisation is said if a trusted key signed it and its path is
/// shown, in the form that was agreed on.
#[tokio::test(flavor = "multi_thread")]
async fn realisations_are_said_where_they_are_trusted_and_shown() {
    let world = World::new().await;
    let out = world.push("out", &file(b"out"), &[]).await;
    let (trusted, other) = (std::slice::from_ref(&world.key), std::slice::from_ref(&world.other_key));
    for key in [by_hash, by_path] {
        world.realise(&key("out"), &out, trusted).await;
        world.realise(&key("unsigned"), &out, &[]).await;
        world.realise(&key("other"), &out, other).await;
        world.realise(&key("gone"), &World::path("gone"), trusted).await;
    }
    let server = serve(&world);
    let path = server.path.clone();
    let expected = out.clone();
    outside(move || {
        let mut older = Client::greet_with(&path, &["add-to-store-scanning"]);
        let mut newer = Client::greet_with(&path, &["disable-set-options", BY_PATH, BY_PATH]);
        for _ in 0..10 {
            match older.ask(&Request::QueryRealisation(by_hash("out"))) {
                Reply::Realisations(found) => {
                    assert_eq!(found.len(), 1);
                    let start = format!(r#"{{"dependentRealisations":{{}},"id":"sha256:{}!out","#, "0".repeat(64));
                    assert!(found[0].starts_with(&start), "{found:?}");
                    assert!(
                        found[0].contains(&format!(r#""outPath":"{expected}","signatures":["test-1:"#)),
                        "{found:?}"
                    );
                }
                other => panic!("{other:?}"),
            }
            match newer.ask(&Request::QueryRealisation(by_path("out"))) {
                Reply::Realised(Some(Realised { out_path, signatures })) => {
                    assert_eq!((out_path, signatures.len()), (expected.clone(), 1));
                }
                other => panic!("{other:?}"),
            }
        }
        for output in ["unsigned", "other", "gone", "none"] {
            let none = Reply::Realisations(Vec::new());
            assert_eq!(older.ask(&Request::QueryRealisation(by_hash(output))), none, "{output}");
            assert_eq!(newer.ask(&Request::QueryRealisation(by_path(output))), Reply::Realised(None), "{output}");
        }
    })
    .await;
    assert_eq!(world.metrics.realisations_untrusted.get(), 4);
    // Once for each, however often it was asked about.
    assert_eq!(world.source.realisations.load(Ordering::SeqCst), 10);
    // What is absent is remembered for a moment, what is there for good.
    world.source.set(Mood::Down);
    let path = server.path.clone();
    outside(move || {
        let mut client = Client::greet(&path);
        assert!(matches!(client.ask(&Request::QueryRealisation(by_hash("out"))), Reply::Realisations(found) if found.len() == 1));
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let path = server.path.clone();
    outside(move || {
        let found = Client::greet(&path).ask(&Request::QueryRealisation(by_hash("none")));
        assert!(matches!(found, Reply::Error(_)), "{found:?}");
    })
    .await;
    world.source.set(Mood::Answers);
    world.realise(&by_hash("none"), &out, trusted).await;
    let path = server.path.clone();
    outside(move || {
        let found = Client::greet(&path).ask(&Request::QueryRealisation(by_hash("none")));
        assert!(matches!(found, Reply::Realisations(found) if found.len() == 1));
    })
    .await;
    server.stop.cancel();
}

/// The oldest that is spoken with says its version after it has heard the server's; one that is too old is told so at
/// once, in its own form, and one that is newer is spoken to as 1.38.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_other_versions() {
    let world = World::new().await;
    let path = world.push("hello-2.12", &file(b"hello"), &[]).await;
    let server = serve(&world);
    let socket = server.path.clone();
    outside(move || {
        let absolute = string(&format!("/nix/store/{path}"));
        let hello = [number(0x6478_696f), number(0x126)].concat();
        for version in [0x121, 0x123, 0x125, 0x126, 0x13c] {
            let mut client = Client::connect(&socket);
            client.send(&[&number(0x6e69_7863)]);
            client.expect(&[&hello]);
            client.send(&[&number(version)]);
            if version >= 0x126 {
                client.send(&[&number(0)]);
                client.expect(&[&number(1), &string(BY_PATH)]);
            }
            client.send(&[&number(0), &number(0)]);
            assert!(client.string().starts_with("narlake-mountd-"));
            if version >= 0x123 {
                client.expect(&[&number(2)]);
            }
            client.expect(&[&number(0x616c_7473)]);
            client.send(&[&number(1), &absolute]);
            client.expect(&[&number(0x616c_7473), &number(1)]);
        }
        let mut client = Client::connect(&socket);
        client.send(&[&number(0x6e69_7863), &number(0x10a), &number(0), &number(0)]);
        client.expect(&[&hello, &number(0x6378_7470)]);
        assert!(client.string().contains("version 1.10"));
        client.expect(&[&number(1)]);
        assert!(client.is_closed());
        let mut client = Client::connect(&socket);
        client.send(&[&number(0x6e69_7863), &number(0x11a)]);
        client.expect(&[&hello]);
        assert!(client.error().contains("version 1.26"));
        assert!(client.is_closed());
    })
    .await;
    server.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn nars_come_out_as_they_went_in() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(2);
    let own = World::path("tree");
    let text = format!("#!/nix/store/{own}/bin/run\n");
    let tree = dir([
        ("bin", dir([("run", program(&text)), ("sh", link(format!("/nix/store/{own}/bin/run")))])),
        ("empty", dir([])),
        ("large", file(noise(1, 3_000_000))),
        ("nothing", file(b"")),
    ]);
    let objects = [
        world.push("tree", &tree, std::slice::from_ref(&own)).await,
        world.push("single", &program(noise(2, 700_001)), &[]).await,
        world.push("link", &link("elsewhere"), &[]).await,
    ];
    let server = serve(&world);
    for path in &objects {
        let record = server.view.find(path).await.unwrap().unwrap();
        let (socket, path) = (server.path.clone(), path.clone());
        outside(move || {
            let mut client = Client::greet(&socket);
            let info = record.info();
            for _ in 0..2 {
                assert_eq!(Sha256Hash::of(&client.nar(&path, info.nar_size)), info.nar_hash, "{path}");
            }
            // The connection goes on behind it.
            assert_eq!(client.ask(&Request::IsValidPath(path)), Reply::Valid(true));
        })
        .await;
    }
    server.stop.cancel();
}

/// What cannot be had is an error before the first byte; later the connection ends, and never a NAR that is too short.
#[tokio::test(flavor = "multi_thread")]
async fn nars_that_cannot_be_had() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(2);
    let files: Vec<(String, _)> =
        (0..40).map(|number| (format!("{number:02}"), file(noise(number, 500_000)))).collect();
    let tree = crate::kit::Node::Dir(files.into_iter().map(|(name, node)| (name.into_bytes(), node)).collect());
    let large = world.push("large", &tree, &[]).await;
    let small = world.push("small", &dir([("f", file(b"small"))]), &[]).await;
    let server = serve(&world);
    server.view.find(&small).await.unwrap();
    let record = server.view.find(&large).await.unwrap().unwrap();
    let (socket, path) = (server.path.clone(), large.clone());
    let source = std::sync::Arc::clone(&world.source);
    outside(move || {
        let mut client = Client::greet(&socket);
        assert_eq!(client.ask(&Request::NarFromPath(path)), Reply::Nar);
        let mut begin = vec![0; 100_000];
        client.0.read_exact(&mut begin).unwrap();
        source.set(Mood::Down);
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest);
        assert!(((begin.len() + rest.len()) as u64) < record.info().nar_size, "the whole of it came");
        // Its tree is not at hand.
        let mut client = Client::greet(&socket);
        match client.ask(&Request::NarFromPath(small.clone())) {
            Reply::Error(message) => assert!(!message.contains("is not valid"), "{message}"),
            other => panic!("{other:?}"),
        }
        source.set(Mood::Answers);
        assert_eq!(client.ask(&Request::IsValidPath(small)), Reply::Valid(true));
    })
    .await;
    server.stop.cancel();
}

/// Without optimisation, signatures take milliseconds each.
const CHAIN: usize = if cfg!(debug_assertions) { 300 } else { 4000 };

/// Nix registers a closure path by path, depth first, and asks three times about each: two questions reach the server,
/// however far away it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_closure_is_asked_for_at_once_not_path_by_path() {
    let mut world = World::new().await;
    // Of which half is how long a member waits for its closure.
    world.deadline = Duration::from_secs(120);
    let mut chain: Vec<StorePath> = Vec::new();
    for number in 0..CHAIN {
        // Each refers to the one before it, and to one far below.
        let below: Vec<StorePath> = [number.checked_sub(1), number.checked_sub(100)]
            .into_iter()
            .flatten()
            .map(|below| chain[below].clone())
            .collect();
        chain.push(world.push(&format!("link-{number}"), &file(b"x"), &below).await);
    }
    let server = serve(&world);
    world.source.count_anew();
    world.source.move_away(Duration::from_millis(50));
    let (socket, top) = (server.path.clone(), chain[CHAIN - 1].clone());
    let took = outside(move || {
        let mut client = Client::greet(&socket);
        let began = std::time::Instant::now();
        let (mut next, mut seen) = (vec![top], std::collections::HashSet::new());
        while let Some(path) = next.pop() {
            if !seen.insert(path.clone()) {
                continue;
            }
            assert_eq!(client.ask(&Request::IsValidPath(path.clone())), Reply::Valid(true));
            let Reply::PathInfo(Some(info)) = client.ask(&Request::QueryPathInfo(path.clone())) else { panic!() };
            let valid = Request::QueryValidPaths { paths: vec![path.clone()], substitute: false };
            assert_eq!(client.ask(&valid), Reply::Paths(vec![path]));
            next.extend(info.references);
        }
        assert_eq!(seen.len(), CHAIN);
        began.elapsed()
    })
    .await;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::SeqCst);
    eprintln!("{CHAIN} paths in {} ms at 50 ms from the source", took.as_millis());
    assert_eq!((count(&world.source.lookups), count(&world.source.closures)), (1, 1));
    server.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_paths_are_asked_for_at_once() {
    let world = World::new().await;
    let mut paths = Vec::new();
    for number in 0..50 {
        paths.push(world.push(&format!("known-{number}"), &file(b"x"), &[]).await);
    }
    let server = serve(&world);
    world.source.count_anew();
    let absent: Vec<StorePath> = (0..50).map(|number| World::path(&format!("absent-{number}"))).collect();
    let all: Vec<StorePath> = absent.iter().chain(&paths).cloned().collect();
    let socket = server.path.clone();
    outside(move || {
        let mut client = Client::greet(&socket);
        let valid = Request::QueryValidPaths { paths: all.clone(), substitute: false };
        assert_eq!(client.ask(&valid), Reply::Paths(paths.clone()));
        match client.ask(&Request::QueryMissing(all)) {
            Reply::Missing(missing) => assert_eq!(missing.unknown, absent),
            other => panic!("{other:?}"),
        }
        let mut sorted = paths.clone();
        sorted.sort();
        assert_eq!(client.ask(&Request::QueryAllValidPaths), Reply::Paths(sorted));
    })
    .await;
    assert_eq!(world.source.lookups.load(Ordering::SeqCst), 0);
    assert_eq!(world.source.closures.load(Ordering::SeqCst), 2);
    server.stop.cancel();
}

/// Set for a client that runs as somebody else: the socket.
const SOCKET: &str = "NARLAKE_TEST_NIX_SOCKET";

/// Not a test by itself: a client that may not connect.
#[test]
fn somebody_else() {
    let Some(socket) = std::env::var_os(SOCKET).map(PathBuf::from) else { return };
    let mut client = Client::connect(&socket);
    // As any version that reads its server's name and trust; more of what is said nobody hears.
    client.send(&[&number(0x6e69_7863), &number(0x126)]);
    client.expect(&[&number(0x6478_696f), &number(0x125)]);
    client.send(&[&number(0), &number(0)]);
    assert!(client.string().starts_with("narlake-mountd-"));
    client.expect(&[&number(2)]);
    assert!(client.error().contains("user 65534 may not use this store"));
    assert!(client.is_closed());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_connects() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: not root, cannot be somebody else");
        return;
    }
    let world = World::new().await;
    let server = serve(&world);
    // Where anybody gets to it and to this program.
    let place = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (socket, exe) = (place.path().join("sock"), place.path().join("exe"));
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let access = Access { mode: 0o666, ..Access::default() };
    let (listener, stop) = (access.listen(&socket).unwrap(), CancellationToken::new());
    let nix = NixSocket::new(server.view.clone(), server.store.clone(), access, &world.metrics);
    tokio::spawn(nix.serve(listener, stop.clone()));
    let client = move || {
        let mut command = std::process::Command::new(&exe);
        command.args(["--exact", "--nocapture", "nix::somebody_else"]).env(SOCKET, &socket).current_dir("/");
        command.uid(65534).gid(65534).output().unwrap()
    };
    let done = outside(client).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(world.metrics.nix_refused.get(), 1);
    stop.cancel();
    server.stop.cancel();
}
