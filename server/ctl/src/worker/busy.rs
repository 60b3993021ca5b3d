//! Who uses the store: processes with an open file, a working directory, a root, a program or a mapping in it.
//!
//! Paths do not tell: the store before the overlay and the overlay on it have the same ones, and other mount namespaces
//! have others for the same mount. So the kernel is asked for each descriptor on which mount it is (`fdinfo`, `statx`),
//! and for each process what those mounts are.
//!
//! Nothing here reads a file of the store, so nothing waits for whoever serves it. The number of processes, of
//! descriptors and of lines looked at is bounded, and so is the time.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde::Serialize;

use super::mountinfo::{self, Device};
use crate::output::printable;

/// Longest that looking may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Most descriptors of a process, and lines of its memory map, that are looked at.
const DESCRIPTORS_MAX: usize = 100_000;

/// Most processes that are told of.
const HOLDERS_MAX: usize = 1000;

/// What is looked for.
pub(super) enum Where<'a> {
    /// Anything on this file system.
    On(Device),
    /// Anything below this directory that is not on this file system.
    Below(&'a Path, Device),
}

/// A process that uses the store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// How it does: `cwd`, `root`, `exe`, `map` or `fd <number>`, and the path. One of perhaps many.
    pub how: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({}: {})", self.pid, self.name, self.how)
    }
}

/// What was found.
pub(super) struct Scan {
    pub(super) holders: Vec<Holder>,
    /// False if a bound was met, so that there may be more.
    pub(super) complete: bool,
}

/// Mounts of processes, by namespace and root directory: most processes share them.
type Known = HashMap<(PathBuf, PathBuf), HashMap<u64, Device>>;

/// Looks at all processes but this one and these. Blocks.
pub(super) fn scan(place: &Where<'_>, but: &[u32]) -> Scan {
    let until = Instant::now() + LIMIT;
    let (mut holders, mut complete, mut known) = (Vec::new(), true, Known::new());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() || but.contains(&pid) {
            continue;
        }
        if Instant::now() >= until || holders.len() >= HOLDERS_MAX {
            complete = false;
            break;
        }
        // A process that ends meanwhile uses nothing.
        if let Some(how) = look(pid, place, &mut known, until) {
            let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            holders.push(Holder { pid, name: printable(name.trim_ascii()), how });
        }
    }
    holders.sort_by_key(|holder| holder.pid);
    Scan { holders, complete }
}

/// Processes that another has started and that have not ended. Blocks.
pub(super) fn children(parent: u32) -> Vec<Holder> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let child = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (start, rest) = stat.rsplit_once(')')?;
        let mut words = rest.split_whitespace();
        let state = words.next()?;
        let of = words.next()?.parse::<u32>().ok()?;
        let name = printable(start.split_once('(')?.1.as_bytes());
        let how = format!("client of process {parent}");
        (of == parent && !matches!(state, "Z" | "X")).then_some(Holder { pid, name, how })
    };
    pids.filter_map(child).take(HOLDERS_MAX).collect()
}

/// How a process uses the place, if it does.
fn look(pid: u32, place: &Where<'_>, known: &mut Known, until: Instant) -> Option<String> {
    let own = PathBuf::from(format!("/proc/{pid}"));
    let key = (fs::read_link(own.join("ns/mnt")).ok()?, fs::read_link(own.join("root")).unwrap_or_default());
    let mounts = known.entry(key).or_insert_with(|| devices(pid));
    if let Where::On(device) = place
        && !mounts.values().any(|mounted| mounted == device)
    {
        return None;
    }
    let hit = |path: &Path, mount: Option<u64>| {
        let device = mount.and_then(|mount| mounts.get(&mount));
        is_hit(place, path, device.copied())
    };
    for link in ["cwd", "root", "exe"] {
        let link_path = own.join(link);
        if let Ok(path) = fs::read_link(&link_path)
            && hit(&path, mount_of(&link_path))
        {
            return Some(told(link, &path));
        }
    }
    for entry in fs::read_dir(own.join("fd")).into_iter().flatten().flatten().take(DESCRIPTORS_MAX) {
        let Ok(path) = fs::read_link(entry.path()) else { continue };
        // Pipes and sockets have no path.
        if path.is_absolute() && hit(&path, mount_of_descriptor(&own, &entry.file_name())) {
            return Some(told(&format!("fd {}", entry.file_name().display()), &path));
        }
        if Instant::now() >= until {
            return None;
        }
    }
    let maps = fs::read(own.join("maps")).unwrap_or_default();
    maps.split(|byte| *byte == b'\n').take(DESCRIPTORS_MAX).find_map(|line| {
        let (device, path) = mapping(line)?;
        is_hit(place, &path, Some(device)).then(|| told("map", &path))
    })
}

fn is_hit(place: &Where<'_>, path: &Path, device: Option<Device>) -> bool {
    match place {
        Where::On(wanted) => device == Some(*wanted),
        Where::Below(dir, other) => path.starts_with(dir) && device != Some(*other),
    }
}

fn told(how: &str, path: &Path) -> String {
    format!("{how} {}", printable(path.as_os_str().as_encoded_bytes()))
}

fn devices(pid: u32) -> HashMap<u64, Device> {
    let mounts = mountinfo::mounts(&pid.to_string()).unwrap_or_default();
    mounts.into_iter().filter_map(|mount| Some((mount.id, mountinfo::device(&mount.device, 10)?))).collect()
}

/// The mount that a link of the kernel's leads to. The file system is not asked.
fn mount_of(link: &Path) -> Option<u64> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let found = statx(CWD, link, flags, StatxFlags::MNT_ID).ok()?;
    (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id)
}

fn mount_of_descriptor(process: &Path, number: &std::ffi::OsStr) -> Option<u64> {
    let text = fs::read_to_string(process.join("fdinfo").join(number)).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// `7f12-7f34 r-xp 00000000 fe:00 1234   /nix/store/...`
fn mapping(line: &[u8]) -> Option<(Device, PathBuf)> {
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_ascii_whitespace();
    let device = mountinfo::device(words.nth(3)?, 16)?;
    let path = line.get(line.find('/')?..)?;
    Some((device, PathBuf::from(path)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A device that nothing is on.
    const NONE: Device = (4095, 1);

    /// A process of the test's, that ends with it.
    struct Held(Child);

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn holders(dir: &Path, other: Device) -> Vec<(u32, String)> {
        let scan = scan(&Where::Below(dir, other), &[]);
        assert!(scan.complete);
        scan.holders.into_iter().map(|holder| (holder.pid, holder.how)).collect()
    }

    #[test]
    fn open_files_and_directories_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let place = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(holders(&place, NONE), []);
        fs::write(place.join("file"), "x").unwrap();
        let mut sleep = Command::new("sleep");
        let file = Held(sleep.arg("60").stdin(fs::File::open(place.join("file")).unwrap()).spawn().unwrap());
        let cwd = Held(Command::new("sleep").arg("60").current_dir(&place).stdin(Stdio::null()).spawn().unwrap());
        let mut expected = vec![
            (file.0.id(), format!("fd 0 {}/file", place.display())),
            (cwd.0.id(), format!("cwd {}", place.display())),
        ];
        expected.sort();
        assert_eq!(holders(&place, NONE), expected);
        // On the file system that does not count.
        let device = fs::metadata(&place).unwrap().dev();
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        assert_eq!(holders(&place, device), []);
        // And that which does.
        let on = scan(&Where::On(device), &[cwd.0.id()]);
        let found: Vec<u32> = on.holders.iter().map(|holder| holder.pid).collect();
        assert!(found.contains(&file.0.id()) && !found.contains(&cwd.0.id()), "{found:?}");
        drop((file, cwd));
        assert_eq!(holders(&place, NONE), []);
    }

    #[test]
    fn children_are_found() {
        let held = Held(Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap());
        let own: Vec<u32> = children(std::process::id()).into_iter().map(|holder| holder.pid).collect();
        assert!(own.contains(&held.0.id()), "{own:?}");
        assert_eq!(children(held.0.id()), []);
    }

    #[test]
    fn programs_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let place = fs::canonicalize(dir.path()).unwrap();
        let sleep = ["/bin/sleep", "/usr/bin/sleep"].into_iter().find(|path| Path::new(path).exists()).unwrap();
        fs::copy(sleep, place.join("program")).unwrap();
        let held = Held(Command::new(place.join("program")).arg("60").spawn().unwrap());
        assert_eq!(holders(&place, NONE), [(held.0.id(), format!("exe {}/program", place.display()))]);
    }

    #[test]
    fn mappings() {
        let line = b"7f1-7f2 r-xp 00001000 fe:10 12                      /nix/store/a b.so";
        assert_eq!(mapping(line), Some(((254, 16), "/nix/store/a b.so".into())));
        assert_eq!(mapping(b"7f1-7f2 rw-p 00000000 00:00 0"), None);
        assert_eq!(mapping(b"7f1-7f2 rw-p 00000000 00:00 0      [heap]"), None);
    }
}
