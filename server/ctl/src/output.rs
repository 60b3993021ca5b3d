//! What is printed.
//!
//! Results go to standard output: text, or with `--json` one document. Everything else (progress, notes, errors) goes
//! to standard error, progress only where that is a terminal, so a script reads exactly what it asked for. Text that
//! came from elsewhere, a file name or a server's message, never reaches a terminal with its control characters in
//! place.

use std::fmt::{self, Display, Write as _};
use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{BinaryBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::client::ClientError;
use crate::control::ControlError;
use crate::dump::DumpError;
use crate::nix::NixError;
use crate::push::PushError;
use crate::worker::WorkerError;

/// What a command found or did.
pub trait Report: Serialize {
    /// Writes it for people.
    ///
    /// # Errors
    /// Those of `out`.
    fn print(&self, out: &mut dyn Write) -> io::Result<()>;
}

/// Where and how to print.
pub struct Output {
    json: bool,
    quiet: bool,
    bars: MultiProgress,
}

impl Output {
    /// For JSON or people; with or without notes and progress.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let target = if quiet || json || !io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self { json, quiet, bars: MultiProgress::with_draw_target(target) }
    }

    /// Whether a document is wanted.
    #[must_use]
    pub const fn is_json(&self) -> bool {
        self.json
    }

    /// Prints the result.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn report(&self, report: &impl Report) -> anyhow::Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, report).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        } else {
            report.print(&mut out)?;
        }
        Ok(out.flush()?)
    }

    /// Says something to whoever watches.
    pub fn note(&self, note: impl Display) {
        if !self.quiet {
            self.bars.suspend(|| eprintln!("narlake: {note}"));
        }
    }

    /// Progress over a number of bytes that is known.
    #[must_use]
    pub fn progress(&self, what: &'static str, bytes: u64) -> Progress {
        let template = "{prefix:>9} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}";
        Progress(self.bar(template, what, ProgressBar::new(bytes)))
    }

    /// Progress over bytes of which nobody knows how many there are.
    #[must_use]
    pub fn counter(&self, what: &'static str) -> Progress {
        Progress(self.bar(
            "{prefix:>9} {spinner} {binary_bytes} {binary_bytes_per_sec} {msg}",
            what,
            ProgressBar::no_length(),
        ))
    }

    fn bar(&self, template: &str, what: &'static str, bar: ProgressBar) -> ProgressBar {
        let bar = self.bars.add(bar.with_prefix(what));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// A bar on a terminal, or nothing. Goes away with the last clone.
#[derive(Clone)]
pub struct Progress(ProgressBar);

impl Progress {
    /// So many more bytes are done.
    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// So many bytes have to be done once more.
    pub fn take_back(&self, bytes: u64) {
        self.0.dec(bytes);
    }

    /// What is being done.
    pub fn say(&self, message: impl Display) {
        self.0.set_message(message.to_string());
    }

    /// It is done.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A number of bytes, for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// Text from elsewhere, fit for a terminal: control characters become escapes. For bytes that are no text, so do those
/// that are not UTF-8.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Prints an error with its causes, and what to do about it where that is known.
pub fn complain(error: &anyhow::Error) {
    eprintln!("narlake: {error:#}");
    if let Some(advice) = error.chain().find_map(advice) {
        eprintln!("narlake: {advice}");
    }
}

fn advice(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return error.advice();
    }
    if let Some(error) = error.downcast_ref::<ControlError>() {
        return error.advice();
    }
    if let Some(error) = error.downcast_ref::<WorkerError>() {
        return error.advice();
    }
    if let Some(error) = error.downcast_ref::<DumpError>() {
        return error.advice();
    }
    if let Some(error) = error.downcast_ref::<NixError>() {
        return error.advice();
    }
    error.downcast_ref::<PushError>().and_then(PushError::advice)
}

/// Two columns of text, the first as wide as its longest word.
///
/// # Errors
/// Those of `out`.
pub fn columns(rows: &[(&str, String)], out: &mut dyn Write) -> io::Result<()> {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    rows.iter().try_for_each(|(name, value)| writeln!(out, "{:width$} {value}", format!("{name}:")))
}

/// A path in a message.
pub(crate) struct Shown<'a>(pub(crate) &'a std::path::Path);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.0.as_os_str().as_encoded_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(printable(b"plain \xc3\xa4"), "plain \u{e4}");
        assert_eq!(printable(b"a\x1b[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(printable(b"\xff\xc3"), "\\xff\\xc3");
        assert_eq!(printable("\u{9b}2J".as_bytes()), "\\u{9b}2J");
    }

    #[test]
    fn columns_line_up() {
        let mut out = Vec::new();
        columns(&[("a", "1".into()), ("long", "2".into())], &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a:    1\nlong: 2\n");
    }
}
