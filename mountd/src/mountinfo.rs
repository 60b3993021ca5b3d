//! What is mounted where, as the kernel tells it in `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
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
        let value =
            self.options.split(|byte| *byte == b',').find_map(|option| option.strip_prefix(prefix.as_bytes()))?;
        Some(PathBuf::from(OsString::from_vec(unescape(value))))
    }
}

/// The mounts that this process sees, in the order in which they were made.
///
/// # Errors
/// When the kernel does not tell.
pub fn mounts() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount on exactly this path.
///
/// # Errors
/// When the kernel does not tell.
pub fn mount_on(path: &Path) -> io::Result<Option<MountInfo>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.mount_point == path))
}

/// Looks at the mounts of this process's namespace when they have changed. The kernel says for each descriptor of
/// `mountinfo` whether they have, so that a look which finds nothing new costs next to nothing.
#[derive(Debug)]
pub struct Watch {
    file: File,
    /// They have, and were not read since.
    changed: bool,
}

impl Watch {
    /// Begins with a change.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn new() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/mountinfo")?, changed: true })
    }

    /// The mounts, if anything was mounted, moved or unmounted since they were told the last time.
    ///
    /// # Errors
    /// When the kernel does not tell. Then the next call tries again.
    pub fn changed(&mut self) -> io::Result<Option<Vec<MountInfo>>> {
        // Before they are read: what changes meanwhile is found by the next call.
        let mut polled = [PollFd::new(&self.file, PollFlags::PRI)];
        self.changed |= poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0;
        if !self.changed {
            return Ok(None);
        }
        self.file.rewind()?;
        let mut text = Vec::new();
        self.file.read_to_end(&mut text)?;
        self.changed = false;
        Ok(Some(parse(&text)))
    }
}

/// Whether the daemon behind a mount of ours, or behind an overlay over one, is gone. Waits for the daemon if it is not.
#[must_use]
pub fn is_dead(mount_point: &Path) -> bool {
    // The kernel answers for a dead daemon whatever it remembers, the root's attributes and names that do not exist
    // among them. So this asks for a name that nobody has asked for before, and that no store path has.
    static PROBES: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let probe = format!(".narlake-probe-{}-{}-{number}", std::process::id(), now.as_nanos());
    let not_connected = [Errno::NOTCONN, Errno::CONNABORTED].map(Errno::raw_os_error);
    let error = std::fs::symlink_metadata(mount_point.join(probe)).err().and_then(|error| error.raw_os_error());
    error.is_some_and(|error| not_connected.contains(&error))
}

/// Lines that are not of this form are not of this kernel, and are passed over.
pub(crate) fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = words.nth(2)?;
    let mount_point = words.nth(1)?;
    // Optional fields end with a hyphen.
    words.find(|word| *word == b"-")?;
    let text = |word: &[u8]| String::from_utf8_lossy(&unescape(word)).into_owned();
    Some(MountInfo {
        device: text(device),
        mount_point: PathBuf::from(OsString::from_vec(unescape(mount_point))),
        fs_type: text(words.next()?),
        source: text(words.next()?),
        options: words.next()?.to_vec(),
    })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
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
            90 22 0:41 / /a\\040b ro,nosuid shared:5 master:1 - fuse.narlake narlake ro,user_id=0\n\
            91 22 0:42 / /m rw - overlay overlay rw,lowerdir=/a\\040b,upperdir=/u,workdir=/w,metacopy=on\n\
            nonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[1].mount_point, Path::new("/a b"));
        assert_eq!(mounts[1].device, "0:41");
        assert_eq!(mounts[1].fs_type, "fuse.narlake");
        assert_eq!(mounts[2].option("lowerdir"), Some("/a b".into()));
        assert_eq!(mounts[2].option("upperdir"), Some("/u".into()));
        assert_eq!(mounts[2].option("upper"), None);
    }

    #[test]
    fn finds_the_root() {
        assert!(mount_on(Path::new("/")).unwrap().is_some());
    }

    #[test]
    fn a_watch_begins_with_a_look() {
        let mounts = Watch::new().unwrap().changed().unwrap().unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point == Path::new("/")));
    }
}
