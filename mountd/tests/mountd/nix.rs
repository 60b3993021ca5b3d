//! The Nix socket, byte for byte where Nix would notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use narlake_format::nix::store_path::{StoreDir, StorePath};
use narlake_format::nix::worker::{Decoded, Operation, Reply, Request};
use narlake_mountd::nix_socket::{NixSocket, listen};
use narlake_mountd::view::View;
use tokio_util::sync::CancellationToken;

use crate::kit::{Mood, World, file, outside};

/// A client of the socket, as Nix 2.26 to 2.34 are.
struct Client(UnixStream);

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
        Self(stream)
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

    fn greet(path: &PathBuf) -> Self {
        let mut client = Self::connect(path);
        client.send(&[&number(0x6e69_7863), &number(0x126)]);
        client.expect(&[&number(0x6478_696f), &number(0x126)]);
        client.send(&[&number(0)]);
        client.expect(&[&number(0)]);
        client.send(&[&number(0), &number(0)]);
        let name = format!("narlake-mountd-{}", env!("CARGO_PKG_VERSION"));
        client.expect(&[&string(&name), &number(2), &number(0x616c_7473)]);
        // SetOptions: twelve numbers and one override.
        client.send(&[&number(19), &[0; 96], &number(1), &string("cores"), &string("2")]);
        client.expect(&[&number(0x616c_7473)]);
        client
    }

    fn ask(&mut self, request: &Request) -> Reply {
        let dir = StoreDir::default();
        let mut bytes = Vec::new();
        request.encode(&dir, &mut bytes);
        self.0.write_all(&bytes).unwrap();
        let mut buffer = Vec::new();
        loop {
            match Reply::decode(&dir, request.operation(), &buffer).unwrap() {
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

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

struct Server {
    path: PathBuf,
    stop: CancellationToken,
    view: View,
}

fn serve(world: &World) -> Server {
    let path = world.dir.path().join("nix.sock");
    let view = world.store().view;
    let stop = CancellationToken::new();
    let socket = NixSocket::new(view.clone(), &world.metrics);
    tokio::spawn(socket.serve(listen(&path).unwrap(), stop.clone()));
    Server { path, stop, view }
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
        assert!(matches!(client.ask(&Request::NarFromPath(path)), Reply::Error(_)));
        let id = format!("sha256:{}!out", "0".repeat(64));
        assert_eq!(client.ask(&Request::QueryRealisation(id.parse().unwrap())), Reply::Realisations(Vec::new()));
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
                Request::QueryValidPaths { paths: vec![known.clone(), absent], substitute: false },
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
    // What a process that is gone left is taken over.
    let stale = world.dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    listen(&stale).unwrap();
}
