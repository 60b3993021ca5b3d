use proptest::prelude::*;

use super::super::strategies::{store_path, store_paths};
use super::*;

const HASH: &str = "p4pclmv1gyja5kzc26npqpia1qqxrf0l";

#[track_caller]
fn check_name(text: &str, valid: bool) {
    assert_eq!(text.parse::<StorePathName>().is_ok(), valid, "{text:?}");
    assert_eq!(format!("{HASH}-{text}").parse::<StorePath>().is_ok(), valid, "{text:?}");
}

#[test]
fn names() {
    for valid in ["a", "ruby-2.7.3", "+-._?=Zz9", ".a", "..a", ".gitignore", "...", "-", "--", "=", &"x".repeat(211)] {
        check_name(valid, true);
    }
    for invalid in
        ["", ".", "..", ".-", "..-", ".-a", "..-a", "a/b", "a b", "a,b", "a\n", "\u{e4}", "a\0", &"x".repeat(212)]
    {
        check_name(invalid, false);
    }
}

#[test]
fn paths() {
    let dir = StoreDir::default();
    let path: StorePath = format!("{HASH}-ruby-2.7.3").parse().unwrap();
    assert_eq!(path.hash.to_string(), HASH);
    assert_eq!(path.name.as_str(), "ruby-2.7.3");
    let absolute = format!("/nix/store/{HASH}-ruby-2.7.3");
    assert_eq!(path.display_in(&dir).to_string(), absolute);
    assert_eq!(StorePath::parse_absolute(&dir, &absolute), Ok(path));

    for invalid in
        ["", HASH, &HASH[1..], &format!("{HASH}_a"), &format!("{}-a", HASH.replace('p', "e")), &"\u{e4}".repeat(20)]
    {
        assert!(invalid.parse::<StorePath>().is_err(), "{invalid:?}");
    }
    for invalid in ["", &format!("{HASH}-a"), &format!("/nix/store{HASH}-a"), &format!("/nix/store//{HASH}-a")] {
        assert!(StorePath::parse_absolute(&dir, invalid).is_err(), "{invalid:?}");
    }
    assert!(StorePath::parse_absolute(&dir, &format!("{absolute}/bin/ruby")).is_err());
    assert!(StorePath::parse_absolute(&dir, &format!("{absolute}/")).is_err());
}

#[test]
fn directories() {
    for valid in ["/nix/store", "/a", "/srv/.store/x"] {
        assert_eq!(valid.parse::<StoreDir>().unwrap().as_str(), valid);
    }
    for invalid in
        ["", "/", "nix/store", "/nix/store/", "//nix", "/nix/./store", "/nix/../store", "/a\nb", "/a b", "/a,b"]
    {
        assert!(invalid.parse::<StoreDir>().is_err(), "{invalid:?}");
    }
    assert!(format!("/{}", "a".repeat(STORE_DIR_MAX)).parse::<StoreDir>().is_err());
}

proptest! {
    #[test]
    fn round_trip(path in store_path()) {
        let dir = StoreDir::default();
        prop_assert_eq!(path.to_string().parse(), Ok(path.clone()));
        prop_assert_eq!(StorePath::parse_absolute(&dir, &path.display_in(&dir).to_string()), Ok(path));
    }

    #[test]
    fn order_is_that_of_the_spelling(paths in store_paths()) {
        let mut texts: Vec<_> = paths.iter().map(StorePath::to_string).collect();
        texts.sort();
        prop_assert_eq!(texts, paths.iter().map(StorePath::to_string).collect::<Vec<_>>());
    }

    #[test]
    fn one_spelling(text in "[0-9a-z]{31,33}-?[a-z.-]{0,3}") {
        if let Ok(path) = text.parse::<StorePath>() {
            prop_assert_eq!(path.to_string(), text);
        }
    }
}
