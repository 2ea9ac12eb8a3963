//! One thing found: how bad it is, what was found, what was expected, what to do.

use serde::Serialize;

/// In order of badness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    NotChecked,
    Warning,
    Error,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub severity: Severity,
    /// What was looked at.
    pub subject: String,
    pub found: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub expected: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    pub fn ok(check: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Finding::new(check, Severity::Ok, subject, found)
    }

    /// `why` nothing can be said of it.
    pub fn not_checked(check: &'static str, subject: impl Into<String>, why: impl Into<String>) -> Self {
        Finding::new(check, Severity::NotChecked, subject, why)
    }

    pub fn warning(check: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Finding::new(check, Severity::Warning, subject, found)
    }

    pub fn error(check: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Finding::new(check, Severity::Error, subject, found)
    }

    pub fn expected(self, expected: impl Into<String>) -> Self {
        Finding { expected: expected.into(), ..self }
    }

    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        Finding { remedy: remedy.into(), ..self }
    }

    fn new(
        check: &'static str,
        severity: Severity,
        subject: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        let (expected, remedy) = (String::new(), String::new());
        Finding { check, severity, subject: subject.into(), found: found.into(), expected, remedy }
    }
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::NotChecked => "not checked",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}
