//! Bodies of the lake API against their JSON.

use std::fmt::Debug;

use serde::de::DeserializeOwned;

use super::*;
use crate::id::{PackId, Ulid};
use crate::lake::location::Domain;
use crate::nix::signature::SecretKey;

const HASH32: &str = "0123456789abcdfghijklmnpqrsvwxyz";

#[track_caller]
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T, json: &str) {
    assert_eq!(serde_json::to_string(value).unwrap(), json);
    assert_eq!(&serde_json::from_str::<T>(json).unwrap(), value);
    // A newer server may say more.
    if let Some(more) = json.strip_prefix("{\"").filter(|_| json.contains("paths") || json.contains("missing\":[")) {
        assert_eq!(&serde_json::from_str::<T>(&format!("{{\"unknown\":1,\"{more}")).unwrap(), value);
    }
}

#[test]
fn bodies() {
    let key = SecretKey::generate("main-1", [7; 32]).unwrap().public();
    let (lake, cache) = (LakeId(Ulid::from_bytes([1; 16])), CacheId(Ulid::from_bytes([2; 16])));
    check(
        &Info { api_version: 1, lake, store_dir: StoreDir::default(), cache, public_keys: vec![key.clone()] },
        &format!(
            "{{\"api_version\":1,\"lake\":\"{lake}\",\"store_dir\":\"/nix/store\",\"cache\":\"{cache}\",\"public_keys\":[\"{key}\"]}}"
        ),
    );
    let path: StorePathHash = HASH32.parse().unwrap();
    check(&ClosureRequest { roots: vec![path], have: vec![] }, &format!("{{\"roots\":[\"{HASH32}\"],\"have\":[]}}"));
    assert!(serde_json::from_str::<ClosureRequest>("{\"roots\":[\"nothing\"]}").is_err());
    assert!(serde_json::from_str::<ClosureRequest>("{\"roots\":[]}").is_ok(), "a client that has nothing");
    check(&ClosureLine::Record("StorePath: ..\n".to_owned()), "{\"record\":\"StorePath: ..\\n\"}");
    check(&ClosureLine::Missing(path), &format!("{{\"missing\":\"{HASH32}\"}}"));
    check(&ClosureLine::Done(2), "{\"done\":2}");
    let name: StorePath = format!("{HASH32}-hello").parse().unwrap();
    check(&MissingRequest { paths: vec![name.clone()] }, &format!("{{\"paths\":[\"{HASH32}-hello\"]}}"));
    check(&MissingResponse { missing: vec![name] }, &format!("{{\"missing\":[\"{HASH32}-hello\"]}}"));
}

#[test]
fn locating() {
    let ids = [BlobId::from_bytes([1; 32]), BlobId::from_bytes([2; 32])];
    let body = encode_locate(&ids);
    assert_eq!(body.len(), 64);
    assert_eq!(decode_locate(&body), Ok(ids.to_vec()));
    assert_eq!(decode_locate(&[]), Ok(vec![]));
    assert!(decode_locate(&body[..63]).is_err());
    assert!(decode_locate(&vec![0; ID_LEN * LOCATE_MAX]).is_ok());
    assert!(decode_locate(&vec![0; ID_LEN * (LOCATE_MAX + 1)]).is_err());

    let pack = |n| PackRef { domain: Domain::Public, id: PackId(Ulid::from_bytes([n; 16])) };
    let place = |n, offset| Some(Location { pack: pack(n), frame_offset: 16, frame_length: 300, offset, length: 7 });
    let locations = [place(3, 1), None, place(1, 2), place(3, 3)];
    let response = LocateResponse::new(&locations);
    check(
        &response,
        &format!(
            "{{\"packs\":[\"{}\",\"{}\"],\"locations\":[[0,16,300,1,7],null,[1,16,300,2,7],[0,16,300,3,7]]}}",
            pack(3),
            pack(1)
        ),
    );
    assert_eq!(response.locations(), Ok(locations.to_vec()));
    let beyond: LocateResponse = serde_json::from_str("{\"packs\":[],\"locations\":[[0,16,300,1,7]]}").unwrap();
    assert!(beyond.locations().is_err());
}
