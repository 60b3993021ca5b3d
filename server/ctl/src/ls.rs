//! `narlake ls`: files of a store path in the lake, without mounting it.

use std::io::{self, IsTerminal as _, Write};

use serde::Serialize;

use crate::cli::LsOptions;
use crate::client::Client;
use crate::output::{Output, Report, printable};
use crate::tree::Node;
use crate::{UsageError, Verdict, object};

/// What is listed.
#[derive(Serialize)]
struct Listed {
    /// What was asked for.
    path: String,
    entries: Vec<Entry>,
    #[serde(skip)]
    long: bool,
}

/// One file.
#[derive(Serialize, PartialEq, Eq, Debug)]
struct Entry {
    /// Relative to what was asked for.
    #[serde(serialize_with = "lossy")]
    name: Vec<u8>,
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    executable: bool,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "lossy_option")]
    target: Option<Vec<u8>>,
}

/// The types, as listings call them.
#[derive(Serialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Directory,
    Regular,
    Symlink,
}

/// Runs the command.
///
/// # Errors
/// When the place is not there, or the server does not answer.
pub async fn run(options: &LsOptions, output: &Output) -> anyhow::Result<Verdict> {
    let Some(place) = &options.place else {
        let message = "give a store path: a lake shows what it has by name, and has no list of all its paths";
        return Err(UsageError(message.to_owned()).into());
    };
    let client = Client::new(&options.server.server, &options.server.access)?;
    let dir = client.info().await?.store_dir;
    let (_, node) = object::find(&client, &dir, place, false).await?;
    let mut entries = Vec::new();
    match &node {
        Node::Directory(children) => {
            for (name, child) in children {
                collect(name, child, options.recursive, &mut entries);
            }
        }
        node => {
            let name = place.inner.last().cloned().unwrap_or_else(|| place.path.to_string().into_bytes());
            collect(&name, node, false, &mut entries);
        }
    }
    output.report(&Listed { path: place.to_string(), entries, long: options.long })?;
    Ok(Verdict::Good)
}

fn collect(name: &[u8], node: &Node, recursive: bool, entries: &mut Vec<Entry>) {
    let entry = Entry { name: name.to_vec(), kind: Kind::Directory, size: None, executable: false, target: None };
    match node {
        Node::Directory(children) => {
            entries.push(entry);
            for (child, node) in children.iter().filter(|_| recursive) {
                collect(&[name, b"/", child].concat(), node, true, entries);
            }
        }
        Node::File { executable, size, .. } => {
            entries.push(Entry { kind: Kind::Regular, size: Some(*size), executable: *executable, ..entry });
        }
        Node::Symlink { target } => {
            entries.push(Entry { kind: Kind::Symlink, target: Some(target.clone()), ..entry });
        }
    }
}

impl Report for Listed {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        // A script gets the names as they are.
        let terminal = io::stdout().is_terminal();
        self.entries.iter().try_for_each(|entry| entry.print(self.long, terminal, out))
    }
}

impl Entry {
    fn print(&self, long: bool, terminal: bool, out: &mut dyn Write) -> io::Result<()> {
        let name = |name: &[u8]| if terminal { printable(name).into_bytes() } else { name.to_vec() };
        if long {
            let mode = match (self.kind, self.executable) {
                (Kind::Directory, _) => "dr-xr-xr-x",
                (Kind::Symlink, _) => "lrwxrwxrwx",
                (Kind::Regular, true) => "-r-xr-xr-x",
                (Kind::Regular, false) => "-r--r--r--",
            };
            write!(out, "{mode} {:>12} ", self.size.unwrap_or(0))?;
        }
        out.write_all(&name(&self.name))?;
        if let Some(target) = self.target.as_ref().filter(|_| long) {
            out.write_all(b" -> ")?;
            out.write_all(&name(target))?;
        }
        out.write_all(b"\n")
    }
}

/// JSON knows no bytes.
fn lossy<S: serde::Serializer>(name: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(name))
}

fn lossy_option<S: serde::Serializer>(name: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
    match name {
        Some(name) => lossy(name, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::nix::listing;

    use super::*;

    fn tree() -> Node {
        let text = r#"{"version":1,"root":{"type":"directory","entries":{
            "bin":{"type":"directory","entries":{"run":{"type":"regular","size":5,"executable":true,"narOffset":9}}},
            "link":{"type":"symlink","target":"bin/run"},"text":{"type":"regular","size":1234,"narOffset":1}}}}"#;
        listing::Listing::parse(text.as_bytes()).unwrap().root.into()
    }

    fn print(recursive: bool, long: bool) -> String {
        let Node::Directory(children) = tree() else { panic!() };
        let mut entries = Vec::new();
        for (name, node) in &children {
            collect(name, node, recursive, &mut entries);
        }
        let mut out = Vec::new();
        Listed { path: String::new(), entries, long }.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn listings() {
        assert_eq!(print(false, false), "bin\nlink\ntext\n");
        assert_eq!(print(true, false), "bin\nbin/run\nlink\ntext\n");
        let long = "dr-xr-xr-x            0 bin\n-r-xr-xr-x            5 bin/run\n\
                    lrwxrwxrwx            0 link -> bin/run\n-r--r--r--         1234 text\n";
        assert_eq!(print(true, true), long);
    }
}
