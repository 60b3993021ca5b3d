use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::limits::{DEPTH_MAX, NAR_SIZE_MAX, TARGET_MAX};

/// A tree to write; what the events of a NAR are compared as.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Tree {
    Directory(BTreeMap<Vec<u8>, Tree>),
    File(bool, Vec<u8>),
    Symlink(Vec<u8>),
}

impl Tree {
    fn put(&self, writer: &mut Writer, out: &mut Vec<u8>) -> Result<(), NarError> {
        match self {
            Self::Directory(entries) => {
                writer.event(Event::Directory, out)?;
                for (name, tree) in entries {
                    writer.event(Event::Entry { name }, out)?;
                    tree.put(writer, out)?;
                }
                writer.event(Event::EndDirectory, out)
            }
            Self::File(executable, content) => {
                writer.event(Event::File { executable: *executable, size: content.len() as u64 }, out)?;
                if !content.is_empty() {
                    writer.event(Event::Data(content), out)?;
                }
                writer.event(Event::EndFile, out)
            }
            Self::Symlink(target) => writer.event(Event::Symlink { target }, out),
        }
    }

    fn to_nar(&self) -> Vec<u8> {
        let (mut writer, mut out) = (Writer::new(), Vec::new());
        self.put(&mut writer, &mut out).unwrap();
        writer.finish().unwrap();
        assert_eq!(writer.offset(), out.len() as u64);
        out
    }
}

/// An event that outlives the input, with neighbouring data joined.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Owned {
    Directory,
    Entry(Vec<u8>),
    EndDirectory,
    File(bool, u64),
    Data(Vec<u8>),
    EndFile,
    Symlink(Vec<u8>),
}

/// Reads pieces and, on the way, writes the events again.
fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(Vec<Owned>, Vec<u8>), NarError> {
    let (mut reader, mut writer) = (Reader::new(), Writer::new());
    let (mut events, mut copy) = (Vec::new(), Vec::new());
    for piece in pieces {
        reader.feed(piece, &mut |event| {
            writer.event(event, &mut copy)?;
            let event = match event {
                Event::Directory => Owned::Directory,
                Event::Entry { name } => Owned::Entry(name.into()),
                Event::EndDirectory => Owned::EndDirectory,
                Event::File { executable, size } => Owned::File(executable, size),
                Event::Data(data) => {
                    assert!(!data.is_empty());
                    if let Some(Owned::Data(before)) = events.last_mut() {
                        before.extend_from_slice(data);
                        return Ok(());
                    }
                    Owned::Data(data.into())
                }
                Event::EndFile => Owned::EndFile,
                Event::Symlink { target } => Owned::Symlink(target.into()),
            };
            events.push(event);
            Ok::<(), NarError>(())
        })?;
    }
    reader.finish()?;
    writer.finish()?;
    assert!(reader.is_finished());
    assert_eq!(reader.offset(), copy.len() as u64);
    Ok((events, copy))
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let special = proptest::sample::select(vec![&b"..."[..], b"a", b"a-b", b"a.b", b"A", b"\xff\xfe", b" ", b"\n"]);
    let any = vec(any::<u8>(), 1..12).prop_filter("valid", |name| is_entry_name(name));
    prop_oneof![special.prop_map(<[u8]>::to_vec), any, Just(vec![b'n'; NAME_MAX])]
}

fn tree() -> impl Strategy<Value = Tree> {
    let target = vec(1_u8.., 1..20);
    let leaf = prop_oneof![
        (any::<bool>(), vec(any::<u8>(), 0..40)).prop_map(|(executable, content)| Tree::File(executable, content)),
        target.prop_map(Tree::Symlink),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| btree_map(name(), inner, 0..4).prop_map(Tree::Directory))
}

/// The tokens of a NAR, written by hand: words separated by spaces; `""` is the empty string, `<n>` a bare length word.
fn tokens(words: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for word in words.split_whitespace() {
        if let Some(number) = word.strip_prefix('<').and_then(|word| word.strip_suffix('>')) {
            out.extend_from_slice(&number.parse::<u64>().unwrap().to_le_bytes());
            continue;
        }
        let word = if word == "\"\"" { "" } else { word };
        out.extend_from_slice(&(word.len() as u64).to_le_bytes());
        out.extend_from_slice(word.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

#[test]
fn layout() {
    let script = Tree::File(true, b"#!".into());
    let words = "nix-archive-1 ( type regular executable \"\" contents #! )";
    assert_eq!(script.to_nar(), tokens(words));
    let link = Tree::Symlink(b"target/of-it".into());
    let words = "nix-archive-1 ( type symlink target target/of-it )";
    assert_eq!(link.to_nar(), tokens(words));
    let tree = Tree::Directory([(b"a".into(), Tree::File(false, b"".into())), (b"b".into(), link)].into());
    let words = "nix-archive-1 ( type directory \
                 entry ( name a node ( type regular contents \"\" ) ) \
                 entry ( name b node ( type symlink target target/of-it ) ) )";
    assert_eq!(tree.to_nar(), tokens(words));
    assert_eq!(Tree::Directory(BTreeMap::new()).to_nar(), tokens("nix-archive-1 ( type directory )"));
}

#[track_caller]
fn refused(nar: &[u8]) -> NarError {
    let error = read([nar]).unwrap_err();
    // The pieces make no difference to what is found wrong, or where.
    assert_eq!(read(nar.chunks(1)).unwrap_err(), error);
    error
}

#[test]
fn grammar() {
    // Each token that is wrong is named with the offset at which it starts.
    for (words, expected, offset) in [
        ("nix-archive-2", "\"nix-archive-1\"", 0),
        ("nix-archive-1 )", "\"(\"", 24),
        ("nix-archive-1 ( Type", "\"type\"", 40),
        ("nix-archive-1 ( type fifo )", "\"regular\", \"symlink\" or \"directory\"", 56),
        ("nix-archive-1 ( type regular )", "\"executable\" or \"contents\"", 72),
        ("nix-archive-1 ( type regular executable yes contents a )", "empty string", 96),
        ("nix-archive-1 ( type regular executable \"\" executable", "\"contents\"", 104),
        ("nix-archive-1 ( type regular contents a contents", "\")\"", 104),
        ("nix-archive-1 ( type symlink )", "\"target\"", 72),
        ("nix-archive-1 ( type symlink target \"\" )", "symlink target", 88),
        ("nix-archive-1 ( type symlink target a target", "\")\"", 104),
        ("nix-archive-1 ( type directory contents", "\"entry\" or \")\"", 80),
        ("nix-archive-1 ( type directory entry )", "\"(\"", 96),
        ("nix-archive-1 ( type directory entry ( node", "\"name\"", 112),
        ("nix-archive-1 ( type directory entry ( name a name", "\"node\"", 144),
        ("nix-archive-1 ( type directory entry ( name a node ( type directory ) entry", "\")\"", 232),
    ] {
        assert_eq!(refused(&tokens(words)), NarError::Syntax { expected, offset }, "{words}");
    }
    // A symlink that holds NUL.
    let mut nar = tokens("nix-archive-1 ( type symlink target abc )");
    nar[97] = 0;
    assert_eq!(refused(&nar), NarError::Syntax { expected: "symlink target", offset: 88 });
    let mut nar = tokens("nix-archive-1 ( type directory )");
    nar.push(0);
    let offset = nar.len() as u64 - 1;
    assert_eq!(refused(&nar), NarError::Trailing { offset });
    assert_eq!(refused(&[]), NarError::Truncated { offset: 0 });
}

#[test]
fn padding_is_zero() {
    let nar = tokens("nix-archive-1 ( type regular contents abc )");
    for (offset, byte) in nar.iter().enumerate() {
        // Padding is what follows a string up to a multiple of 8; the rest of the zeros are length words.
        let is_padding = matches!(offset, 21..24 | 33..40 | 52..56 | 71 | 99..104 | 113..120);
        if is_padding {
            assert_eq!(*byte, 0);
            let mut nar = nar.clone();
            nar[offset] = 1;
            assert_eq!(refused(&nar), NarError::Syntax { expected: "zero padding", offset: offset as u64 });
        }
    }
}

#[test]
fn names() {
    let entry = |name: &[u8]| {
        let mut nar = tokens("nix-archive-1 ( type directory entry ( name");
        nar.extend_from_slice(&(name.len() as u64).to_le_bytes());
        nar.extend_from_slice(name);
        nar.resize(nar.len().next_multiple_of(8), 0);
        nar.extend(tokens("node ( type directory ) ) )"));
        nar
    };
    for valid in [&b"a"[..], b"...", b".a", b"\xff", b"a\\b", &[b'a'; NAME_MAX]] {
        assert!(read([&entry(valid)[..]]).is_ok(), "{valid:?}");
    }
    for invalid in [&b""[..], b".", b"..", b"/", b"a/b", b"../a", b"a\0", b"\0"] {
        assert_eq!(refused(&entry(invalid)), NarError::Name { name: invalid.into(), offset: 128 }, "{invalid:?}");
    }
    let long = NAME_MAX as u64 + 1;
    let limit = NarError::Limit { what: "length of entry name", value: long, max: long - 1, offset: 128 };
    assert_eq!(refused(&entry(&[b'a'; NAME_MAX + 1])), limit);
    // Refused at the length word: the reader does not wait for what is claimed.
    assert_eq!(refused(&tokens(&format!("nix-archive-1 ( type directory entry ( name <{long}>"))), limit);

    for (first, second) in [("b", "a"), ("a", "a"), ("aa", "a"), ("a", "B"), ("a.b", "a-b")] {
        let nar = tokens(&format!(
            "nix-archive-1 ( type directory entry ( name {first} node ( type directory ) ) \
             entry ( name {second} node ( type directory ) ) )"
        ));
        assert!(matches!(refused(&nar), NarError::Order { .. }), "{first} {second}");
    }
}

#[test]
fn limits() {
    let long = TARGET_MAX as u64 + 1;
    let limit = NarError::Limit { what: "length of symlink target", value: long, max: long - 1, offset: 88 };
    assert_eq!(refused(&tokens(&format!("nix-archive-1 ( type symlink target <{long}>"))), limit);
    assert!(read([&Tree::Symlink(vec![b't'; TARGET_MAX]).to_nar()[..]]).is_ok());

    for size in [NAR_SIZE_MAX + 1, u64::MAX, NAR_SIZE_MAX - 87] {
        let nar = tokens(&format!("nix-archive-1 ( type regular contents <{size}>"));
        assert!(matches!(refused(&nar), NarError::Limit { .. }), "{size}");
    }

    let nested = |depth: usize| {
        let inner = Tree::Directory(BTreeMap::new());
        (1..depth).fold(inner, |tree, _| Tree::Directory([(b"d".into(), tree)].into()))
    };
    assert!(read([&nested(DEPTH_MAX).to_nar()[..]]).is_ok());
    let nar = tokens(&format!("nix-archive-1 {}", "( type directory entry ( name d node ".repeat(DEPTH_MAX + 1)));
    assert!(matches!(refused(&nar), NarError::Limit { what: "depth", .. }));
}

#[test]
fn a_failed_reader_stays_failed() {
    let nar = Tree::File(false, b"abc".into()).to_nar();
    let mut reader = Reader::new();
    let stop = reader.feed(&nar, &mut |event| match event {
        Event::Data(_) => Err(NarError::Trailing { offset: 7 }),
        _ => Ok(()),
    });
    assert_eq!(stop, Err(NarError::Trailing { offset: 7 }));
    assert!(matches!(reader.feed(b"", &mut |_| Ok(())), Err(NarError::Failed { .. })));
    assert!(matches!(reader.finish(), Err(NarError::Failed { .. })));
}

#[test]
fn the_writer_takes_trees_only() {
    use Event::{Data, Directory, EndDirectory, EndFile, Entry, File, Symlink};
    let a = Entry { name: b"a" };
    let file = File { executable: false, size: 1 };
    let link = Symlink { target: b"t" };
    let valid: [&[Event<'_>]; 4] =
        [&[link], &[Directory, EndDirectory], &[file, Data(b"x"), EndFile], &[Directory, a, link, EndDirectory]];
    let run = |events: &[Event<'_>]| -> Result<(), NarError> {
        let mut writer = Writer::new();
        events.iter().try_for_each(|event| writer.event(*event, &mut Vec::new()))?;
        writer.finish()
    };
    for events in valid {
        assert_eq!(run(events), Ok(()));
        for length in 0..events.len() {
            assert!(run(&events[..length]).is_err());
        }
        assert!(run(&[events, &[link]].concat()).is_err());
    }
    let invalid: [&[Event<'_>]; 13] = [
        &[a],
        &[EndDirectory],
        &[EndFile],
        &[Data(b"x")],
        &[Directory, link],
        &[Directory, Directory],
        &[Directory, a, EndDirectory],
        &[Directory, a, a],
        &[Directory, a, link, a],
        &[file, EndFile],
        &[file, Data(b"xy")],
        &[Directory, Entry { name: b".." }],
        &[Symlink { target: b"" }],
    ];
    for events in invalid {
        let (mut writer, mut out) = (Writer::new(), Vec::new());
        let result = events.iter().try_for_each(|event| writer.event(*event, &mut out));
        assert!(result.is_err(), "{events:?}");
        assert!(matches!(writer.event(link, &mut out), Err(NarError::Failed { .. })));
        assert!(matches!(writer.skip(0), Err(NarError::Failed { .. })));
        assert!(writer.finish().is_err());
    }
}

#[test]
fn skipped_content_counts() {
    let nar = Tree::File(false, vec![7; 13]).to_nar();
    let (mut writer, mut out) = (Writer::new(), Vec::new());
    writer.event(Event::File { executable: false, size: 13 }, &mut out).unwrap();
    assert_eq!(nar[..out.len()], out);
    assert_eq!(writer.offset(), out.len() as u64);
    assert_eq!(nar[out.len()..][..13], [7; 13]);
    writer.skip(6).unwrap();
    writer.skip(7).unwrap();
    writer.event(Event::EndFile, &mut out).unwrap();
    assert_eq!(writer.offset(), nar.len() as u64);
    assert_eq!(out.len() + 13, nar.len());

    let mut writer = Writer::new();
    writer.event(Event::File { executable: false, size: 13 }, &mut out).unwrap();
    assert!(writer.skip(14).is_err());
}

proptest! {
    #[test]
    fn round_trip(tree in tree()) {
        let nar = tree.to_nar();
        prop_assert_eq!(read([&nar[..]]).unwrap().1, nar);
    }

    #[test]
    fn pieces_make_no_difference(tree in tree(), cuts in vec(0..4096_usize, 0..20)) {
        let nar = tree.to_nar();
        let whole = read([&nar[..]]).unwrap();
        prop_assert_eq!(&read(nar.chunks(1)).unwrap(), &whole);
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut % (nar.len() + 1)).chain([0, nar.len()]).collect();
        cuts.sort_unstable();
        prop_assert_eq!(&read(cuts.windows(2).map(|cut| &nar[cut[0]..cut[1]])).unwrap(), &whole);
    }

    #[test]
    fn every_truncation_is_an_error(tree in tree()) {
        let nar = tree.to_nar();
        for length in 0..nar.len() {
            prop_assert_eq!(read([&nar[..length]]).unwrap_err(), NarError::Truncated { offset: length as u64 });
        }
    }

    #[test]
    fn every_bit_counts(tree in tree()) {
        let mut nar = tree.to_nar();
        let whole = read([&nar[..]]).unwrap().0;
        for bit in 0..nar.len() * 8 {
            nar[bit / 8] ^= 1 << (bit % 8);
            if let Ok((events, copy)) = read([&nar[..]]) {
                prop_assert_ne!(&events, &whole);
                prop_assert_eq!(&copy, &nar);
            }
            nar[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
