//! What this daemon needs of the kernel, looked at before anything is mounted.
//!
//! An older kernel does not fail where it is used: it hangs, or loses what was under way when a daemon dies. So a start
//! below the floor is refused, unless `--allow-old-kernel` says that this is understood. docs/kernels.md says what needs
//! which version. FUSE's own features are agreed on when the mount is made, and logged there (`fuse`).

use std::fmt;
use std::io;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, OpenTreeFlags, fspick, open_tree};

/// Oldest kernel on which everything works: requests of a daemon that died can be sent again from it on.
const FLOOR: Version = Version { major: 6, minor: 9 };

/// Version of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    major: u32,
    minor: u32,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its release as it calls itself.
    pub release: String,
    /// The version in that; `None` if there is none.
    pub version: Option<Version>,
    /// Whether a mount can be cloned (`open_tree`).
    pub open_tree: bool,
    /// Whether a mount can be reconfigured through its clone (`fspick`).
    pub fspick: bool,
}

/// A kernel on which not everything works.
#[derive(Debug, thiserror::Error)]
#[error("kernel {release} {lack}; see docs/kernels.md, and --allow-old-kernel to go on all the same")]
pub struct OldKernel {
    release: String,
    lack: String,
}

impl Kernel {
    /// Looks at the kernel that runs.
    ///
    /// # Errors
    /// When it does not say which it is.
    pub fn probe() -> io::Result<Self> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let version = Version::parse(&release);
        // Any other error is about this directory or this process, and comes again, with its reason, where it matters.
        let open_tree = open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC).map(drop) != Err(Errno::NOSYS);
        let fspick = fspick(CWD, "/", FsPickFlags::FSPICK_CLOEXEC).map(drop) != Err(Errno::NOSYS);
        Ok(Self { release, version, open_tree, fspick })
    }

    /// Whether everything works on it.
    ///
    /// # Errors
    /// Says what does not.
    pub fn check(&self) -> Result<(), OldKernel> {
        let mut lacks = Vec::new();
        match self.version {
            Some(version) if version >= FLOOR => {}
            Some(_) => lacks.push(format!("is older than {FLOOR}")),
            None => lacks.push("does not say its version".to_owned()),
        }
        for (call, there) in [("open_tree", self.open_tree), ("fspick", self.fspick)] {
            if !there {
                lacks.push(format!("lacks {call}, without which overlays cannot be refreshed"));
            }
        }
        if lacks.is_empty() {
            return Ok(());
        }
        Err(OldKernel { release: self.release.clone(), lack: lacks.join(" and ") })
    }
}

impl Version {
    /// Of a release such as `6.18.44-cloud`.
    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        Some(Self { major: number()?, minor: number()? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(release: &str, calls: (bool, bool), expect: Option<&str>) {
        let version = Version::parse(release);
        let kernel = Kernel { release: release.into(), version, open_tree: calls.0, fspick: calls.1 };
        match (kernel.check(), expect) {
            (Ok(()), None) => {}
            (Err(error), Some(part)) => {
                let error = error.to_string();
                assert!(error.contains(part) && error.contains("--allow-old-kernel"), "{error}");
            }
            (done, expect) => panic!("{release}: {done:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn old_kernels_are_refused() {
        let all = (true, true);
        for good in ["6.9.0", "6.9", "6.10.1-amd64", "6.18.44+deb13-cloud", "7.0-rc1"] {
            check(good, all, None);
        }
        for old in ["6.8.12-generic", "5.15.0-91", "4.19", "6.1.0-40-amd64"] {
            check(old, all, Some("is older than 6.9"));
        }
        for odd in ["", "x", "6", "six.nine"] {
            check(odd, all, Some("does not say its version"));
        }
        check("6.18.0", (false, true), Some("lacks open_tree"));
        check("5.1.0", (false, false), Some("is older than 6.9 and lacks open_tree"));
    }

    #[test]
    fn this_kernel_says_what_it_is() {
        let kernel = Kernel::probe().unwrap();
        assert!(kernel.version.is_some() && kernel.open_tree && kernel.fspick, "{kernel:?}");
    }
}
