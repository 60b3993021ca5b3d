//! `narlake doctor`: whether this host is set up as a worker should be, and the command that mends what is not.
//!
//! First the [`Facts`] are gathered that somebody has to be asked for: mountd, the server, Nix, the kernel about disks.
//! Each of those has a deadline. Then every check looks at them, and at the files of the [`System`], and says what it
//! found. A check changes nothing and waits for nobody, so each can be tested against a directory of planted files.
//!
//! | module | checks |
//! |---|---|
//! | [`kernel`] | version, overlayfs, FUSE, EROFS |
//! | [`mounts`] | options in force, what the lower lists, who sees the mounts |
//! | [`units`] | settings of systemd that hide or kill mounts |
//! | [`nix`] | version and its bugs, features, which store who opens, collector, hooks |
//! | [`worker`] | mountd, what it needs and where that lies, disks, limits |
//! | [`server`] | reach, token, clock |

mod facts;
mod finding;
mod kernel;
mod mounts;
mod nix;
mod server;
mod system;
mod units;
mod worker;

use std::io::{self, Write};

use serde::Serialize;

use self::facts::Facts;
use self::finding::{Finding, Severity};
use self::system::System;
use crate::Verdict;
use crate::cli::DoctorOptions;
use crate::output::{Output, Report, printable};

/// Looks at one thing. None of its findings means that there is nothing to look at.
type Check = fn(&System, &Facts) -> Vec<Finding>;

/// All checks, in the order in which they are told: what others stand on comes first.
const CHECKS: [Check; 22] = [
    kernel::version,
    kernel::overlayfs,
    kernel::fuse,
    kernel::sealed_views,
    worker::mountd,
    worker::its_server,
    worker::self_hosting,
    worker::disks,
    worker::inotify,
    worker::descriptors,
    mounts::options,
    mounts::lower,
    mounts::visible,
    units::of_mounts,
    units::of_mountd,
    nix::version,
    nix::features,
    nix::stores,
    nix::collector,
    nix::hooks,
    server::reach,
    server::clock,
];

/// What was found.
#[derive(Serialize)]
struct Diagnosis {
    findings: Vec<Finding>,
}

/// Runs the command.
///
/// # Errors
/// When nothing can be printed. Whatever does not answer is a finding.
pub async fn run(options: &DoctorOptions, output: &Output) -> anyhow::Result<Verdict> {
    let system = System::host();
    let facts = Facts::gather(&system, options).await;
    let diagnosis = Diagnosis { findings: examine(&system, &facts) };
    let is_bad = diagnosis.findings.iter().any(|finding| finding.severity == Severity::Problem);
    output.report(&diagnosis)?;
    Ok(if is_bad { Verdict::Bad } else { Verdict::Good })
}

fn examine(system: &System, facts: &Facts) -> Vec<Finding> {
    CHECKS.iter().flat_map(|check| check(system, facts)).collect()
}

impl Report for Diagnosis {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for finding in &self.findings {
            let severity = match finding.severity {
                Severity::Ok => "ok",
                Severity::Warning => "warning",
                Severity::Problem => "PROBLEM",
            };
            writeln!(out, "{severity:8} {:14} {}", finding.check, printable(finding.found.as_bytes()))?;
            if let Some(mend) = &finding.mend {
                writeln!(out, "{:23} -> {}", "", printable(mend.as_bytes()))?;
            }
        }
        let count = |severity| self.findings.iter().filter(|finding| finding.severity == severity).count();
        writeln!(out, "{} problems, {} warnings", count(Severity::Problem), count(Severity::Warning))
    }
}

#[cfg(test)]
mod tests;
