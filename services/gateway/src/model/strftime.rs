//! Dates for chat templates (`strftime_now`), in UTC. Proleptic Gregorian calendar after Howard Hinnant,
//! "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

struct Date {
    year: u64,
    /// 1..=12
    month: u64,
    /// 1..=31
    day: u64,
    /// Days since 1970-01-01, a Thursday.
    days: u64,
    /// Seconds since midnight.
    second: u64,
}

/// `seconds` since the epoch in C's `strftime` notation; an unknown directive is an error that names it.
pub fn format(format: &str, seconds: u64) -> Result<String, String> {
    let date = Date::new(seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match c {
            '%' => out.push_str(&date.directive(chars.next(), &mut chars)?),
            c => out.push(c),
        }
    }
    Ok(out)
}

impl Date {
    fn new(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        Date { year, month, day: of_year - (153 * shifted_month + 2) / 5 + 1, days, second: seconds % 86_400 }
    }

    fn directive(&self, directive: Option<char>, rest: &mut std::str::Chars<'_>) -> Result<String, String> {
        let month = MONTHS[self.month as usize - 1];
        let weekday = DAYS[(self.days % 7) as usize];
        let hour = self.second / 3600;
        Ok(match directive {
            Some('Y') => self.year.to_string(),
            Some('y') => format!("{:02}", self.year % 100),
            Some('m') => format!("{:02}", self.month),
            Some('d') => format!("{:02}", self.day),
            Some('e') => format!("{:2}", self.day),
            Some('B') => month.to_owned(),
            Some('b' | 'h') => month[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('j') => format!("{:03}", self.day_of_year()),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{:02}", self.second / 60 % 60),
            Some('S') => format!("{:02}", self.second % 60),
            Some('F') => format!("{}-{:02}-{:02}", self.year, self.month, self.day),
            Some('T') => format!("{hour:02}:{:02}:{:02}", self.second / 60 % 60, self.second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some('-') => self.directive(rest.next(), rest)?.trim_start_matches(['0', ' ']).to_owned(),
            other => return Err(format!("strftime_now: unknown directive %{}", other.unwrap_or(' '))),
        })
    }

    fn day_of_year(&self) -> u64 {
        let leap =
            self.year.is_multiple_of(4) && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][self.month as usize - 1];
        before + self.day + u64::from(leap && self.month > 2)
    }
}

#[cfg(test)]
mod tests {
    use super::format;

    #[test]
    fn dates_are_right() {
        assert_eq!(format("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert_eq!(
            format("%A, %-d. %B %Y %H:%M:%S (%j)", 1_709_251_199).unwrap(),
            "Thursday, 29. February 2024 23:59:59 (060)"
        );
        assert_eq!(format("%F %I %p 100%%", 4_102_444_800).unwrap(), "2100-01-01 12 AM 100%");
        assert!(format("%Q", 0).unwrap_err().contains("%Q"));
    }
}
