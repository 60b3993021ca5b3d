//! What is mounted where for a process, as the kernel tells it in `/proc/<pid>/mountinfo`.

use std::path::Path;
use std::{fs, io};

use narlake_format::mountinfo::{MountInfo, parse};

/// Device of a file system: major and minor number.
pub(super) type Device = (u32, u32);

/// The mounts that a process sees, in the order in which they were made.
pub(super) fn mounts(process: &str) -> io::Result<Vec<MountInfo>> {
    Ok(parse(&fs::read(format!("/proc/{process}/mountinfo"))?))
}

/// The topmost mount on exactly this path.
pub(super) fn mount_on(path: &Path) -> io::Result<Option<MountInfo>> {
    Ok(mounts("self")?.into_iter().rfind(|mount| mount.mount_point == path))
}

/// Two numbers with a colon between.
pub(super) fn device(text: &str, radix: u32) -> Option<Device> {
    let (major, minor) = text.split_once(':')?;
    Some((u32::from_str_radix(major, radix).ok()?, u32::from_str_radix(minor, radix).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_root() {
        assert!(mount_on(Path::new("/")).unwrap().is_some());
    }

    #[test]
    fn devices() {
        assert_eq!(device("254:16", 10), Some((254, 16)));
        assert_eq!(device("fe:10", 16), Some((254, 16)));
        assert_eq!(device("x", 16), None);
    }
}
