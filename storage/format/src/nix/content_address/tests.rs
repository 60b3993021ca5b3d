use proptest::prelude::*;

use super::super::strategies::content_address;
use super::*;

// That computed paths are Nix's own is tested with narinfos that Nix wrote (tests/golden_nix.rs).

#[test]
fn spellings() {
    let digits = "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s";
    let hash = Sha256Hash::of(b"abc");
    for (text, expected) in [
        (format!("text:sha256:{digits}"), ContentAddress::Text(hash)),
        (format!("fixed:sha256:{digits}"), ContentAddress::Flat(hash)),
        (format!("fixed:r:sha256:{digits}"), ContentAddress::NixArchive(hash)),
    ] {
        assert_eq!(text.parse(), Ok(expected.clone()));
        assert_eq!(expected.to_string(), text);
    }
    for text in [
        "fixed:md5:3y8bwfr609h3lh9ch0izcqq7fl",
        "fixed:sha1:kpcd173cq987hw957sx6m0868wv3x6d9",
        "fixed:r:sha1:kpcd173cq987hw957sx6m0868wv3x6d9",
        "fixed:git:sha1:kpcd173cq987hw957sx6m0868wv3x6d9",
        &format!("fixed:git:sha256:{digits}"),
        "fixed:sha512:2gs8k559z4rlahfx0y688s49m2vvszylcikrfinm30ly9rak69236nkam5ydvly1ai7xac99vxfc4ii84hawjbk876blyk1jfhkbbyx",
    ] {
        let address = text.parse::<ContentAddress>().unwrap();
        assert!(matches!(address, ContentAddress::Other(_)), "{text}");
        assert_eq!(address.to_string(), text);
    }
    for text in [
        "",
        "text:",
        "fixed:",
        digits,
        &format!("sha256:{digits}"),
        &format!("text:r:sha256:{digits}"),
        &format!("text:sha512:{digits}"),
        &format!("fixed:s:sha256:{digits}"),
        &format!("fixed:r:r:sha256:{digits}"),
        &format!("fixed:sha3:{digits}"),
        &format!("fixed:sha1:{digits}"),
        &format!("fixed:sha256:{}", hash.to_hex()),
    ] {
        assert!(text.parse::<ContentAddress>().is_err(), "{text}");
    }
}

#[test]
fn references_where_the_method_has_none() {
    let dir = StoreDir::default();
    let name: StorePathName = "a".parse().unwrap();
    let hash = Sha256Hash::of(b"abc");
    let other: StorePath = "p4pclmv1gyja5kzc26npqpia1qqxrf0l-b".parse().unwrap();
    let path =
        |address: ContentAddress, references: &[StorePath], itself| address.store_path(&dir, &name, references, itself);
    assert!(path(ContentAddress::Flat(hash), &[], false).is_ok());
    assert!(path(ContentAddress::Flat(hash), &[], true).is_err());
    assert!(path(ContentAddress::Flat(hash), std::slice::from_ref(&other), false).is_err());
    assert!(path(ContentAddress::Text(hash), &[], true).is_err());
    let plain = path(ContentAddress::NixArchive(hash), &[], false).unwrap();
    let itself = path(ContentAddress::NixArchive(hash), &[], true).unwrap();
    let with_other = path(ContentAddress::NixArchive(hash), std::slice::from_ref(&other), false).unwrap();
    assert!(plain != itself && plain != with_other && itself != with_other);
    // A set, whatever the caller's order.
    let twice = [other.clone(), other];
    assert_eq!(path(ContentAddress::NixArchive(hash), &twice, false), Ok(with_other));
}

proptest! {
    #[test]
    fn round_trip(address in content_address()) {
        prop_assert_eq!(address.to_string().parse(), Ok(address));
    }
}
