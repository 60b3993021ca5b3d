//! Listings and realisations: no text makes the parsers panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::nix::listing::Listing;
use narlake_format::nix::realisation::{Realisation, RealisationKey};

fuzz_target!(|bytes: &[u8]| {
    let _ = Listing::parse(bytes);
    // The first line is the URL, the rest the document.
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
    let url = lines.next().and_then(|line| std::str::from_utf8(line).ok());
    if let (Some(key), Some(document)) = (url.and_then(|url| url.parse::<RealisationKey>().ok()), lines.next()) {
        assert_eq!(key.to_string().parse(), Ok(key.clone()));
        if let Ok(realisation) = Realisation::parse(&key, document) {
            assert_eq!(Realisation::parse(&key, realisation.to_document(&key).as_bytes()), Ok(realisation));
        }
    }
});
