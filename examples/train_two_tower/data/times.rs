//! The time of an interaction, as files write it: a number, or a date of ISO 8601.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// A point in time, exact enough to order nanoseconds since 1970, whether whole or with a fraction.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Time {
    /// Rounded down.
    whole: i64,
    /// From 0 to below 1.
    fraction: f64,
}

/// What a column of times holds. A number and a date cannot be compared, so a file has one kind alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Number,
    Date,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Number => "a number",
            Kind::Date => "a date",
        }
    }
}

/// The rule that error messages name.
pub const RULE: &str =
    "a number such as 1287532527 or 1287532527.5, or a date such as 2010-10-19 or 2010-10-19T23:55:27Z";

impl Time {
    /// Stands for the order of the file where a file has no time: all are equal, and a stable sort keeps them in place.
    pub const NONE: Time = Time { whole: 0, fraction: 0.0 };

    pub fn total_cmp(&self, other: &Time) -> std::cmp::Ordering {
        self.whole.cmp(&other.whole).then(self.fraction.total_cmp(&other.fraction))
    }

    pub fn parse(text: &str) -> Option<(Time, Kind)> {
        match number(text) {
            Some(time) => Some((time, Kind::Number)),
            None => Some((date(text)?, Kind::Date)),
        }
    }
}

fn number(text: &str) -> Option<Time> {
    if let Ok(whole) = text.parse::<i64>() {
        return Some(Time { whole, fraction: 0.0 });
    }
    match text.split_once('.') {
        // The digits by themselves: as one f64, seconds since 1970 would be rounded to a quarter of a microsecond.
        Some((whole, fraction)) if fraction.bytes().all(|byte| byte.is_ascii_digit()) => {
            let negative = whole.starts_with('-');
            let whole = if fraction.is_empty() { whole.parse().ok()? } else { whole_part(whole)? };
            let fraction: f64 = if fraction.is_empty() { 0.0 } else { format!("0.{fraction}").parse().ok()? };
            from_parts(whole, if negative { -fraction } else { fraction })
        }
        // With an exponent.
        _ => {
            let number = text.parse::<f64>().ok().filter(|number| number.abs() < i64::MAX as f64)?;
            from_parts(number.trunc() as i64, number.fract())
        }
    }
}

/// The digits before a point, which may be missing.
fn whole_part(text: &str) -> Option<i64> {
    if matches!(text, "" | "-" | "+") { Some(0) } else { text.parse().ok() }
}

/// `fraction` is above −1 and below 1.
fn from_parts(whole: i64, fraction: f64) -> Option<Time> {
    if fraction >= 0.0 {
        return Some(Time { whole, fraction });
    }
    // So near to the whole number that it rounds to it: still before it.
    let fraction = f64::min(1.0 + fraction, 1.0 - f64::EPSILON);
    Some(Time { whole: whole.checked_sub(1)?, fraction })
}

/// A date, or date and time with `T` or a space between; without a zone it is taken for UTC.
fn date(text: &str) -> Option<Time> {
    let at = match text.parse::<Timestamp>() {
        Ok(at) => at,
        Err(_) => TimeZone::UTC.to_timestamp(text.parse::<DateTime>().ok()?).ok()?,
    };
    let nanoseconds = at.as_nanosecond();
    let whole = nanoseconds.div_euclid(1_000_000_000) as i64;
    Some(Time { whole, fraction: nanoseconds.rem_euclid(1_000_000_000) as f64 * 1e-9 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Time {
        Time::parse(text).unwrap_or_else(|| panic!("{text} is a time")).0
    }

    #[test]
    fn numbers_are_ordered_as_their_values() {
        let ascending = [
            "-9223372036854775808",
            "-2",
            "-1.5",
            "-1",
            "-.25",
            "-0.0000000000000000001",
            "0",
            ".5",
            "1",
            "1.",
            "1.0",
            "+2",
            "1.7e9",
            "1700000000.123456788",
            "1700000000.123456789",
            "1700000000000000001",
            "1700000000000000002",
            "9223372036854775807",
        ];
        for pair in ascending.windows(2) {
            let equal = pair[1] == "1." || pair[1] == "1.0";
            let (first, second) = (time(pair[0]), time(pair[1]));
            assert!(if equal { first == second } else { first < second }, "{pair:?}: {first:?} {second:?}");
        }
    }

    #[test]
    fn dates_are_seconds_since_1970_in_utc() {
        for (text, whole, fraction) in [
            ("1970-01-01", 0, 0.0),
            ("1970-01-02", 86_400, 0.0),
            ("2010-10-19T23:55:27Z", 1_287_532_527, 0.0),
            ("2010-10-19 23:55:27", 1_287_532_527, 0.0),
            ("2010-10-19T23:55:27", 1_287_532_527, 0.0),
            ("2010-10-20 01:55:27+02:00", 1_287_532_527, 0.0),
            ("2010-10-19T16:55:27-0700", 1_287_532_527, 0.0),
            ("2010-10-19 23:55", 1_287_532_500, 0.0),
            ("2010-10-19T23:55:27.5Z", 1_287_532_527, 0.5),
            ("1969-12-31 23:59:59.75", -1, 0.75),
        ] {
            let (time, kind) = Time::parse(text).unwrap_or_else(|| panic!("{text} is a time"));
            assert_eq!((time.whole, kind), (whole, Kind::Date), "{text}");
            assert!((time.fraction - fraction).abs() < 1e-9, "{text}: {time:?}");
        }
        assert_eq!(time("20101019"), Time { whole: 20_101_019, fraction: 0.0 });
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in [
            "",
            "noon",
            "inf",
            "NaN",
            "1e400",
            "9223372036854775808",
            "1e19",
            "1.2.3",
            "1.-5",
            ".",
            "-",
            "1,5",
            "2010-13-01",
            "2010-02-30",
            "2010-10-19T25:00:00",
            "12/1/2010 8:26",
            "2010-10-19T23:55:27Q",
            "1970-01-01x",
        ] {
            assert_eq!(Time::parse(text), None, "{text:?}");
        }
    }
}
