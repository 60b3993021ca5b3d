//! Closures as Nix's database wants to know them, in parts that fit on a line.
//!
//! Nix believes what it is given here. So it is made of records that a trusted key signed and that every overlay shows,
//! and of whole closures only: where anything is missing, nothing is said. References come before what refers to them,
//! so that whatever part arrives is closed.

use std::collections::{HashMap, HashSet};
use std::vec;

use narlake_format::api::control::{ControlResponse, LINE_MAX};
use narlake_format::nix::registration::Registration;
use narlake_format::nix::store_path::{StoreDir, StorePathHash};

use super::ControlError;
use crate::trust::TrustedRecord;
use crate::view::Closures;

/// Bytes of a part, about: the last record goes beyond it.
const PAGE: usize = 1 << 20;

/// Longest record: ten thousand references of 256 bytes.
const RECORD: usize = 3 << 20;

// In JSON each end of a line takes two bytes; nothing else in the text is spelled longer.
const _: () = assert!(2 * (PAGE + RECORD) < LINE_MAX);

/// Missing paths that are named.
const NAMED: usize = 8;

/// The parts, in order. There is always one.
pub(super) struct Pages {
    dir: StoreDir,
    records: vec::IntoIter<TrustedRecord>,
    is_done: bool,
}

impl Pages {
    pub(super) fn new(dir: StoreDir, closures: Closures) -> Result<Self, ControlError> {
        let Closures { records, missing } = closures;
        if !missing.is_empty() {
            return Err(lacking(&missing));
        }
        let records = references_first(&records).map_err(|missing| lacking(&[missing]))?;
        Ok(Self { dir, records: records.into_iter(), is_done: false })
    }
}

impl Iterator for Pages {
    type Item = ControlResponse;

    fn next(&mut self) -> Option<ControlResponse> {
        if self.is_done {
            return None;
        }
        let mut text = String::with_capacity(PAGE.min(self.records.len().saturating_mul(1024)));
        for record in self.records.by_ref() {
            Registration::of(record.info()).write(&self.dir, &mut text);
            if text.len() >= PAGE {
                break;
            }
        }
        let left = self.records.len() as u64;
        self.is_done = left == 0;
        Some(ControlResponse::Registration { store_dir: self.dir.to_string(), text, left })
    }
}

fn lacking(missing: &[String]) -> ControlError {
    let some: Vec<&str> = missing.iter().take(NAMED).map(String::as_str).collect();
    let more = if missing.len() > NAMED { ", ..." } else { "" };
    ControlError::Missing { count: missing.len(), some: format!("{}{more}", some.join(", ")) }
}

/// The records, each once, after all that it refers to. Fails with a reference that is not among them.
fn references_first(records: &[TrustedRecord]) -> Result<Vec<TrustedRecord>, String> {
    let by_hash: HashMap<StorePathHash, &TrustedRecord> =
        records.iter().map(|record| (record.info().store_path.hash, record)).collect();
    let mut ordered = Vec::with_capacity(records.len());
    let mut seen = HashSet::with_capacity(records.len());
    // A path, and how many of its references have been followed. Not by recursion: chains are as long as closures.
    let mut way: Vec<(&TrustedRecord, usize)> = Vec::new();
    for record in records {
        if seen.insert(record.info().store_path.hash) {
            way.push((record, 0));
        }
        while let Some((record, followed)) = way.last_mut() {
            let Some(reference) = record.info().references.get(*followed) else {
                ordered.push((*record).clone());
                way.pop();
                continue;
            };
            *followed += 1;
            if seen.insert(reference.hash) {
                way.push((by_hash.get(&reference.hash).ok_or_else(|| reference.to_string())?, 0));
            }
        }
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use narlake_format::id::ManifestId;
    use narlake_format::lake::record::PathRecord;
    use narlake_format::lake::strings::StringTable;
    use narlake_format::nix::registration::{check_closed, parse};
    use narlake_format::nix::signature::SecretKey;
    use narlake_format::nix::store_path::StorePath;

    use super::*;
    use crate::trust::TrustedKeys;
    use crate::trust::tests::info;

    fn path(number: usize) -> StorePath {
        let mut hash = [7; 20];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        StorePath { hash: StorePathHash::from_bytes(hash), name: format!("library-{number}").parse().unwrap() }
    }

    fn record(number: usize, references: &[usize]) -> TrustedRecord {
        let key = SecretKey::generate("test-1", [7; 32]).unwrap();
        let keys = TrustedKeys::new(StoreDir::default(), vec![key.public()]);
        let info = info(path(number), references.iter().copied().map(path).collect());
        let mut record = PathRecord::new(info, ManifestId::of(b"manifest"), &StringTable::default());
        record.sign(keys.store_dir(), &key);
        keys.verify(record).unwrap()
    }

    fn pages(records: Vec<TrustedRecord>, missing: &[&str]) -> Result<Pages, ControlError> {
        let missing = missing.iter().map(ToString::to_string).collect();
        Pages::new(StoreDir::default(), Closures { records, missing })
    }

    fn text(pages: Pages) -> (String, Vec<u64>) {
        let (mut whole, mut lefts) = (String::new(), Vec::new());
        for page in pages {
            let ControlResponse::Registration { text, left, .. } = page else { panic!() };
            whole.push_str(&text);
            lefts.push(left);
        }
        (whole, lefts)
    }

    #[test]
    fn whatever_the_order_it_comes_in() {
        // A diamond with references to oneself, and a second root.
        let records =
            || vec![record(1, &[2, 3, 1]), record(2, &[4]), record(3, &[4, 2]), record(4, &[4]), record(5, &[1])];
        for turn in 0..5 {
            let mut records = records();
            records.rotate_left(turn);
            let (text, lefts) = text(pages(records, &[]).unwrap());
            let read = parse(&StoreDir::default(), text.as_bytes()).unwrap();
            assert_eq!((read.len(), check_closed(&read), lefts.as_slice()), (5, Ok(()), &[0][..]), "{text}");
        }
        assert_eq!(text(pages(vec![], &[]).unwrap()), (String::new(), vec![0]));
    }

    #[test]
    fn a_long_closure_comes_in_parts() {
        let before = |number: usize| (0..number).collect::<Vec<_>>();
        let many: Vec<TrustedRecord> = (0..250).map(|number| record(number, &before(number))).collect();
        let mut pages = pages(many, &[]).unwrap();
        let Some(ControlResponse::Registration { text: first, left, .. }) = pages.next() else { panic!() };
        assert!(left > 0 && first.len() < PAGE + RECORD);
        let (rest, lefts) = text(pages);
        assert!(lefts.last() == Some(&0) && lefts.windows(2).all(|two| two[1] < two[0]), "{lefts:?}");
        assert_eq!(parse(&StoreDir::default(), (first + &rest).as_bytes()).unwrap().len(), 250);
    }

    #[test]
    fn nothing_of_what_is_not_whole() {
        for (records, missing, named) in [
            (vec![record(1, &[])], &["gone-1"][..], "gone-1"),
            (vec![record(1, &[2])], &[], "library-2"),
            (vec![], &["a", "b", "c", "d", "e", "f", "g", "h", "i"], "9 paths of the closure are not in the lake: a, "),
        ] {
            let error = pages(records, missing).err().unwrap().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
