//! Paths through trees.

use super::*;

const OWN: &str = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-own";
const OTHER: &str = "1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-other";

fn directory(entries: &[(&str, Node)]) -> Node {
    Node::Directory(entries.iter().map(|(name, node)| (name.as_bytes().to_vec(), node.clone())).collect())
}

fn link(target: &str) -> Node {
    Node::Symlink { target: target.into() }
}

fn file(size: u64) -> Node {
    Node::File { executable: false, size, nar_offset: Some(0) }
}

/// Where a path leads, in words: the size of a file, `directory`, `link`, `<store path>:<rest>`, or the error.
fn follow(root: &Node, path: &str, follow_last: bool) -> String {
    let dir = StoreDir::default();
    let names = path.split('/').filter(|name| !name.is_empty()).map(|name| name.as_bytes().to_vec()).collect();
    match Walk::new(&dir, follow_last).find(&OWN.parse().unwrap(), root, names) {
        Ok(Found::Here(Node::File { size, .. })) => size.to_string(),
        Ok(Found::Here(Node::Directory(_))) => "directory".into(),
        Ok(Found::Here(Node::Symlink { .. })) => "link".into(),
        Ok(Found::Elsewhere { path, rest }) => {
            let rest: Vec<_> = rest.iter().map(|name| str::from_utf8(name).unwrap()).collect();
            format!("{path}:{}", rest.join("/"))
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn paths() {
    let root = directory(&[
        (
            "bin",
            directory(&[
                ("run", file(1)),
                ("up", link("../lib/x")),
                ("sh", link(&format!("/nix/store/{OTHER}/bin/sh"))),
            ]),
        ),
        ("lib", directory(&[("x", file(2))])),
        ("libexec", link("lib")),
        ("self", link(&format!("/nix/store/{OWN}/lib"))),
        ("sibling", link(&format!("../{OTHER}/x/y"))),
        ("loop", link("loop")),
        ("host", link("/usr/bin/env")),
        ("prefix", link("/nix/store-not/x")),
        ("far", link("../../../etc")),
        ("store", link("..")),
        ("dot", link("./lib/./x")),
    ]);
    let check = |path: &str, follow_last: bool, expected: &str| {
        assert_eq!(follow(&root, path, follow_last), expected, "{path}");
    };
    check("", true, "directory");
    check("bin/run", true, "1");
    check("bin/../lib/x", true, "2");
    check("bin/up", true, "2");
    check("bin/up", false, "link");
    check("libexec/x", false, "2");
    check("libexec", true, "directory");
    check("self/x", true, "2");
    check("dot", true, "2");
    check("bin/sh", false, "link");
    check("bin/sh", true, &format!("{OTHER}:bin/sh"));
    check("sibling/z", false, &format!("{OTHER}:x/y/z"));
    check(&format!("../{OWN}/bin/run"), true, "1");
    check(&format!("../{OTHER}"), true, &format!("{OTHER}:"));

    let at = format!("/nix/store/{OWN}");
    check("nothing", true, &format!("there is no nothing in {at}"));
    check("bin/run/x", true, &format!("{at}/bin/run is not a directory"));
    check("loop", true, &format!("more than 40 symlinks on the way, the last one {at}/loop"));
    check("host", true, &format!("{at}/host leads to /usr/bin/env, which is not in the store"));
    check("prefix/x", true, &format!("{at}/prefix leads to /nix/store-not/x, which is not in the store"));
    check("far", true, "/nix/store leads to .., which is not in the store");
    check("store", true, "/nix/store leads to /nix/store, which is not in the store");
    check("../x", true, "/nix/store leads to x, which is not in the store");
}

#[test]
fn roots_that_are_no_directories() {
    assert_eq!(follow(&file(3), "", true), "3");
    assert_eq!(follow(&file(3), "x", true), format!("/nix/store/{OWN} is not a directory"));
    assert_eq!(follow(&link(OTHER), "", false), "link");
    assert_eq!(follow(&link(OTHER), "", true), format!("{OTHER}:"));
    assert_eq!(follow(&link(&format!("{OTHER}/a")), "b", true), format!("{OTHER}:a/b"));
}

#[test]
fn a_tree_from_events() {
    let mut builder = TreeBuilder::default();
    for event in [
        Event::Directory,
        Event::Entry { name: b"a" },
        Event::File { executable: true, size: 2 },
        Event::Data(b"xy"),
        Event::EndFile,
        Event::Entry { name: b"\xff" },
        Event::Directory,
        Event::Entry { name: b"l" },
        Event::Symlink { target: b"a" },
        Event::EndDirectory,
        Event::EndDirectory,
    ] {
        builder.event(event).unwrap();
    }
    let inner = directory(&[("l", link("a"))]);
    // Fifteen strings, from the magic to "contents", and the length of the content.
    let file = Node::File { executable: true, size: 2, nar_offset: Some(264) };
    let entries = [(b"a".to_vec(), file), (b"\xff".to_vec(), inner)];
    assert_eq!(builder.finish(), Some(Node::Directory(entries.into_iter().collect())));
    assert_eq!(TreeBuilder::default().finish(), None);
    assert!(TreeBuilder::default().event(Event::EndDirectory).is_err());
}
