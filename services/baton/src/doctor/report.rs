//! All findings as text or JSON, and what the exit code says of them.

use super::finding::{Finding, Severity};
use serde_json::{Value, json};

/// 0 if nothing is wrong, 1 for warnings if they count, 2 for errors.
pub fn exit_code(findings: &[Finding], strict: bool) -> u8 {
    match findings.iter().map(|finding| finding.severity).max() {
        Some(Severity::Error) => 2,
        Some(Severity::Warning) if strict => 1,
        _ => 0,
    }
}

pub fn as_json(findings: &[Finding], strict: bool) -> Value {
    json!({
        "findings": findings,
        "ok": count(findings, Severity::Ok),
        "not_checked": count(findings, Severity::NotChecked),
        "warnings": count(findings, Severity::Warning),
        "errors": count(findings, Severity::Error),
        "exit_code": exit_code(findings, strict),
    })
}

/// One block a check, in the order in which they were made. `coloured`: for a terminal.
pub fn as_text(findings: &[Finding], coloured: bool) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let lines: String = findings.iter().map(|finding| one(finding, width, coloured)).collect();
    format!("{lines}\n{}\n", summary(findings))
}

fn one(finding: &Finding, width: usize, coloured: bool) -> String {
    let (begin, end) = if coloured { (colour(finding.severity), "\x1b[0m") } else { ("", "") };
    let severity = finding.severity.name();
    let Finding { check, subject, found, .. } = finding;
    let mut text = format!("{begin}{severity:<11}{end}  {check:<width$}  {subject}: {found}\n");
    for (label, what) in [("expected", &finding.expected), ("remedy", &finding.remedy)] {
        if !what.is_empty() {
            text += &format!("{:indent$}{label:<8}  {what}\n", "", indent = width + 15);
        }
    }
    text
}

fn colour(severity: Severity) -> &'static str {
    match severity {
        Severity::Ok => "\x1b[32m",
        Severity::NotChecked => "\x1b[2m",
        Severity::Warning => "\x1b[33m",
        Severity::Error => "\x1b[31m",
    }
}

fn summary(findings: &[Finding]) -> String {
    let number = |severity, one: &str| match count(findings, severity) {
        1 => format!("1 {one}"),
        n => format!("{n} {one}s"),
    };
    let (errors, warnings) = (number(Severity::Error, "error"), number(Severity::Warning, "warning"));
    let ok = count(findings, Severity::Ok);
    let unchecked = count(findings, Severity::NotChecked);
    format!("{errors}, {warnings}, {ok} ok, {unchecked} not checked")
}

fn count(findings: &[Finding], severity: Severity) -> usize {
    findings.iter().filter(|finding| finding.severity == severity).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<Finding> {
        vec![
            Finding::ok("config", "a.toml", "fine"),
            Finding::warning("etcd", "http://e:1", "slow").expected("fast").remedy("another disk"),
        ]
    }

    #[test]
    fn warnings_count_only_if_asked_and_errors_always() {
        let mut findings = some();
        assert_eq!((exit_code(&findings, false), exit_code(&findings, true)), (0, 1));
        findings.push(Finding::error("etcd", "x", "dead"));
        assert_eq!((exit_code(&findings, false), exit_code(&findings, true)), (2, 2));
        assert_eq!(exit_code(&[], true), 0);
    }

    #[test]
    fn text_is_aligned_and_coloured_only_if_asked() {
        let text = as_text(&some(), false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("a.toml"), lines[1].find("http://e:1"));
        assert_eq!(lines[1].find("http://e:1"), lines[3].find("remedy"));
        assert_eq!(lines[5], "0 errors, 1 warning, 1 ok, 0 not checked");
        assert!(!text.contains('\x1b') && as_text(&some(), true).contains('\x1b'));
    }

    #[test]
    fn json_carries_everything() {
        let told = as_json(&some(), true);
        assert_eq!((&told["warnings"], &told["exit_code"]), (&json!(1), &json!(1)));
        assert_eq!(told["findings"][1]["remedy"], "another disk");
        assert_eq!(told["findings"][0].get("remedy"), None);
    }
}
