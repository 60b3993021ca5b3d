//! `narlake inspect`: what a file is, and what is in it.
//!
//! The format is told by the first bytes where it has a magic, else by what the text looks like ([`recognise`]); the
//! format's own reader then has the last word. A NAR is read as it comes, however long; everything else is small enough
//! to be held. Of damaged input the message says where and in which field it is wrong.

mod document;
mod finding;
mod lake;
mod nar;
mod text;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use anyhow::{Context as _, bail};

pub use self::finding::{Finding, Table, Value};
use crate::cli::{Format, InspectOptions};
use crate::output::Output;
use crate::{UsageError, Verdict};

/// Largest file that is held in memory, in bytes: an index segment of ninety million blobs. No other format comes near.
const FILE_MAX: u64 = 4 << 30;

/// Bytes of the start of a file that formats are told by.
const HEAD: usize = 64;

/// Runs the command.
///
/// # Errors
/// When the file cannot be read, is of no known format, or is damaged.
pub fn run(options: &InspectOptions, output: &Output) -> anyhow::Result<Verdict> {
    let stdin = options.file.as_os_str() == "-";
    let name = if stdin { "standard input".to_owned() } else { options.file.display().to_string() };
    let source: Box<dyn Read> = if stdin {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(&options.file).with_context(|| format!("open {name}"))?)
    };
    let mut source = BufReader::with_capacity(nar::PIECE, source);
    let head = source.fill_buf().with_context(|| format!("read {name}"))?;
    let head = head.get(..HEAD).unwrap_or(head).to_vec();
    if options.format == Some(Format::Nar) || (options.format.is_none() && nar::is_nar(&head)) {
        only_for_packs(options)?;
        let finding = nar::inspect(&mut source, options.entries).with_context(|| damaged(&name, Format::Nar))?;
        output.report(&finding)?;
        return Ok(Verdict::Good);
    }
    let mut bytes = Vec::new();
    source.take(FILE_MAX + 1).read_to_end(&mut bytes).with_context(|| format!("read {name}"))?;
    if bytes.len() as u64 > FILE_MAX {
        bail!("{name} is larger than any file of Nix's or narlake's but a NAR, which it is not");
    }
    let Some(format) = options.format.or_else(|| recognise(&bytes)) else {
        if let Some(program) = compressor(&bytes) {
            bail!("{name} is compressed; try: {program} -dc {name} | narlake inspect -");
        }
        bail!("{name} is of no format that is told by its content; --format says what to take it for");
    };
    if format == Format::Pack {
        if let Some(id) = &options.blob {
            lake::write_blob(&bytes, id, &mut io::stdout().lock()).with_context(|| damaged(&name, format))?;
            return Ok(Verdict::Good);
        }
    } else {
        only_for_packs(options)?;
    }
    let finding = inspect(&bytes, format, options).with_context(|| damaged(&name, format))?;
    output.report(&finding)?;
    Ok(Verdict::Good)
}

/// Reads a file that is held in memory, as this format.
///
/// # Errors
/// When it is not of that format, or damaged.
pub fn inspect(bytes: &[u8], format: Format, options: &InspectOptions) -> anyhow::Result<Finding> {
    match format {
        Format::Nar => nar::inspect(&mut &*bytes, options.entries),
        Format::Narinfo => text::narinfo(bytes),
        Format::Listing => text::listing(bytes, options.entries),
        Format::CacheInfo => text::cache_info(bytes),
        Format::Realisation => text::realisation(bytes),
        Format::Key => text::key(bytes),
        Format::Pack => lake::pack(bytes, options.entries, options.verify),
        Format::Segment => lake::segment(bytes, options.entries),
        Format::Manifest => lake::manifest(bytes),
        Format::Part => lake::part(bytes, options.entries),
        Format::Strings => lake::strings(bytes),
        Format::Document => document::inspect(bytes),
        Format::Condemned => text::condemned(bytes),
    }
}

fn only_for_packs(options: &InspectOptions) -> Result<(), UsageError> {
    if options.blob.is_some() || options.verify {
        return Err(UsageError("--blob and --verify are for packs, which this file is not".to_owned()));
    }
    Ok(())
}

fn damaged(name: &str, format: Format) -> String {
    let format = match format {
        Format::Nar => "NAR",
        Format::Narinfo => "narinfo",
        Format::Listing => "listing",
        Format::CacheInfo => "nix-cache-info",
        Format::Realisation => "realisation",
        Format::Key => "signing key",
        Format::Pack => "pack",
        Format::Segment => "index segment",
        Format::Manifest => "manifest header",
        Format::Part => "manifest part",
        Format::Strings => "string table",
        Format::Document => "document of a lake",
        Format::Condemned => "list of condemned packs",
    };
    format!("{name} is not a valid {format}")
}

/// What a file seems to be. Binary formats without a magic are tried out: their readers accept nothing by chance.
#[must_use]
pub fn recognise(bytes: &[u8]) -> Option<Format> {
    if nar::is_nar(bytes) {
        return Some(Format::Nar);
    }
    for (magic, format) in [
        (&b"NLKPACK\n"[..], Format::Pack),
        (b"NLKSEGM\n", Format::Segment),
        (b"NLKM", Format::Manifest),
        (b"StorePath: ", Format::Narinfo),
        (b"StoreDir:", Format::CacheInfo),
    ] {
        if bytes.starts_with(magic) {
            return Some(format);
        }
    }
    if bytes.trim_ascii_start().starts_with(b"{") {
        return document::recognise(bytes);
    }
    if let Some(format) = text::recognise(bytes) {
        return Some(format);
    }
    if lake::strings(bytes).is_ok() {
        return Some(Format::Strings);
    }
    lake::part(bytes, false).is_ok().then_some(Format::Part)
}

/// The program that undoes a compression.
fn compressor(bytes: &[u8]) -> Option<&'static str> {
    let magics: [(&[u8], &str); 4] =
        [(b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2")];
    magics.into_iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, program)| program)
}
