//! Scrubbing against the rule as it is written down, and restoring against what was there.

use proptest::prelude::*;

use super::*;
use crate::id::FileId;

const HASH: &str = "0123456789abcdfghijklmnpqrsvwxyz";
const OTHER: &str = "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz";

/// One file or target: scrubbed bytes and patches.
type Scrubbed = (Vec<u8>, Vec<Patch>);

/// Scrubs the files of one store object, each in pieces that end at these offsets.
fn scrub(dir: &StoreDir, files: &[&[u8]], cuts: &[usize]) -> (Vec<Scrubbed>, StringTable) {
    let mut scrubber = Scrubber::new(dir);
    let mut scrubbed = Vec::new();
    for file in files {
        let (mut out, mut patches) = (Vec::new(), Vec::new());
        let mut start = 0;
        for cut in cuts.iter().map(|cut| cut % (file.len() + 1)).chain([file.len()]) {
            if cut >= start {
                scrubber.write(&file[start..cut], &mut out, &mut patches);
                assert!(out.len() + scrubber.held_max() >= cut, "bytes held back");
                start = cut;
            }
        }
        scrubber.end(&mut out, &mut patches);
        scrubbed.push((out, patches));
    }
    (scrubbed, scrubber.finish())
}

/// The rule, written down with no thought of speed or streaming.
fn naive(dir: &StoreDir, files: &[&[u8]]) -> (Vec<Scrubbed>, StringTable) {
    let prefix = format!("{}/", dir.as_str()).into_bytes();
    let mut strings: Vec<Vec<u8>> = Vec::new();
    let mut scrubbed = Vec::new();
    for file in files {
        let (mut out, mut patches) = (file.to_vec(), Vec::new());
        let (mut at, mut end) = (0, 0);
        while at < file.len() {
            let rest = &file[at..];
            let mut found = None;
            if rest.starts_with(&prefix) {
                let hash_at = at + prefix.len();
                let hash = file[hash_at..].iter().take_while(|b| is_digit(**b)).count();
                let name = file[hash_at..].get(33..).unwrap_or_default();
                let name = name.iter().take_while(|b| is_name_byte(**b)).count().min(211);
                if hash >= 32 && file.get(hash_at + 32) == Some(&b'-') && name > 0 {
                    let string = file[hash_at..hash_at + 33 + name].to_vec();
                    let number = strings.iter().position(|known| *known == string);
                    let number = number.or_else(|| {
                        (strings.len() < STRINGS_MAX).then(|| {
                            strings.push(string.clone());
                            strings.len() - 1
                        })
                    });
                    found = number.map(|number| (hash_at, string.len(), number, false));
                }
            }
            if found.is_none() && rest.len() >= 32 {
                let first = strings.iter().position(|known| known[..32] == rest[..32]);
                found = first.map(|number| (at, 32, number, true));
            }
            let Some((start, length, number, hash_only)) = found else {
                at += 1;
                continue;
            };
            for (i, byte) in out[start..start + length].iter_mut().enumerate() {
                if i != 32 {
                    *byte = PLACEHOLDER;
                }
            }
            patches.push(Patch { gap: (start - end) as u64, string: u32::try_from(number).expect("small"), hash_only });
            at = start + length;
            end = at;
        }
        scrubbed.push((out, patches));
    }
    let mut table = StringTableBuilder::default();
    for string in &strings {
        table.push(&[string]);
    }
    (scrubbed, table.finish())
}

/// Restores in one go, in windows of seven bytes, and chunk by chunk; all must agree.
fn restore(scrubbed: &[u8], patches: &[Patch], table: &StringTable, chunk_length: usize) -> Vec<u8> {
    let list = PatchList::resolve(patches, table, scrubbed.len() as u64).expect("patches of this file");
    let mut whole = scrubbed.to_vec();
    list.restore(0, &mut whole);
    let mut windows = scrubbed.to_vec();
    for (number, window) in windows.chunks_mut(7).enumerate() {
        list.restore(7 * number as u64, window);
    }
    assert_eq!(windows, whole);
    for (number, window) in windows.chunks_mut(7).enumerate() {
        assert!(list.take_out(7 * number as u64, window));
    }
    assert_eq!(windows, scrubbed);
    for (offset, bytes) in list.iter().take(3) {
        let mut wrong = whole.clone();
        wrong[usize::try_from(offset).unwrap() + bytes.len() - 1] ^= 1;
        assert!(!list.take_out(0, &mut wrong));
    }
    let mut chunks = scrubbed.to_vec();
    let mut restorer = Restorer::new(table);
    let places: Vec<u64> = list.iter().map(|(offset, _)| offset).collect();
    for (number, chunk) in chunks.chunks_mut(chunk_length).enumerate() {
        let start = (number * chunk_length) as u64;
        let from = places.partition_point(|offset| *offset < start);
        let to = places.partition_point(|offset| *offset < start + chunk.len() as u64);
        restorer.chunk(chunk, &patches[from..to]).expect("patches of this chunk");
    }
    restorer.finish().expect("patches of this file");
    assert_eq!(chunks, whole);
    whole
}

/// Checks one file against what should become of it, where `#` stands for what was taken out.
#[track_caller]
fn check(input: &str, expected: &str, strings: &[&str]) {
    check_files(&[input], &[expected], strings);
}

#[track_caller]
fn check_files(inputs: &[&str], expected: &[&str], strings: &[&str]) {
    let dir = StoreDir::default();
    let inputs: Vec<&[u8]> = inputs.iter().map(|input| input.as_bytes()).collect();
    let (scrubbed, table) = scrub(&dir, &inputs, &[]);
    for ((out, patches), (input, expected)) in scrubbed.iter().zip(inputs.iter().zip(expected)) {
        assert_eq!(String::from_utf8_lossy(out), *expected);
        assert_eq!(restore(out, patches, &table, 5), *input);
    }
    assert_eq!(table.iter().map(String::from_utf8_lossy).collect::<Vec<_>>(), strings);
    assert_eq!(naive(&dir, &inputs), (scrubbed, table));
}

fn blank(length: usize) -> String {
    "#".repeat(length)
}

#[test]
fn a_store_path_is_blanked() {
    let input = format!("see /nix/store/{HASH}-hello-2.12/bin/hello!");
    let expected = format!("see /nix/store/{}-{}/bin/hello!", blank(32), blank(10));
    check(&input, &expected, &[&format!("{HASH}-hello-2.12")]);
}

#[test]
fn at_the_end_of_a_file() {
    check(&format!("/nix/store/{HASH}-a"), &format!("/nix/store/{}-#", blank(32)), &[&format!("{HASH}-a")]);
}

#[test]
fn what_is_not_a_store_path_stays() {
    let stays = [
        String::new(),
        "/nix/store".to_owned(),
        "/nix/store/".to_owned(),
        format!("/nix/store/{HASH}"),
        format!("/nix/store/{HASH}-"),
        format!("/nix/store/{HASH}-/x"),
        format!("/nix/store/{HASH}/x"),
        format!("/nix/store/{HASH}0-x"),
        format!("/nix/store/{}-x", &HASH[1..]),
        format!("/nix/store/{}-x", HASH.to_uppercase()),
        format!("/nix/store/{}e-x", &HASH[1..]),
        format!("/nix/stores/{HASH}-x"),
        format!("/nix/store//{HASH}-x"),
        format!("{HASH}-x"),
    ];
    for input in stays {
        check(&input, &input, &[]);
    }
}

#[test]
fn a_prefix_may_start_inside_another() {
    check(
        &format!("/nix/store/nix/store/{HASH}-x"),
        &format!("/nix/store/nix/store/{}-#", blank(32)),
        &[&format!("{HASH}-x")],
    );
}

#[test]
fn names_are_cut_at_their_longest() {
    let name = "n".repeat(211);
    check(
        &format!("/nix/store/{HASH}-{name}nnn"),
        &format!("/nix/store/{}-{}nnn", blank(32), blank(211)),
        &[&format!("{HASH}-{name}")],
    );
}

#[test]
fn bare_hashes_count_once_they_are_known() {
    let path = format!("/nix/store/{HASH}-x");
    let blanked = format!("/nix/store/{}-#", blank(32));
    check(
        &format!("{HASH} {path} {HASH} {HASH}0 0{HASH} {OTHER}"),
        &format!("{HASH} {blanked} {} {}0 0{} {OTHER}", blank(32), blank(32), blank(32)),
        &[&format!("{HASH}-x")],
    );
    // They stay known in the next file, and matches do not go on into it.
    check_files(
        &[&path, HASH, &HASH[..16], &HASH[16..], "/nix/store/", &format!("{HASH}-x")],
        &[&blanked, &blank(32), &HASH[..16], &HASH[16..], "/nix/store/", &format!("{}-x", blank(32))],
        &[&format!("{HASH}-x")],
    );
}

/// Samples of every eighth byte must not miss one, wherever it starts and whatever stands around it.
#[test]
fn bare_hashes_at_every_offset() {
    let (path, blanked) = (format!("/nix/store/{HASH}-x"), format!("/nix/store/{}-#", blank(32)));
    for (before, after) in [(".", "."), ("0", "."), (".", "0"), ("0", "0"), ("0.", ".0"), ("0000000.", "0000000.")] {
        for offset in 0..100 {
            for behind in [0, 1, 31, 32, 63] {
                let around = |hash: &str| {
                    let (before, after) = (before.repeat(offset), after.repeat(behind));
                    format!("{}{hash}{}", &before[..offset], &after[..behind])
                };
                check_files(&[&path, &around(HASH)], &[&blanked, &around(&blank(32))], &[&format!("{HASH}-x")]);
            }
        }
    }
}

#[test]
fn a_known_hash_without_a_name_is_bare() {
    check(
        &format!("/nix/store/{HASH}-x /nix/store/{HASH}/y /nix/store/{HASH}"),
        &format!("/nix/store/{}-# /nix/store/{}/y /nix/store/{}", blank(32), blank(32), blank(32)),
        &[&format!("{HASH}-x")],
    );
}

/// A bare hash refers to the first string that has it.
#[test]
fn one_hash_two_names() {
    let input = format!("/nix/store/{HASH}-x /nix/store/{HASH}-xy /nix/store/{HASH}-x {HASH}");
    let (scrubbed, table) = scrub(&StoreDir::default(), &[input.as_bytes()], &[]);
    let numbers: Vec<_> = scrubbed[0].1.iter().map(|patch| (patch.string, patch.hash_only)).collect();
    assert_eq!(numbers, [(0, false), (1, false), (0, false), (0, true)]);
    assert_eq!(table.len(), 2);
}

#[test]
fn the_leftmost_of_overlapping_hashes_wins() {
    let shifted = format!("{}0", &HASH[1..]);
    let input = format!("/nix/store/{HASH}-x /nix/store/{shifted}-y {HASH}0 {shifted}");
    let expected = format!("/nix/store/{}-# /nix/store/{}-# {}0 {}", blank(32), blank(32), blank(32), blank(32));
    check(&input, &expected, &[&format!("{HASH}-x"), &format!("{shifted}-y")]);
}

#[test]
fn another_store_directory() {
    let dir: StoreDir = "/opt/store".parse().expect("a store directory");
    let input = format!("/nix/store/{HASH}-x /opt/store/{HASH}-y");
    let (scrubbed, table) = scrub(&dir, &[input.as_bytes()], &[]);
    assert_eq!(table.iter().collect::<Vec<_>>(), [format!("{HASH}-y").as_bytes()]);
    assert_eq!(scrubbed[0].1, [Patch { gap: 57, string: 0, hash_only: false }]);
}

/// What looks like a placeholder in a file is content like any other.
#[test]
fn placeholders_of_the_file_itself() {
    let blanked = format!("/nix/store/{}-#", blank(32));
    check(&blanked, &blanked, &[]);
}

/// Beyond the last string that the table takes, new ones stay in the content and their hashes unknown.
#[test]
fn a_full_table() {
    let nth = |n: usize| {
        let digits: Vec<u8> = (0..32).map(|i| crate::nix::base32::ALPHABET[n >> (5 * i).min(60) & 31]).collect();
        String::from_utf8(digits).expect("ASCII")
    };
    let mut file = Vec::new();
    for n in 0..STRINGS_MAX {
        file.extend_from_slice(format!("/nix/store/{}-n\n", nth(n)).as_bytes());
    }
    let tail_at = file.len();
    let (new, old) = (nth(STRINGS_MAX), nth(17));
    let tail = format!("/nix/store/{new}-n {new} /nix/store/{old}-new {old} /nix/store/{old}-n");
    file.extend_from_slice(tail.as_bytes());
    let (scrubbed, table) = scrub(&StoreDir::default(), &[&file], &[1 << 20, 2 << 20]);
    assert_eq!(table.len(), STRINGS_MAX);
    let expected =
        format!("/nix/store/{new}-n {new} /nix/store/{}-new {} /nix/store/{}-#", blank(32), blank(32), blank(32));
    assert_eq!(String::from_utf8_lossy(&scrubbed[0].0[tail_at..]), expected);
    assert_eq!(restore(&scrubbed[0].0, &scrubbed[0].1, &table, 4096), file);
    assert!(table.encode().len() <= crate::limits::TABLE_MAX);
    assert_eq!(StringTable::decode(&table.encode()), Ok(table));
}

#[test]
fn resolving_refuses_what_does_not_fit() {
    let (scrubbed, table) = scrub(&StoreDir::default(), &[format!("/nix/store/{HASH}-x").as_bytes()], &[]);
    let patch = scrubbed[0].1[0];
    let size = scrubbed[0].0.len() as u64;
    assert!(PatchList::resolve(&[patch], &table, size).is_ok());
    let refused: [(&[Patch], u64); 4] = [
        (&[patch], size - 1),
        (&[Patch { string: 1, ..patch }], size),
        (&[Patch { gap: u64::MAX, ..patch }], u64::MAX),
        (&[patch, patch], size),
    ];
    for (patches, size) in refused {
        assert!(PatchList::resolve(patches, &table, size).is_err(), "{patches:?} in {size} bytes");
    }
    // A patch belongs to the chunk that it starts in, and ends inside the file.
    let mut chunk = [0; 11];
    let mut restorer = Restorer::new(&table);
    assert!(restorer.clone().chunk(&mut chunk, &[patch]).is_err());
    assert!(restorer.chunk(&mut chunk, &[]).is_ok());
    assert!(restorer.chunk(&mut chunk, &[patch]).is_ok());
    assert!(restorer.clone().chunk(&mut chunk, &[Patch { gap: 0, ..patch }]).is_err());
    assert!(restorer.finish().is_err());
}

#[test]
fn content_ids() {
    let file = FileId::of(b"scrubbed");
    assert_eq!(PatchList::default().content_id(&file), file.into());
    let (scrubbed, table) = scrub(&StoreDir::default(), &[format!("/nix/store/{HASH}-x").as_bytes()], &[]);
    let list = PatchList::resolve(&scrubbed[0].1, &table, 45).expect("patches of this file");
    let mut hasher = crate::id::PatchedFileHasher::new(&file);
    hasher.patch(11, format!("{HASH}-x").as_bytes());
    assert_eq!(list.content_id(&file), hasher.finish());
}

/// Store directories: the usual one, and those that could be confused with a hash or a name.
const DIRS: &[&str] = &["/nix/store", "/0123456789abcdfghijklmnpqrsvwxyz", "/0", "/n"];

/// Pieces that files are made of, so that most of what matters happens within a few hundred bytes.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    const HASHES: &[&str] = &[HASH, OTHER, "0000000000000000000000000000000z", "123456789abcdfghijklmnpqrsvwxyz0"];
    prop_oneof![
        4 => Just(b"/nix/store/".to_vec()),
        1 => Just(format!("/{HASH}/").into_bytes()),
        4 => prop::sample::select(HASHES).prop_map(|hash| hash.as_bytes().to_vec()),
        1 => (1..32_usize).prop_map(|n| HASH.as_bytes()[..n].to_vec()),
        1 => (1..11_usize).prop_map(|n| b"/nix/store/"[..n].to_vec()),
        1 => prop_oneof![Just(b"/0/".to_vec()), Just(b"/n/".to_vec())],
        3 => Just(b"-".to_vec()),
        3 => "[a-z0-9.+_?=-]{1,12}".prop_map(String::into_bytes),
        1 => (200..220_usize).prop_map(|n| vec![b'n'; n]),
        2 => prop::sample::select(&b"/ \0z0#e"[..]).prop_map(|byte| vec![byte]),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

fn file() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(piece(), 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Equal to the rule, whatever the writes; and nothing is lost.
    #[test]
    fn streaming_is_the_rule(
        files in prop::collection::vec(file(), 1..4),
        cuts in prop::collection::btree_set(0..2000_usize, 0..8),
        chunk_length in 1..300_usize,
        dir in prop::sample::select(DIRS),
    ) {
        let dir: StoreDir = dir.parse().expect("a store directory");
        let files: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
        let cuts: Vec<usize> = cuts.into_iter().collect();
        let expected = naive(&dir, &files);
        let (scrubbed, table) = scrub(&dir, &files, &cuts);
        prop_assert_eq!(&(scrubbed.clone(), table.clone()), &expected);
        for ((out, patches), file) in scrubbed.iter().zip(&files) {
            prop_assert_eq!(&restore(out, patches, &table, chunk_length), file);
        }
    }

    #[test]
    fn byte_by_byte(file in file(), dir in prop::sample::select(DIRS)) {
        let dir: StoreDir = dir.parse().expect("a store directory");
        let cuts: Vec<usize> = (0..file.len()).collect();
        prop_assert_eq!(scrub(&dir, &[&file], &cuts), naive(&dir, &[&file]));
    }
}
