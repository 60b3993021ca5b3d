use proptest::prelude::*;

use super::super::strategies::narinfo;
use super::*;

const TEXT: &str = "\
StorePath: /nix/store/p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3
URL: nar/1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3.nar.xz
Compression: xz
FileHash: sha256:1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3
FileSize: 4029176
NarHash: sha256:1impfw8zdgisxkghq9a3q7cn7jb9zyzgxdydiamp8z2nlyyl0h5h
NarSize: 18735072
References: 0d71ygfwbmy1xjlbj1v027dfmy9cqavy-libffi-3.3 p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3
Deriver: bidkcs01mww363s4s7akdhbl6ws66b0z-ruby-2.7.3.drv
Sig: cache.nixos.org-1:GrGV/Ls10TzoOaCnrcAqmPbKXFLLSBDeGNh5EQGKyuGA4K1wv1LcRVb6/sU+NAPK8lDiam8XcdJzUngmdhfTBQ==
";

#[test]
fn parses() {
    let dir = StoreDir::default();
    let info = NarInfo::parse(&dir, TEXT.as_bytes()).unwrap();
    assert_eq!(info.store_path.name.as_str(), "ruby-2.7.3");
    assert_eq!(info.compression, Compression::Xz);
    assert_eq!((info.file_size, info.nar_size), (Some(4_029_176), 18_735_072));
    assert_eq!(info.references.len(), 2);
    assert_eq!(info.signatures.len(), 1);
    assert_eq!((&info.ca, info.extra.len()), (&None, 0));
    assert_eq!(info.to_text(&dir), TEXT);
    assert_eq!(
        info.fingerprint(&dir),
        "1;/nix/store/p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3;\
         sha256:1impfw8zdgisxkghq9a3q7cn7jb9zyzgxdydiamp8z2nlyyl0h5h;18735072;\
         /nix/store/0d71ygfwbmy1xjlbj1v027dfmy9cqavy-libffi-3.3,\
         /nix/store/p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3"
    );
}

/// Parses `TEXT` with one thing replaced by another.
fn with(from: &str, to: &str) -> Result<NarInfo, NarInfoError> {
    assert!(TEXT.contains(from), "{from}");
    NarInfo::parse(&StoreDir::default(), TEXT.replace(from, to).as_bytes())
}

#[test]
fn what_nix_lets_vary() {
    let info = with("", "").unwrap();
    let same = |other: Result<NarInfo, NarInfoError>| assert_eq!(other.as_ref(), Ok(&info));
    let lines: Vec<_> = TEXT.lines().rev().collect();
    same(NarInfo::parse(&StoreDir::default(), format!("{}\n", lines.join("\n")).as_bytes()));
    // References are a set.
    let (first, second) =
        ("0d71ygfwbmy1xjlbj1v027dfmy9cqavy-libffi-3.3", "p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3");
    same(with(&format!("{first} {second}"), &format!("{second}  {first} {second} ")));

    assert_eq!(with("Compression: xz\n", "").unwrap().compression, Compression::Bzip2);
    let references = format!("References: {first} {second}\n");
    assert!(with(&references, "References: \n").unwrap().references.is_empty());
    assert!(with(&references, "").unwrap().references.is_empty());
    assert_eq!(with("bidkcs01mww363s4s7akdhbl6ws66b0z-ruby-2.7.3.drv", "unknown-deriver").unwrap().deriver, None);
    assert_eq!(with("Deriver", "CA: \nDeriver").unwrap().ca, None);
    let extra = with("Deriver", "X-Other: 1\nX-Other: two: three\nDeriver").unwrap().extra;
    assert_eq!(extra, [("X-Other".into(), "1".into()), ("X-Other".into(), "two: three".into())]);
}

#[test]
fn refusals() {
    let field = |result, expected| match result {
        Err(NarInfoError::Field { field, .. }) => assert_eq!(field, expected),
        other => panic!("{other:?}"),
    };
    field(with("StorePath: /nix/store/", "StorePath: /gnu/store/"), "StorePath");
    field(with("StorePath: /nix/store/p4pclmv1", "StorePath: /nix/store/../p4pc"), "StorePath");
    field(with("URL: nar/1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3.nar.xz", "URL: "), "URL");
    field(with("Compression: xz", "Compression: rar"), "Compression");
    field(with("FileHash: sha256:", "FileHash: sha512:"), "FileHash");
    field(with("NarHash: sha256:1", "NarHash: sha256:z"), "NarHash");
    for size in ["0", "-1", "+1", "01", "1.0", "1e3", "", "99999999999999999999", "1099511627777"] {
        field(with("18735072", size), "NarSize");
        field(with("4029176", size), "FileSize");
    }
    field(with("libffi", "lib/ffi"), "References");
    field(with(" 0d71ygf", " /nix/store/0d71ygf"), "References");
    field(with("ruby-2.7.3.drv", "ruby 2.7.3.drv"), "Deriver");
    field(with("Sig: cache.nixos.org-1:", "Sig: "), "Sig");
    field(with("Deriver", "CA: sha256:1\nDeriver"), "CA");

    for name in ["StorePath", "URL", "NarHash", "NarSize"] {
        assert_eq!(with(&format!("{name}: "), "X: "), Err(NarInfoError::Missing { field: name }));
    }
    for line in TEXT.lines().filter(|line| !line.starts_with("Sig")) {
        let result = with(line, &format!("{line}\n{line}"));
        assert!(matches!(result, Err(NarInfoError::Repeated { .. })), "{result:?}");
    }
    assert_eq!(with("==\n", "=="), Err(NarInfoError::Unfinished { line: 10 }));
    assert_eq!(with("URL: ", "URL:"), Err(NarInfoError::Line { line: 2 }));
    assert_eq!(with("Deriver", "\nDeriver"), Err(NarInfoError::Line { line: 9 }));
    assert!(matches!(with("xz\n", "xz\r\n"), Err(NarInfoError::NotText { .. })));
    let parse = |bytes: &[u8]| NarInfo::parse(&StoreDir::default(), bytes);
    assert_eq!(parse(b""), Err(NarInfoError::Missing { field: "StorePath" }));
    assert_eq!(parse(b"URL: \xff\n"), Err(NarInfoError::NotText { offset: 5 }));
    let length = NARINFO_MAX as u64 + 1;
    assert_eq!(parse(&vec![b'\n'; NARINFO_MAX + 1]), Err(NarInfoError::TooLong { length, max: length - 1 }));
}

#[test]
fn limits_of_lists() {
    let references: Vec<_> = (0..=REFERENCES_MAX).map(|n| format!("p4pclmv1gyja5kzc26npqpia1qqxrf0l-{n}")).collect();
    let list = |count: usize| with("References: ", &format!("References: {} ", references[..count].join(" ")));
    assert!(list(REFERENCES_MAX - 2).is_ok());
    assert!(matches!(list(REFERENCES_MAX - 1), Err(NarInfoError::Field { field: "References", .. })));

    let signature = TEXT.lines().last().unwrap();
    let repeated = |count: usize| with(signature, &vec![signature; count].join("\n"));
    assert_eq!(repeated(SIGNATURES_MAX).unwrap().signatures.len(), 1);
    assert!(matches!(repeated(SIGNATURES_MAX + 1), Err(NarInfoError::Field { field: "Sig", .. })));
}

#[test]
fn signing() {
    let dir = StoreDir::default();
    let mut info = with("", "").unwrap();
    let key = SecretKey::generate("a-1", [1; 32]).unwrap();
    assert!(!info.is_signed_by(&dir, &[key.public()]));
    info.sign(&dir, &key);
    info.sign(&dir, &key);
    assert_eq!(info.signatures.len(), 2);
    assert!(info.is_signed_by(&dir, &[key.public()]));
    assert!(!info.is_signed_by(&dir, &[]));
    // Every field of the fingerprint counts, and the store directory with it.
    for changed in [
        NarInfo { nar_size: 1, ..info.clone() },
        NarInfo { nar_hash: Sha256Hash::of(b""), ..info.clone() },
        NarInfo { references: vec![], ..info.clone() },
        NarInfo { store_path: info.references[0].clone(), ..info.clone() },
    ] {
        assert!(!changed.is_signed_by(&dir, &[key.public()]));
    }
    assert!(!info.is_signed_by(&"/gnu/store".parse().unwrap(), &[key.public()]));
    // A caller's order of references does not.
    info.references.reverse();
    assert!(info.is_signed_by(&dir, &[key.public()]));
}

#[test]
#[should_panic(expected = "newline inside the field URL")]
fn a_newline_never_starts_a_line() {
    let mut info = with("", "").unwrap();
    info.url.push_str("\nSig: x");
    let _ = info.to_text(&StoreDir::default());
}

proptest! {
    #[test]
    fn round_trip(info in narinfo()) {
        let dir = StoreDir::default();
        prop_assert_eq!(NarInfo::parse(&dir, info.to_text(&dir).as_bytes()), Ok(info));
    }

    #[test]
    fn damage_shows(info in narinfo()) {
        let dir = StoreDir::default();
        let text = info.to_text(&dir).into_bytes();
        let intact = Ok(info);
        // Some caches leave `References` out where there are none, so cutting off an empty one changes nothing.
        let bare = text.windows(14).position(|line| line == b"\nReferences: \n").map_or(0, |before| before + 1);
        for length in (0..text.len()).filter(|length| *length != bare) {
            prop_assert_ne!(&NarInfo::parse(&dir, &text[..length]), &intact);
        }
        let mut text = text;
        for bit in 0..text.len() * 8 {
            text[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(&NarInfo::parse(&dir, &text), &intact, "bit {}", bit);
            text[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn any_bytes(bytes: Vec<u8>) {
        let _ = NarInfo::parse(&StoreDir::default(), &bytes);
    }
}
