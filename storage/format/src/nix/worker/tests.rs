use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::handshake::{MAGIC_CLIENT, MAGIC_SERVER, refusal};
use super::wire::{put_list, put_string, put_u64};
use super::*;
use crate::error::FormatError;
use crate::limits::{WORKER_FEATURE_NAME_MAX, WORKER_FEATURES_MAX, WORKER_LIST_MAX, WORKER_STRING_MAX};
use crate::nix::realisation::{DrvOutput, RealisationKey};
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};
use crate::nix::strategies::{content_address, name, sha256, signature, store_path, store_paths};

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, text);
    out
}

/// Runs a handshake over what a client sends, a byte at a time; what the server says comes also where it ends in an
/// error.
fn shake_on(client: &[u8]) -> (Result<Option<Session>, WorkerError>, Vec<u8>) {
    let mut handshake = Handshake::new("narlake", Trust::NotTrusted);
    let (mut buffer, mut out) = (Vec::new(), Vec::new());
    let mut client = client.iter();
    loop {
        match handshake.step(&buffer, &mut out) {
            Ok(Decoded::Complete { value: Some(session), .. }) => {
                assert!(client.next().is_none());
                return (Ok(Some(session)), out);
            }
            Ok(Decoded::Complete { value: None, length }) => drop(buffer.drain(..length)),
            Ok(Decoded::Incomplete { needed }) => {
                assert!(needed > buffer.len());
                let Some(byte) = client.next() else { return (Ok(None), out) };
                buffer.push(*byte);
            }
            Err(error) => return (Err(error), out),
        }
    }
}

/// The version agreed on, and what the server said.
fn shake(client: &[u8]) -> Result<(Option<Version>, Vec<u8>), WorkerError> {
    let (session, out) = shake_on(client);
    Ok((session?.map(|session| session.version), out))
}

const FEATURE: &str = "realisation-with-path-not-hash";

const BY_HASH: Features = Features { realisation_by_path: false };

/// A greeting of 1.38 with these features.
fn greeting(features: &[&str]) -> Vec<u8> {
    let mut client = words(&[MAGIC_CLIENT, 0x126]);
    put_list(&mut client, features.iter());
    client.extend(words(&[0, 0]));
    client
}

#[test]
fn handshakes() {
    let hello = |version| words(&[MAGIC_SERVER, 0x126]).into_iter().chain(version).collect::<Vec<_>>();
    let name = string("narlake");
    // 1.38: features, here one that is not known; affinity and reserved space.
    let newest = hello([words(&[1]), string(FEATURE), name.clone(), words(&[2, STDERR_LAST])].concat());
    assert_eq!(shake(&greeting(&["something-new"])), Ok((Some(Version(0x126)), newest.clone())));
    // A newer client is spoken to as 1.38.
    assert_eq!(shake(&words(&[MAGIC_CLIENT, 0x13c, 0, 0, 0])), Ok((Some(Version(0x126)), newest)));
    let older = hello([name.clone(), words(&[2, STDERR_LAST])].concat());
    assert_eq!(shake(&words(&[MAGIC_CLIENT, 0x125, 1, 5, 0])), Ok((Some(Version(0x125)), older.clone())));
    assert_eq!(shake(&words(&[MAGIC_CLIENT, 0x123, 0, 0])), Ok((Some(Version(0x123)), older)));
    let oldest = hello([name, words(&[STDERR_LAST])].concat());
    assert_eq!(shake(&words(&[MAGIC_CLIENT, 0x121, 0, 0])), Ok((Some(Version(0x121)), oldest)));

    // Clients before Nix 2.25 say their version only when they have heard the server's.
    assert_eq!(shake(&words(&[MAGIC_CLIENT])), Ok((None, hello(vec![]))));
    assert_eq!(shake(&words(&[MAGIC_CLIENT])[..7]), Ok((None, vec![])));
    assert_eq!(shake(b"GET / HTTP/1.1\r\n"), Err(WorkerError::Magic { magic: u64::from_le_bytes(*b"GET / HT") }));
}

#[test]
fn a_version_that_is_not_spoken_is_told_in_its_own_form() {
    for version in [0, 0x026, 0x10a, 0x112, 0x11a, 0x120, 0x226, u64::MAX] {
        let version = Version(version);
        let (session, out) = shake_on(&words(&[MAGIC_CLIENT, version.0]));
        let error = WorkerError::Version { version };
        let text = string(&error.to_string());
        let told = match version.0 {
            // Message and exit status; from 1.26 type, level, name, message, position, traces.
            ..0x11a => [words(&[STDERR_ERROR]), text, words(&[1])].concat(),
            _ => {
                let head = [words(&[STDERR_ERROR]), string("Error"), words(&[0]), string("Error")].concat();
                [head, text, words(&[0, 0])].concat()
            }
        };
        assert_eq!(out, [words(&[MAGIC_SERVER, 0x126]), told].concat(), "{version}");
        assert_eq!(session, Err(error));
    }
    assert!(WorkerError::Version { version: Version(0x10a) }.to_string().contains("version 1.10"));
}

#[test]
fn features_are_those_of_both() {
    let agreed = |features: &[&str]| shake_on(&greeting(features)).0.map(|session| session.unwrap().features);
    assert_eq!(agreed(&[]), Ok(BY_HASH));
    assert_eq!(agreed(&["delete-dead-specific-referrers", ""]), Ok(BY_HASH));
    assert_eq!(agreed(&["realisation-with-path-not-hash "]), Ok(BY_HASH));
    assert_eq!(agreed(&["disable-set-options", FEATURE, FEATURE]), Ok(Features::ALL));
    // As long as a list may be, and no longer.
    let many = vec![FEATURE; WORKER_FEATURES_MAX + 1];
    assert_eq!(agreed(&many[1..]), Ok(Features::ALL));
    assert!(matches!(agreed(&many), Err(WorkerError::Frame { .. })));
    let long = "x".repeat(WORKER_FEATURE_NAME_MAX + 1);
    assert_eq!(agreed(&[&long[1..]]), Ok(BY_HASH));
    assert!(matches!(agreed(&[&long]), Err(WorkerError::Frame { .. })));
    // Refused at the length word, not when it has all come.
    for length in [u64::MAX, WORKER_FEATURES_MAX as u64 + 1] {
        let (session, _) = shake_on(&words(&[MAGIC_CLIENT, 0x126, length]));
        assert!(matches!(session, Err(WorkerError::Frame { .. })), "{session:?}");
    }
}

#[test]
fn a_refusal_is_a_whole_conversation() {
    let error = [words(&[STDERR_ERROR]), string("Error"), words(&[0]), string("Error"), string("no"), words(&[0, 0])];
    let expected = [words(&[MAGIC_SERVER, 0x125]), string("narlake"), words(&[2]), error.concat()].concat();
    assert_eq!(refusal("narlake", "no"), expected);
}

const PATH: &str = "/nix/store/p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3";

fn path() -> StorePath {
    StorePath::parse_absolute(&StoreDir::default(), PATH).unwrap()
}

#[track_caller]
fn complete(bytes: &[u8]) -> Result<Request, FormatError> {
    match Request::decode(&StoreDir::default(), BY_HASH, bytes).unwrap() {
        Decoded::Complete { value, length } => {
            assert_eq!(length, bytes.len());
            value
        }
        Decoded::Incomplete { needed } => panic!("incomplete, needs {needed} of {}", bytes.len()),
    }
}

#[test]
fn requests() {
    for (code, request) in [
        (1, Request::IsValidPath(path())),
        (6, Request::QueryReferrers(path())),
        (10, Request::EnsurePath(path())),
        (11, Request::AddTempRoot(path())),
        (26, Request::QueryPathInfo(path())),
        (33, Request::QueryValidDerivers(path())),
        (38, Request::NarFromPath(path())),
    ] {
        let bytes = [words(&[code]), string(PATH)].concat();
        assert_eq!(complete(&bytes), Ok(request.clone()));
        assert_eq!(request.operation() as u64, code);
        for invalid in ["", "/nix/store", "ruby", "/nix/store/../etc"] {
            assert!(complete(&[words(&[code]), string(invalid)].concat()).is_err());
        }
    }
    let mut options = words(&[19, 0, 0, 0, 3, 1, 0, 1, 0, 0, 0, 2, 1, 2]);
    options.extend(["cores", "2", "substituters", "https://a b"].map(string).concat());
    assert_eq!(complete(&options), Ok(Request::SetOptions));
    assert_eq!(complete(&words(&[23])), Ok(Request::QueryAllValidPaths));
    let hash = path().hash;
    assert_eq!(complete(&[words(&[29]), string(&hash.to_string())].concat()), Ok(Request::QueryPathFromHashPart(hash)));
    let paths = |substitute| Request::QueryValidPaths { paths: vec![path()], substitute };
    assert_eq!(complete(&[words(&[31, 1]), string(PATH), words(&[0])].concat()), Ok(paths(false)));
    assert_eq!(complete(&[words(&[31, 1]), string(PATH), words(&[1])].concat()), Ok(paths(true)));
    for target in [PATH.into(), format!("{PATH}!out,dev"), format!("{PATH}!*")] {
        assert_eq!(complete(&[words(&[40, 1]), string(&target)].concat()), Ok(Request::QueryMissing(vec![path()])));
    }
    let id = format!("{}!out", "sha256:6b4cb47672f7e2adff9e58f684d1b149c503928be6b6130bee23231ee4d10363");
    assert_eq!(
        complete(&[words(&[43]), string(&id)].concat()),
        Ok(Request::QueryRealisation(RealisationKey::Hash(id.parse().unwrap())))
    );
    let by_path = [words(&[43]), string(PATH), string("out")].concat();
    let key = RealisationKey::Path { drv: path(), output: "out".parse().unwrap() };
    let decode = |bytes: &[u8]| Request::decode(&StoreDir::default(), Features::ALL, bytes);
    let whole = Decoded::Complete { value: Ok(Request::QueryRealisation(key)), length: by_path.len() };
    assert_eq!(decode(&by_path), Ok(whole));
    // A bad field leaves the connection in step.
    for (drv, output) in [("ruby", "out"), (PATH, ""), (PATH, "../out")] {
        let bytes = [words(&[43]), string(drv), string(output)].concat();
        match decode(&bytes) {
            Ok(Decoded::Complete { value: Err(_), length }) => assert_eq!(length, bytes.len()),
            other => panic!("{other:?}"),
        }
    }
    for operation in Operation::ALL {
        assert_eq!(Operation::from_code(*operation as u64), Some(*operation));
    }
}

#[test]
fn requests_that_end_the_connection() {
    let decode = |bytes: &[u8]| Request::decode(&StoreDir::default(), BY_HASH, bytes);
    for code in [0, 2, 7, 39, 1000, u64::MAX] {
        assert_eq!(decode(&words(&[code])), Err(WorkerError::Operation { code }));
    }
    let frame = |bytes: &[u8]| assert!(matches!(decode(bytes), Err(WorkerError::Frame { .. })));
    // Lengths that no message has are refused at the length word.
    frame(&words(&[1, WORKER_STRING_MAX as u64 + 1]));
    frame(&words(&[1, u64::MAX]));
    frame(&words(&[31, WORKER_LIST_MAX as u64 + 1]));
    frame(&words(&[31, u64::MAX]));
    frame(&[words(&[19]), words(&[0; 12]), words(&[u64::MAX])].concat());
    frame(&[words(&[31, 1]), string(PATH), words(&[2])].concat());
    let mut padded = [words(&[1]), string(PATH)].concat();
    *padded.last_mut().unwrap() = 1;
    frame(&padded);
    // A list of strings each within its limit, but too much in all.
    let (mut large, text) = (words(&[31, 1000]), "a".repeat(WORKER_STRING_MAX));
    (0..512).for_each(|_| put_string(&mut large, &text));
    frame(&large);
}

#[test]
fn replies() {
    let dir = StoreDir::default();
    let encode = |reply: &Reply| {
        let mut out = Vec::new();
        reply.encode(&dir, &mut out);
        out
    };
    let last = STDERR_LAST;
    for (reply, bytes) in [
        (Reply::Done, words(&[last])),
        (Reply::Nar, words(&[last])),
        (Reply::Accepted, words(&[last, 1])),
        (Reply::Valid(false), words(&[last, 0])),
        (Reply::Valid(true), words(&[last, 1])),
        (Reply::PathInfo(None), words(&[last, 0])),
        (Reply::Path(None), words(&[last, 0])),
        (Reply::Path(Some(path())), [words(&[last]), string(PATH)].concat()),
        (Reply::Paths(vec![path()]), [words(&[last, 1]), string(PATH)].concat()),
        (Reply::Realisations(vec!["{}".into()]), [words(&[last, 1]), string("{}")].concat()),
        (Reply::Realised(None), words(&[last, 0])),
        (
            Reply::Realised(Some(Realised { out_path: path(), signatures: vec![] })),
            [words(&[last, 1]), string(PATH), words(&[0])].concat(),
        ),
        (Reply::Missing(Missing::default()), words(&[last, 0, 0, 0, 0, 0])),
        (
            Reply::Error("gone".into()),
            [words(&[STDERR_ERROR]), string("Error"), words(&[0]), string("Error"), string("gone"), words(&[0, 0])]
                .concat(),
        ),
    ] {
        assert_eq!(encode(&reply), bytes, "{reply:?}");
    }
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        store_path().prop_map(Request::IsValidPath),
        store_path().prop_map(Request::QueryPathInfo),
        store_path().prop_map(Request::QueryReferrers),
        any::<[u8; 20]>().prop_map(|hash| Request::QueryPathFromHashPart(StorePathHash::from_bytes(hash))),
        (store_paths(), any::<bool>()).prop_map(|(paths, substitute)| Request::QueryValidPaths { paths, substitute }),
        store_paths().prop_map(Request::QueryMissing),
        (sha256(), name()).prop_map(|(drv_hash, output)| {
            Request::QueryRealisation(RealisationKey::Hash(DrvOutput { drv_hash, output }))
        }),
        (store_path(), name())
            .prop_map(|(drv, output)| Request::QueryRealisation(RealisationKey::Path { drv, output })),
        Just(Request::QueryAllValidPaths),
    ]
}

/// The features of a session in which a request has this form.
fn features_of(request: &Request) -> Features {
    let by_path = matches!(request, Request::QueryRealisation(RealisationKey::Path { .. }));
    Features { realisation_by_path: by_path }
}

fn reply() -> impl Strategy<Value = (Operation, Reply)> {
    let info = (
        option::of(store_path()),
        sha256(),
        store_paths(),
        any::<(u64, u64, bool)>(),
        vec(signature(), 0..3),
        option::of(content_address()),
    )
        .prop_map(|(deriver, nar_hash, references, (registration_time, nar_size, ultimate), signatures, ca)| {
            PathInfo { deriver, nar_hash, references, registration_time, nar_size, ultimate, signatures, ca }
        });
    let missing = (store_paths(), store_paths(), store_paths(), any::<(u64, u64)>()).prop_map(
        |(will_build, will_substitute, unknown, (download_size, nar_size))| {
            Reply::Missing(Missing { will_build, will_substitute, unknown, download_size, nar_size })
        },
    );
    prop_oneof![
        option::of(info).prop_map(|info| (Operation::QueryPathInfo, Reply::PathInfo(info))),
        store_paths().prop_map(|paths| (Operation::QueryValidPaths, Reply::Paths(paths))),
        option::of(store_path()).prop_map(|path| (Operation::QueryPathFromHashPart, Reply::Path(path))),
        missing.prop_map(|missing| (Operation::QueryMissing, missing)),
        any::<bool>().prop_map(|valid| (Operation::IsValidPath, Reply::Valid(valid))),
        vec(".{0,20}", 0..3).prop_map(|texts| (Operation::QueryRealisation, Reply::Realisations(texts))),
        option::of((store_path(), vec(signature(), 0..3))).prop_map(|realised| {
            let realised = realised.map(|(out_path, signatures)| Realised { out_path, signatures });
            (Operation::QueryRealisation, Reply::Realised(realised))
        }),
        (".{0,40}").prop_map(|message| (Operation::IsValidPath, Reply::Error(message))),
    ]
}

proptest! {
    #[test]
    fn request_round_trip(request in request(), next: Vec<u8>) {
        let (dir, features) = (StoreDir::default(), features_of(&request));
        let mut bytes = Vec::new();
        request.encode(&dir, &mut bytes);
        let length = bytes.len();
        for cut in 0..length {
            match Request::decode(&dir, features, &bytes[..cut]) {
                Ok(Decoded::Incomplete { needed }) => prop_assert!(needed > cut && needed <= length),
                other => prop_assert!(false, "{:?} at {}", other, cut),
            }
        }
        // What follows is not touched.
        bytes.extend(next);
        prop_assert_eq!(Request::decode(&dir, features, &bytes), Ok(Decoded::Complete { value: Ok(request), length }));
    }

    #[test]
    fn damage_shows(request in request()) {
        let (dir, features) = (StoreDir::default(), features_of(&request));
        let mut bytes = Vec::new();
        request.encode(&dir, &mut bytes);
        let intact = Ok(Decoded::Complete { value: Ok(request), length: bytes.len() });
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(&Request::decode(&dir, features, &bytes), &intact, "bit {}", bit);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn reply_round_trip((operation, reply) in reply()) {
        let dir = StoreDir::default();
        let features = Features { realisation_by_path: matches!(reply, Reply::Realised(_)) };
        let mut bytes = Vec::new();
        reply.encode(&dir, &mut bytes);
        let length = bytes.len();
        for cut in 0..length {
            match Reply::decode(&dir, features, operation, &bytes[..cut]) {
                Ok(Decoded::Incomplete { needed }) => prop_assert!(needed > cut && needed <= length),
                other => prop_assert!(false, "{:?} at {}", other, cut),
            }
        }
        prop_assert_eq!(Reply::decode(&dir, features, operation, &bytes), Ok(Decoded::Complete { value: reply, length }));
    }

    #[test]
    fn any_bytes(operation in proptest::sample::select(Operation::ALL), tail: Vec<u8>) {
        let dir = StoreDir::default();
        let mut bytes = words(&[operation as u64]);
        bytes.extend(&tail);
        for features in [BY_HASH, Features::ALL] {
            let _ = Request::decode(&dir, features, &bytes);
            let _ = Reply::decode(&dir, features, operation, &tail);
        }
        let _ = shake(&tail);
    }

    #[test]
    fn strings_are_padded_with_zeros(text in ".{0,20}", list in vec("[a-z]{0,9}", 0..4)) {
        let mut out = Vec::new();
        put_string(&mut out, &text);
        put_list(&mut out, list.iter());
        put_u64(&mut out, 7);
        prop_assert_eq!(out.len() % 8, 0);
    }
}
