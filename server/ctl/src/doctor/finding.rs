//! What a check found.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Severity {
    /// As it should be.
    Ok,
    /// Something is lost or slower, or will go wrong one day.
    Warning,
    /// Builds or readers fail, hang or lose something.
    Problem,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Finding {
    /// What was looked at.
    pub(super) check: &'static str,
    /// How bad it is.
    pub(super) severity: Severity,
    /// What was found.
    pub(super) found: String,
    /// The command that mends it, or what else does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mend: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, severity: Severity::Ok, found: found.into(), mend: None }
    }

    pub(super) fn warning(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, severity: Severity::Warning, found: found.into(), mend: Some(mend.into()) }
    }

    pub(super) fn problem(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, severity: Severity::Problem, found: found.into(), mend: Some(mend.into()) }
    }
}
