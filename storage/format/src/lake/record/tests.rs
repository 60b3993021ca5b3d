//! Path records: their one spelling, and what their signatures cover.

use proptest::prelude::*;

use super::*;
use crate::lake::strings::tests::table;
use crate::nix::strategies::narinfo;

const DIR: &str = "/nix/store";
const STRING: &str = "0123456789abcdfghijklmnpqrsvwxyz-glibc-2.40";

fn dir() -> StoreDir {
    DIR.parse().expect("a store directory")
}

fn key(name: &str) -> SecretKey {
    SecretKey::generate(name, [7; 32]).expect("a key")
}

fn example(table: &StringTable) -> PathRecord {
    let text = format!(
        "StorePath: {DIR}/0c3qjbp8avzp3fckjmgvl9r2qy14i6f5-hello-2.12\nURL: nar/upload.nar.xz\nCompression: xz\n\
         FileHash: sha256:{hash}\nFileSize: 17\nNarHash: sha256:{hash}\nNarSize: 96\nReferences: \nX-Other: gone\n",
        hash = "0".repeat(52),
    );
    let info = NarInfo::parse(&dir(), text.as_bytes()).expect("a narinfo");
    let mut record = PathRecord::new(info, ManifestId::of(b"manifest"), table);
    record.sign(&dir(), &key("lake-1"));
    record
}

fn long_table() -> StringTable {
    let strings: Vec<String> = (0..100).map(|n| format!("{STRING}-{n}")).collect();
    table(&strings.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn what_describes_the_upload_is_dropped() {
    let record = example(&table(&[STRING]));
    let info = record.info();
    assert_eq!(info.url, format!("nar/0c3qjbp8avzp3fckjmgvl9r2qy14i6f5-{}.nar", "0".repeat(52)));
    assert_eq!(info.compression, Compression::None);
    assert_eq!((info.file_hash, info.file_size, info.extra.len()), (None, None, 0));
    assert!(!record.to_text(&dir()).contains("X-Other"));
}

#[test]
fn short_tables_are_carried() {
    for (table, inline) in [(StringTable::default(), true), (table(&[STRING]), true), (long_table(), false)] {
        let record = example(&table);
        assert_eq!(record.table(), table.id());
        assert_eq!(record.inline_table(), inline.then_some(&table));
        let text = record.to_text(&dir());
        assert_eq!(text.contains("X-Narlake-Table: "), inline);
        assert_eq!(PathRecord::parse(&dir(), text.as_bytes()), Ok(record));
    }
}

#[test]
fn the_signature_covers_all_that_matters() {
    let record = example(&table(&[STRING]));
    let keys = [key("lake-1").public()];
    assert!(record.is_signed_by(&dir(), &keys));
    assert!(record.info().is_signed_by(&dir(), &keys));
    assert!(!record.is_signed_by(&dir(), &[SecretKey::generate("lake-1", [8; 32]).expect("a key").public()]));
    let (manifest, table) = (record.manifest(), record.table());
    let nix = record.info().fingerprint(&dir());
    assert_eq!(record.lake_fingerprint(&dir()), format!("narlake-1;{manifest};{table};{nix}"));
    let others = [
        PathRecord { manifest: ManifestId::of(b"another"), ..record.clone() },
        PathRecord { table: StringTable::default().id(), ..record.clone() },
        PathRecord { info: NarInfo { nar_size: 97, ..record.info.clone() }, ..record.clone() },
    ];
    for other in others {
        assert!(!other.is_signed_by(&dir(), &keys));
    }
    // A signature by a key of the same name takes the place of the old one.
    let mut again = record.clone();
    again.sign(&dir(), &key("lake-1"));
    assert_eq!(again, record);
    again.sign(&dir(), &key("lake-2"));
    assert_eq!((again.lake_signatures().len(), again.info().signatures.len()), (2, 2));
}

#[test]
fn refusals() {
    let record = example(&table(&[STRING]));
    let whole = record.to_text(&dir());
    assert_eq!(PathRecord::parse(&dir(), whole.as_bytes()), Ok(record));
    let good = body(&whole);
    let line = |name: &str| good.lines().find(|line| line.starts_with(name)).expect("a line").to_owned() + "\n";
    let (manifest, strings, inline, sig) = (line(MANIFEST), line(STRINGS), line(TABLE), line(SIG));
    let other_table = format!("{TABLE}: {}\n", BASE64.encode(StringTable::default().encode()));
    let refused = [
        ("no manifest", good.replace(&manifest, "")),
        ("no table id", good.replace(&strings, "")),
        ("two manifests", good.replace(&manifest, &manifest.repeat(2))),
        ("two inline tables", good.replace(&inline, &inline.repeat(2))),
        ("another table inline", good.replace(&inline, &other_table)),
        ("a table that is none", good.replace(&inline, &format!("{TABLE}: AAAA\n"))),
        ("a field that nobody knows", format!("{good}X-Narlake-More: 1\n")),
        ("a signature twice", good.replace(&sig, &sig.repeat(2))),
        ("a signature that is none", good.replace(&sig, &format!("{SIG}: lake-1\n"))),
        ("another order", good.replace(&manifest, "").replace(&strings, &format!("{strings}{manifest}"))),
        ("another URL", good.replace("URL: nar/0", "URL: nar/1")),
        ("another compression", good.replace("Compression: none", "Compression: xz")),
        ("a file size", good.replace("NarHash", "FileSize: 17\nNarHash")),
        ("not a narinfo", good.replace("NarHash: ", "NarHash ")),
        ("cut off", good.trim_end().to_owned()),
    ];
    for (what, text) in refused {
        assert_ne!(text, good, "{what}");
        // Not for its checksum.
        let text = text.clone() + &checksum(&text);
        assert!(PathRecord::parse(&dir(), text.as_bytes()).is_err(), "{what}");
    }
    let sum = checksum(good);
    for (what, text) in [
        ("no checksum", good.to_owned()),
        ("two checksums", format!("{whole}{sum}")),
        ("lines behind it", format!("{whole}X-Narlake-More: 1\n")),
        ("that of another text", format!("{good}{}", checksum(&whole))),
    ] {
        assert!(PathRecord::parse(&dir(), text.as_bytes()).is_err(), "{what}");
    }
    let long = format!("{TABLE}: {}\n", BASE64.encode(long_table().encode()));
    let long = good.replace(&inline, &long).replace(&strings, &format!("{STRINGS}: {}\n", long_table().id()));
    let long = long.clone() + &checksum(&long);
    assert!(PathRecord::parse(&dir(), long.as_bytes()).is_err(), "a long table inline");
}

/// A record's text without its checksum.
fn body(text: &str) -> &str {
    text.split_at(text.rfind(CHECKSUM).expect("a checksum")).0
}

proptest! {
    #[test]
    fn parsing_is_the_inverse_of_writing(info in narinfo(), manifest in any::<[u8; 32]>(), long in any::<bool>(), sign in any::<bool>()) {
        let table = if long { long_table() } else { table(&[STRING]) };
        let mut record = PathRecord::new(info, ManifestId::from_bytes(manifest), &table);
        if sign {
            record.sign(&dir(), &key("lake-1"));
        }
        prop_assert_eq!(PathRecord::parse(&dir(), record.to_text(&dir()).as_bytes()), Ok(record));
    }

    /// No byte of it may change, whether a signature covers it or not.
    #[test]
    fn flipped_bits_and_cuts(at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<bool>()) {
        let mut text = example(&table(&[STRING])).to_text(&dir()).into_bytes();
        let at = at.index(text.len());
        if cut { text.truncate(at) } else { text[at] ^= 1 << bit }
        prop_assert!(PathRecord::parse(&dir(), &text).is_err());
    }

    /// What is read is what would be written.
    #[test]
    fn one_spelling(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let whole = example(&table(&[STRING])).to_text(&dir());
        let mut text = body(&whole).as_bytes().to_vec();
        let at = at.index(text.len());
        text[at] = byte;
        if let Ok(text) = String::from_utf8(text) {
            let text = text.clone() + &checksum(&text);
            if let Ok(record) = PathRecord::parse(&dir(), text.as_bytes()) {
                prop_assert_eq!(record.to_text(&dir()), text);
            }
        }
    }
}
