//! The same content by its own name instead of that of a store path: `/<2 digits>/<62 digits>` of a ContentId.
//!
//! An overlay looks here for what a sealed view's files redirect to and the cache does not hold (`sealed`). The nodeid of
//! a file is that of some entry of some store object with this content, so reading it is reading that. This is a file
//! system of its own, whose files no overlay takes for those of a store: there, equal nodeids would be one file.

use narlake_format::id::ContentId;

use super::attr::Attr;
use super::nodes::NodeId;

/// Which content there is.
pub trait Contents: Send + Sync + 'static {
    /// An entry with this content.
    fn find(&self, content: &ContentId) -> Option<NodeId>;
}

/// Nodeid of the first directory. Those of store objects are far larger.
const FIRST: u64 = 2;

/// What a name in this file system stands for.
pub(super) enum Named {
    Directory(Attr),
    Content(NodeId),
    Nothing,
}

/// Looks a name up.
pub(super) fn lookup(contents: &dyn Contents, parent: NodeId, name: &[u8]) -> Named {
    let Ok(name) = std::str::from_utf8(name) else { return Named::Nothing };
    if parent == NodeId::ROOT {
        return digits(name).map_or(Named::Nothing, |byte| Named::Directory(directory(byte)));
    }
    let Some(byte) = byte_of(parent) else { return Named::Nothing };
    let content = format!("{byte:02x}{name}").parse().ok();
    content.and_then(|content| contents.find(&content)).map_or(Named::Nothing, Named::Content)
}

/// The directory that this nodeid is, if it is one.
pub(super) fn directory_of(node: NodeId) -> Option<Attr> {
    byte_of(node).map(directory)
}

fn directory(byte: u8) -> Attr {
    Attr::directory(NodeId(FIRST + u64::from(byte)))
}

fn byte_of(node: NodeId) -> Option<u8> {
    node.0.checked_sub(FIRST).and_then(|number| u8::try_from(number).ok())
}

/// Two hexadecimal digits, in the one way of writing them.
fn digits(name: &str) -> Option<u8> {
    u8::from_str_radix(name, 16).ok().filter(|byte| format!("{byte:02x}") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One(ContentId);

    impl Contents for One {
        fn find(&self, content: &ContentId) -> Option<NodeId> {
            (*content == self.0).then_some(NodeId(77 << 24))
        }
    }

    #[test]
    fn names_are_digits() {
        let one = One("ab".repeat(32).parse().unwrap());
        let Named::Directory(ab) = lookup(&one, NodeId::ROOT, b"ab") else { panic!() };
        assert_eq!(directory_of(ab.node), Some(ab));
        assert!(
            matches!(lookup(&one, ab.node, "ab".repeat(31).as_bytes()), Named::Content(NodeId(node)) if node == 77 << 24)
        );
        for (parent, name) in
            [(NodeId::ROOT, "AB"), (NodeId::ROOT, "+a"), (NodeId::ROOT, "abc"), (ab.node, "ab"), (ab.node, "")]
        {
            assert!(matches!(lookup(&one, parent, name.as_bytes()), Named::Nothing), "{name}");
        }
        assert!(matches!(lookup(&one, ab.node, &[0xff; 62]), Named::Nothing));
        assert!(directory_of(NodeId::ROOT).is_none() && directory_of(NodeId(1 << 24)).is_none());
    }
}
