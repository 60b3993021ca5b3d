//! What a narinfo says survives being written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::nix::cache_info::CacheInfo;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::StoreDir;

fuzz_target!(|bytes: &[u8]| {
    let dir = StoreDir::default();
    if let Ok(info) = NarInfo::parse(&dir, bytes) {
        let _ = info.content_address_holds(&dir);
        let text = info.to_text(&dir);
        assert_eq!(NarInfo::parse(&dir, text.as_bytes()), Ok(info));
    }
    if let Ok(info) = CacheInfo::parse(bytes) {
        assert_eq!(CacheInfo::parse(info.to_text().as_bytes()), Ok(info));
    }
});
