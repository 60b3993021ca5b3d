//! What is mounted where for a process, as the kernel tells it in `/proc/<pid>/mountinfo`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Device of a file system: major and minor number.
pub(super) type Device = (u32, u32);

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mount {
    /// Number of it, which descriptors tell too.
    pub(super) id: u64,
    /// Its file system.
    pub(super) device: Device,
    /// Where it is.
    pub(super) point: PathBuf,
    /// Kind of the file system.
    pub(super) fs_type: String,
    /// The file system's own options.
    pub(super) options: String,
}

impl Mount {
    /// Whether one of its file system's options is exactly this.
    pub(super) fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|own| own == option)
    }
}

/// The mounts that a process sees, in the order in which they were made.
pub(super) fn mounts(process: &str) -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read(format!("/proc/{process}/mountinfo"))?))
}

/// The topmost mount on exactly this path.
pub(super) fn mount_on(path: &Path) -> io::Result<Option<Mount>> {
    Ok(mounts("self")?.into_iter().rfind(|mount| mount.point == path))
}

/// Two numbers with a colon between.
pub(super) fn device(text: &str, radix: u32) -> Option<Device> {
    let (major, minor) = text.split_once(':')?;
    Some((u32::from_str_radix(major, radix).ok()?, u32::from_str_radix(minor, radix).ok()?))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw,errors=continue`
fn line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let text = |word: &[u8]| String::from_utf8_lossy(word).into_owned();
    let id = text(words.next()?).parse().ok()?;
    let device = device(&text(words.nth(1)?), 10)?;
    let point = PathBuf::from(OsString::from_vec(unescape(words.nth(1)?)));
    // Optional fields end with a hyphen.
    words.find(|word| *word == b"-")?;
    let fs_type = text(words.next()?);
    let options = text(words.nth(1)?);
    Some(Mount { id, device, point, fs_type, options })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()) {
            Some(escaped) => {
                out.push(escaped);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            90 22 0:41 / /a\\040b rw,nosuid shared:5 master:1 - overlay overlay rw,lowerdir=/l,upperdir=/u\n\
            nonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[1].id, mounts[1].device), (90, (0, 41)));
        assert_eq!(mounts[1].point, Path::new("/a b"));
        assert!(mounts[1].has("lowerdir=/l") && !mounts[1].has("lowerdir=/") && mounts[1].fs_type == "overlay");
    }

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
