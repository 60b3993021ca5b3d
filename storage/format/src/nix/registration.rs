//! What Nix's database says about store paths, as text: the input of `nix-store --load-db`, the output of
//! `nix-store --dump-db`.
//!
//! ```text
//! registration = *record
//! record       = path LF narHash LF narSize LF deriver LF count LF *(reference LF)
//! ```
//!
//! Paths are absolute, the hash is bare hexadecimal, the line of the deriver is empty where there is none, and `count`
//! says how many references follow. There is no header and no end: a text that was cut off between two records is a
//! shorter text. So one that is handed to Nix names references before what refers to them ([`check_closed`]): whatever
//! part of it arrives is closed, and the path that was asked for comes last.
//!
//! Nix believes this text. It has neither signatures nor content addresses.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::hash::Sha256Hash;
use super::narinfo::NarInfo;
use super::store_path::{StoreDir, StorePath};
use crate::error::FormatError;
use crate::limits::CLOSURE_MAX;

/// What Nix's database says about one store path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// The path.
    pub path: StorePath,
    /// The digest of its NAR.
    pub nar_hash: Sha256Hash,
    /// The number of bytes of its NAR; 0 where Nix does not know.
    pub nar_size: u64,
    /// The derivation that built it.
    pub deriver: Option<StorePath>,
    /// The paths that it refers to, itself included where it does.
    pub references: Vec<StorePath>,
}

/// A reference that no record before names.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path} refers to {reference}, which is not registered before it")]
pub struct OpenRegistration {
    /// The path.
    pub path: StorePath,
    /// What it refers to.
    pub reference: StorePath,
}

impl Registration {
    /// What the metadata of a path says.
    #[must_use]
    pub fn of(info: &NarInfo) -> Self {
        Self {
            path: info.store_path.clone(),
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            deriver: info.deriver.clone(),
            references: info.references.clone(),
        }
    }

    /// Writes the record.
    pub fn write(&self, dir: &StoreDir, out: &mut String) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}\n{}\n{}", self.path.display_in(dir), self.nar_hash.to_hex(), self.nar_size);
        if let Some(deriver) = &self.deriver {
            let _ = write!(out, "{}", deriver.display_in(dir));
        }
        let _ = writeln!(out, "\n{}", self.references.len());
        for reference in &self.references {
            let _ = writeln!(out, "{}", reference.display_in(dir));
        }
    }
}

/// Reads a whole text.
///
/// # Errors
/// When a record is cut off, or a field is none.
pub fn parse(dir: &StoreDir, text: &[u8]) -> Result<Vec<Registration>, FormatError> {
    let mut lines = Lines { dir, rest: text, offset: 0, start: 0 };
    let mut records = Vec::new();
    while !lines.rest.is_empty() {
        records.push(lines.record()?);
    }
    Ok(records)
}

/// Makes sure that every reference is to a record before, or to its own.
///
/// # Errors
/// Names the first that is not.
pub fn check_closed(records: &[Registration]) -> Result<(), OpenRegistration> {
    let mut seen: HashSet<&StorePath> = HashSet::with_capacity(records.len());
    for record in records {
        seen.insert(&record.path);
        if let Some(reference) = record.references.iter().find(|reference| !seen.contains(reference)) {
            return Err(OpenRegistration { path: record.path.clone(), reference: reference.clone() });
        }
    }
    Ok(())
}

struct Lines<'a> {
    dir: &'a StoreDir,
    rest: &'a [u8],
    /// Of the rest.
    offset: u64,
    /// Of the line that was taken last.
    start: u64,
}

impl<'a> Lines<'a> {
    fn record(&mut self) -> Result<Registration, FormatError> {
        let path = self.line("store path").and_then(|text| self.path("store path", text))?;
        let nar_hash = self.line("narHash")?;
        let nar_hash = Sha256Hash::parse_bare(nar_hash).or_else(|_| nar_hash.parse());
        let nar_hash = nar_hash.map_err(|_| self.syntax("narHash"))?;
        let nar_size = self.number("narSize")?;
        let deriver = match self.line("deriver")? {
            "" | "unknown-deriver" => None,
            text => Some(self.path("deriver", text)?),
        };
        let field = "number of references";
        let count = self.number(field)?;
        if count > CLOSURE_MAX as u64 {
            return Err(FormatError::Limit { field, value: count, max: CLOSURE_MAX as u64, offset: self.start });
        }
        let mut references = Vec::new();
        for _ in 0..count {
            references.push(self.line("reference").and_then(|text| self.path("reference", text))?);
        }
        Ok(Registration { path, nar_hash, nar_size, deriver, references })
    }

    fn line(&mut self, field: &'static str) -> Result<&'a str, FormatError> {
        self.start = self.offset;
        let end = self.rest.iter().position(|byte| *byte == b'\n');
        let end = end.ok_or(FormatError::Truncated { field, offset: self.offset + self.rest.len() as u64 })?;
        let (line, rest) = self.rest.split_at(end);
        self.rest = rest.get(1..).unwrap_or_default();
        self.offset += end as u64 + 1;
        str::from_utf8(line).map_err(|_| self.syntax(field))
    }

    fn number(&mut self, field: &'static str) -> Result<u64, FormatError> {
        let text = self.line(field)?;
        text.parse().map_err(|_| self.syntax(field))
    }

    fn path(&self, field: &'static str, text: &str) -> Result<StorePath, FormatError> {
        StorePath::parse_absolute(self.dir, text).map_err(|_| self.syntax(field))
    }

    const fn syntax(&self, field: &'static str) -> FormatError {
        FormatError::Syntax { field, offset: self.start }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(number: u8, name: &str) -> StorePath {
        format!("{}-{name}", char::from(b'0' + number).to_string().repeat(32)).parse().unwrap()
    }

    fn records() -> Vec<Registration> {
        let glibc = Registration {
            path: path(1, "glibc"),
            nar_hash: Sha256Hash::of(b"glibc"),
            nar_size: 120,
            deriver: None,
            references: vec![path(1, "glibc")],
        };
        let hello = Registration {
            path: path(2, "hello"),
            nar_hash: Sha256Hash::of(b"hello"),
            nar_size: 112,
            deriver: Some(path(3, "hello.drv")),
            references: vec![path(1, "glibc"), path(2, "hello")],
        };
        vec![glibc, hello]
    }

    fn text(records: &[Registration]) -> String {
        let mut text = String::new();
        records.iter().for_each(|record| record.write(&StoreDir::default(), &mut text));
        text
    }

    #[test]
    fn what_nix_writes() {
        let expected = format!(
            "/nix/store/{0}-glibc\n{2}\n120\n\n1\n/nix/store/{0}-glibc\n\
             /nix/store/{1}-hello\n{3}\n112\n/nix/store/{4}-hello.drv\n2\n/nix/store/{0}-glibc\n/nix/store/{1}-hello\n",
            "1".repeat(32),
            "2".repeat(32),
            Sha256Hash::of(b"glibc").to_hex(),
            Sha256Hash::of(b"hello").to_hex(),
            "3".repeat(32),
        );
        assert_eq!(text(&records()), expected);
        assert_eq!(parse(&StoreDir::default(), expected.as_bytes()), Ok(records()));
        assert_eq!(parse(&StoreDir::default(), b""), Ok(vec![]));
    }

    /// Cut off anywhere, it is an error or a shorter text that is closed, and never has the last record.
    #[test]
    fn what_is_cut_off_is_not_whole() {
        let (dir, whole) = (StoreDir::default(), text(&records()));
        for end in 0..whole.len() {
            if let Ok(some) = parse(&dir, &whole.as_bytes()[..end]) {
                assert!(some.len() < 2 && check_closed(&some).is_ok(), "{end}");
            }
        }
    }

    #[test]
    fn what_is_no_record() {
        let (dir, whole) = (StoreDir::default(), text(&records()));
        let check = |from: &str, to: &str, field: &str, line: usize| {
            let text = whole.replacen(from, to, 1);
            let start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
            let error = parse(&dir, text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains(&format!("offset {start}")), "{from}: {error}");
        };
        check("/nix/store/1", "/gnu/store/1", "store path", 0);
        check("\n120\n", "\n-1\n", "narSize", 2);
        check(&Sha256Hash::of(b"glibc").to_hex(), "00", "narHash", 1);
        check("\n120\n\n1\n", "\n120\n\n1000000\n", "number of references", 4);
        check("\n120\n\n1\n", "\n120\n\n2\n", "store path", 7);
        assert!(parse(&dir, b"\xff\n").is_err());
    }

    #[test]
    fn references_come_first() {
        let mut records = records();
        assert_eq!(check_closed(&records), Ok(()));
        records.reverse();
        let error = check_closed(&records).unwrap_err();
        assert_eq!((error.path, error.reference), (path(2, "hello"), path(1, "glibc")));
    }
}
