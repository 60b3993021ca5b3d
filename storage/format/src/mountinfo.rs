//! What is mounted where, as the kernel writes it in `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).
//!
//! A line is a mount, in the order in which they were made:
//!
//! ```text
//! 36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw,errors=continue
//! ```
//!
//! Space, tab, newline and backslash are written as a backslash and three octal digits.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Its number, which descriptors tell too.
    pub id: u64,
    /// Its file system's device, as `<major>:<minor>`.
    pub device: String,
    /// Where it is.
    pub mount_point: PathBuf,
    /// The kind of file system, with its subtype: `overlay`, `fuse.narlake`.
    pub fs_type: String,
    /// What it was mounted from.
    pub source: String,
    /// The file system's own options.
    options: Vec<u8>,
}

impl MountInfo {
    /// The value of one of the file system's own options, as a path.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<PathBuf> {
        let prefix = format!("{name}=");
        let value = self.raw_options().find_map(|option| option.strip_prefix(prefix.as_bytes()))?;
        Some(PathBuf::from(OsString::from_vec(unescape(value))))
    }

    /// Whether one of the file system's own options is exactly this, as it is written.
    #[must_use]
    pub fn has(&self, option: &str) -> bool {
        self.raw_options().any(|own| own == option.as_bytes())
    }

    /// All of the file system's own options, as text.
    pub fn options(&self) -> impl Iterator<Item = String> {
        self.raw_options().map(text)
    }

    fn raw_options(&self) -> impl Iterator<Item = &[u8]> {
        self.options.split(|byte| *byte == b',')
    }
}

/// Reads a list of mounts. Lines that are not of this form are not of this kernel, and are passed over.
#[must_use]
pub fn parse(list: &[u8]) -> Vec<MountInfo> {
    list.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut words = line.split(|byte| *byte == b' ');
    let id = text(words.next()?).parse().ok()?;
    let device = words.nth(1)?;
    let mount_point = words.nth(1)?;
    // Optional fields end with a hyphen.
    words.find(|word| *word == b"-")?;
    Some(MountInfo {
        id,
        device: text(device),
        mount_point: PathBuf::from(OsString::from_vec(unescape(mount_point))),
        fs_type: text(words.next()?),
        source: text(words.next()?),
        options: words.next()?.to_vec(),
    })
}

fn text(word: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(word)).into_owned()
}

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
    use std::path::Path;

    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            90 22 0:41 / /a\\040b ro,nosuid shared:5 master:1 - fuse.narlake narlake ro,user_id=0\n\
            91 22 0:42 / /m rw - overlay overlay rw,lowerdir=/a\\040b,upperdir=/u,workdir=/w,metacopy=on\n\
            nonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[1].mount_point, Path::new("/a b"));
        assert_eq!((mounts[1].id, mounts[1].device.as_str()), (90, "0:41"));
        assert_eq!(mounts[1].fs_type, "fuse.narlake");
        assert_eq!(mounts[2].option("lowerdir"), Some("/a b".into()));
        assert_eq!(mounts[2].option("upperdir"), Some("/u".into()));
        assert_eq!(mounts[2].option("upper"), None);
        assert!(mounts[2].has("upperdir=/u") && !mounts[2].has("upperdir=/"));
        let options: Vec<String> = mounts[2].options().collect();
        assert_eq!(options, ["rw", "lowerdir=/a b", "upperdir=/u", "workdir=/w", "metacopy=on"]);
    }
}
