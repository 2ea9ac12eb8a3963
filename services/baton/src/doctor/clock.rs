//! Clocks: this machine's against each service's, by the `Date` of an HTTP answer. That counts whole seconds and was
//! stamped some time between question and answer, so what is measured has an error, which is told.

use super::finding::Finding;
use std::time::{Duration, SystemTime};

const CHECK: &str = "clock";
/// Beyond measuring errors. Logs and traces of several services are read side by side.
const TOLERATED: f64 = 1.0;
/// Certificates begin to be refused.
const WILD: f64 = 60.0;

/// In seconds; positive if the service's clock is ahead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Skew {
    pub seconds: f64,
    pub error: f64,
}

/// `asked`: this machine's clock when the question was sent; `date`: what the answer said.
pub fn skew(asked: SystemTime, round_trip: Duration, date: &str) -> Option<Skew> {
    let stamped = httpdate::parse_http_date(date).ok()?;
    let since =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map(|since| since.as_secs_f64()).ok();
    let half = round_trip.as_secs_f64() / 2.0;
    // Half a second each way: the date says which second it was, not where in it.
    Some(Skew { seconds: since(stamped)? + 0.5 - (since(asked)? + half), error: half + 0.5 })
}

pub fn judge(subject: &str, skew: Option<Skew>) -> Finding {
    let Some(Skew { seconds, error }) = skew else {
        return Finding::not_checked(CHECK, subject, "its answer carries no date");
    };
    let found = format!("{seconds:+.1} s from this machine's, ±{error:.1} s");
    let beyond = seconds.abs() - error;
    let severity = match beyond {
        _ if beyond <= TOLERATED => return Finding::ok(CHECK, subject, found),
        _ if beyond <= WILD => Finding::warning(CHECK, subject, found),
        _ => Finding::error(CHECK, subject, found),
    };
    severity
        .expected(format!(
            "within {TOLERATED} s: logs and traces are read side by side, certificates have dates"
        ))
        .remedy("run a time service on both machines (chrony, systemd-timesyncd) and see that it is in step")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    #[test]
    fn half_a_round_trip_is_the_error() {
        let asked = SystemTime::UNIX_EPOCH + Duration::from_millis(784_111_777_400);
        let found = skew(asked, Duration::from_millis(200), "Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert!(found.seconds.abs() < 1e-6 && (found.error - 0.6).abs() < 1e-6, "{found:?}");
        assert_eq!(skew(asked, Duration::ZERO, "yesterday"), None);
    }

    #[test]
    fn only_what_the_error_cannot_explain_is_a_skew() {
        for (seconds, error, severity) in [
            (0.4, 0.5, Severity::Ok),
            (-1.4, 0.5, Severity::Ok),
            (2.0, 0.6, Severity::Warning),
            (-30.0, 0.6, Severity::Warning),
            (30.0, 29.5, Severity::Ok),
            (3600.0, 0.6, Severity::Error),
        ] {
            assert_eq!(judge("x", Some(Skew { seconds, error })).severity, severity, "{seconds} ± {error}");
        }
        assert_eq!(judge("x", None).severity, Severity::NotChecked);
    }
}
