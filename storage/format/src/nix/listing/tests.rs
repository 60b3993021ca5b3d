use super::*;

/// A small tree: `a` an executable of three bytes, `d` an empty directory, `l` a symlink.
fn events() -> Vec<Event<'static>> {
    vec![
        Event::Directory,
        Event::Entry { name: b"a" },
        Event::File { executable: true, size: 3 },
        Event::Data(b"abc"),
        Event::EndFile,
        Event::Entry { name: b"d" },
        Event::Directory,
        Event::EndDirectory,
        Event::Entry { name: b"l" },
        Event::Symlink { target: b"a \"b\"\n" },
        Event::EndDirectory,
    ]
}

const TEXT: &str = concat!(
    r#"{"root":{"entries":{"a":{"executable":true,"narOffset":264,"size":3,"type":"regular"},"#,
    r#""d":{"entries":{},"type":"directory"},"l":{"target":"a \"b\"\n","type":"symlink"}},"#,
    r#""type":"directory"},"version":1}"#
);

fn write(events: &[Event<'_>]) -> Result<String, ListingError> {
    let (mut writer, mut out) = (ListingWriter::new(), Vec::new());
    for event in events {
        writer.event(*event, &mut out)?;
    }
    writer.finish()?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn text() {
    assert_eq!(write(&events()).unwrap(), TEXT);
    // Content is not needed.
    let without: Vec<_> = events().into_iter().filter(|event| !matches!(event, Event::Data(_))).collect();
    assert_eq!(write(&without).unwrap(), TEXT);
    let root = r#"{"root":{"narOffset":96,"size":0,"type":"regular"},"version":1}"#;
    assert_eq!(write(&[Event::File { executable: false, size: 0 }, Event::EndFile]).unwrap(), root);
}

#[test]
fn tree() {
    let Listing { root } = Listing::parse(TEXT.as_bytes()).unwrap();
    assert_eq!(root.get("/a"), Some(&Node::Regular { size: 3, executable: true, nar_offset: Some(264) }));
    assert_eq!(root.get("l"), Some(&Node::Symlink { target: "a \"b\"\n".into() }));
    assert_eq!(root.get("d/"), Some(&Node::Directory { entries: BTreeMap::new() }));
    assert_eq!(root.get(""), Some(&root));
    assert_eq!((root.get("a/b"), root.get("x")), (None, None));
}

#[test]
fn refusals() {
    let not_utf8 = [Event::Directory, Event::Entry { name: b"\xff" }];
    assert_eq!(write(&not_utf8), Err(ListingError::NotUtf8 { text: b"\xff"[..].into() }));
    assert!(matches!(write(&[Event::Symlink { target: b"\xff" }]), Err(ListingError::NotUtf8 { .. })));
    assert!(matches!(write(&events()[..3]), Err(ListingError::Tree { .. })));
    assert!(matches!(write(&[Event::EndFile]), Err(ListingError::Tree { .. })));
    let too_much = [Event::File { executable: false, size: 1 }, Event::Data(b"xy")];
    assert!(matches!(write(&too_much), Err(ListingError::Tree { .. })));

    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1", "\"v\":1"),
        ("\"a\":{", "\"..\":{"),
        ("\"a\":{", "\"a/b\":{"),
        ("\"a\":{", "\"\":{"),
        ("symlink", "fifo"),
        ("\"size\":3", "\"size\":-3"),
        ("\"size\":3,", ""),
        ("\"target\"", "\"entries\""),
    ] {
        assert!(Listing::parse(TEXT.replace(from, to).as_bytes()).is_err(), "{from} -> {to}");
    }
    for length in 0..TEXT.len() {
        assert!(Listing::parse(&TEXT.as_bytes()[..length]).is_err());
    }
    // Neither a deep nor an unfinished text exhausts the stack.
    assert!(Listing::parse("{\"root\":{\"type\":\"directory\",\"entries\":{\"a\":".repeat(10_000).as_bytes()).is_err());
}

#[test]
fn damage_never_panics() {
    let mut text = TEXT.as_bytes().to_vec();
    for bit in 0..text.len() * 8 {
        text[bit / 8] ^= 1 << (bit % 8);
        let _ = Listing::parse(&text);
        text[bit / 8] ^= 1 << (bit % 8);
    }
}
