//! A server never panics over what a client sends, and never asks for less than it has; nor a client over a server.
//!
//! The bytes are taken for a whole conversation, whose requests have the form that its handshake agrees on, and for
//! requests and replies of either form by themselves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::nix::store_path::StoreDir;
use narlake_format::nix::worker::{Decoded, Features, Handshake, Operation, Reply, Request, Trust};

fuzz_target!(|bytes: &[u8]| {
    converse(bytes);
    for features in [Features::default(), Features::ALL] {
        requests(features, bytes);
        replies(features, bytes);
    }
});

fn converse(bytes: &[u8]) {
    let (mut handshake, mut out, mut rest) = (Handshake::new("fuzz", Trust::Unknown), Vec::new(), bytes);
    loop {
        let said = out.len();
        match handshake.step(rest, &mut out) {
            Ok(Decoded::Complete { value, length }) => {
                rest = &rest[length..];
                if let Some(session) = value {
                    return requests(session.features, rest);
                }
            }
            Ok(Decoded::Incomplete { needed }) => {
                assert!(needed > rest.len());
                // Said again when the rest has come.
                assert_eq!(out.len(), said);
                return;
            }
            Err(_) => return,
        }
    }
}

fn requests(features: Features, bytes: &[u8]) {
    let (dir, mut rest) = (StoreDir::default(), bytes);
    while let Ok(Decoded::Complete { value, length }) = Request::decode(&dir, features, rest) {
        if let Ok(request) = value {
            let mut copy = Vec::new();
            request.encode(&dir, &mut copy);
            let length = copy.len();
            let again = Request::decode(&dir, features, &copy);
            assert_eq!(again, Ok(Decoded::Complete { value: Ok(request), length }));
        }
        rest = &rest[length..];
    }
    if let Ok(Decoded::Incomplete { needed }) = Request::decode(&dir, features, rest) {
        assert!(needed > rest.len());
    }
}

fn replies(features: Features, bytes: &[u8]) {
    let dir = StoreDir::default();
    for operation in Operation::ALL {
        if let Ok(Decoded::Complete { value, .. }) = Reply::decode(&dir, features, *operation, bytes) {
            let mut copy = Vec::new();
            value.encode(&dir, &mut copy);
            let length = copy.len();
            let again = Reply::decode(&dir, features, *operation, &copy);
            assert_eq!(again, Ok(Decoded::Complete { value, length }));
        }
    }
}
