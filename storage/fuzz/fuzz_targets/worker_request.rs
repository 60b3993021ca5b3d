//! A server never panics over what a client sends, and never asks for less than it has; nor a client over a server.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::nix::store_path::StoreDir;
use narlake_format::nix::worker::{Decoded, Handshake, Operation, Reply, Request, Trust};

fuzz_target!(|bytes: &[u8]| {
    let dir = StoreDir::default();
    let mut rest = bytes;
    while let Ok(Decoded::Complete { value, length }) = Request::decode(&dir, rest) {
        if let Ok(request) = value {
            let mut copy = Vec::new();
            request.encode(&dir, &mut copy);
            let length = copy.len();
            assert_eq!(Request::decode(&dir, &copy), Ok(Decoded::Complete { value: Ok(request), length }));
        }
        rest = &rest[length..];
    }
    if let Ok(Decoded::Incomplete { needed }) = Request::decode(&dir, rest) {
        assert!(needed > rest.len());
    }

    let (mut handshake, mut out, mut rest) = (Handshake::new("fuzz", Trust::Unknown), Vec::new(), bytes);
    while let Ok(Decoded::Complete { value: None, length }) = handshake.step(rest, &mut out) {
        rest = &rest[length..];
    }

    for operation in Operation::ALL {
        if let Ok(Decoded::Complete { value, .. }) = Reply::decode(&dir, *operation, bytes) {
            let mut copy = Vec::new();
            value.encode(&dir, &mut copy);
            let length = copy.len();
            assert_eq!(Reply::decode(&dir, *operation, &copy), Ok(Decoded::Complete { value, length }));
        }
    }
});
