//! What this process may do to mounts, and whom files should belong to.
//!
//! Root, and root of a user namespace, mounts by itself. Anybody else has fusermount3 mount views, and gets no overlays.

use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, capabilities};

/// Whether mount(2) is for this process: it has `CAP_SYS_ADMIN` in its user namespace.
#[must_use]
pub fn may_mount() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Whether this process is in a user namespace that is not the host's.
#[must_use]
pub fn in_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_identity(&map))
}

/// The user and group that files are shown to belong to: 0, as Nix wants, where this user namespace has one; else those
/// of this process. An overlay refuses to copy a file up whose owner its namespace does not know (`EOVERFLOW`).
#[must_use]
pub fn owner() -> (u32, u32) {
    let has_zero = |map| std::fs::read_to_string(map).is_ok_and(|text| maps_zero(&text));
    let user = if has_zero("/proc/self/uid_map") { 0 } else { geteuid().as_raw() };
    let group = if has_zero("/proc/self/gid_map") { 0 } else { getegid().as_raw() };
    (user, group)
}

/// The first namespace maps all ids to themselves.
fn is_identity(map: &str) -> bool {
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

/// Lines of: first id inside, first id outside, how many.
fn maps_zero(map: &str) -> bool {
    map.lines().any(|line| line.split_ascii_whitespace().next() == Some("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_namespace_maps_all() {
        assert!(is_identity("         0          0 4294967295\n"));
        assert!(!is_identity("0 65534 1\n") && !is_identity("0 100000 65536\n") && !is_identity(""));
    }

    #[test]
    fn zero_is_found_where_it_is_mapped() {
        assert!(maps_zero("         0          0 4294967295\n") && maps_zero("1 5 1\n0 1000 1\n"));
        assert!(!maps_zero("1000 1000 1\n") && !maps_zero(""));
    }
}
