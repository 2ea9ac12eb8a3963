//! Where and when something was measured.

use serde::Serialize;
use std::{
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

#[derive(Serialize)]
pub struct Machine {
    pub gpu: Option<String>,
    driver: Option<String>,
}

impl Machine {
    pub fn of(backend: &str) -> Machine {
        let found = (backend == "cuda").then(ask_driver).flatten();
        let (gpu, driver) = found.unzip();
        Machine { gpu, driver }
    }
}

/// Name and driver of the first GPU.
fn ask_driver() -> Option<(String, String)> {
    let query = ["--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"];
    let output = Command::new("nvidia-smi").args(query).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (gpu, driver) = text.trim().split_once(", ")?;
    Some((gpu.to_owned(), driver.to_owned()))
}

/// ISO date.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// ISO date of a day counted from 1970-01-01.
fn date(mut day: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        for (day, expected) in
            [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_781, "2026-11-24")]
        {
            assert_eq!(date(day), expected);
        }
    }
}
