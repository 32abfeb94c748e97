//! Two values of one column, as text: whether they say the same under a rule, and whether they
//! differ in precision only. Pure.

use std::time::Duration;

use serde_json::Value;

use crate::config::How;

/// `pg_type.oid` of types with a precision.
mod oid {
    pub(super) const FLOAT4: u32 = 700;
    pub(super) const FLOAT8: u32 = 701;
    pub(super) const NUMERIC: u32 = 1700;
    pub(super) const TIME: u32 = 1083;
    pub(super) const TIMESTAMP: u32 = 1114;
    pub(super) const TIMESTAMPTZ: u32 = 1184;
    pub(super) const TIMETZ: u32 = 1266;
    pub(super) const NAME: u32 = 19;
    pub(super) const TEXT: u32 = 25;
    pub(super) const BPCHAR: u32 = 1042;
    pub(super) const VARCHAR: u32 = 1043;
}

/// A value; `None` is SQL's null.
pub(super) type Cell<'a> = Option<&'a [u8]>;

/// Whether two values are alike by a rule, or equal.
pub(super) fn alike(how: Option<How>, one: Cell<'_>, other: Cell<'_>) -> bool {
    if one == other {
        return true;
    }
    let (Some(one), Some(other)) = (text(one), text(other)) else {
        return false;
    };
    match how {
        None | Some(How::Collation) => false,
        Some(How::FloatTolerance(share)) => numbers_within(one, other, share),
        Some(How::TimestampPrecision(precision)) => times_within(one, other, precision),
        Some(How::Json) => same_json(one, other),
    }
}

/// Whether two different values are the same one in another precision: floats but for their last
/// digits, numerics and times of which one is the other with fewer digits.
pub(super) fn only_precision(type_oid: u32, one: Cell<'_>, other: Cell<'_>) -> bool {
    let (Some(one), Some(other)) = (text(one), text(other)) else {
        return false;
    };
    match type_oid {
        // As many digits as the type holds for sure.
        oid::FLOAT4 => numbers_within(one, other, 1e-5),
        oid::FLOAT8 => numbers_within(one, other, 1e-13),
        oid::NUMERIC => fewer_digits(one, other),
        oid::TIME | oid::TIMESTAMP | oid::TIMESTAMPTZ | oid::TIMETZ => {
            let digits = |text| split_time(text).map(|(_, time, _)| fraction(time).len());
            match (digits(one), digits(other)) {
                (Some(few), Some(many)) if few != many => {
                    let digits = u32::try_from(few.min(many)).unwrap_or(0);
                    times_within(one, other, Duration::from_secs(1) / 10_u32.saturating_pow(digits))
                }
                _ => false,
            }
        }
        _ => false,
    }
}

/// Whether values of a type are sorted by a collation.
pub(super) const fn is_collated(type_oid: u32) -> bool {
    matches!(type_oid, oid::NAME | oid::TEXT | oid::BPCHAR | oid::VARCHAR)
}

fn text(cell: Cell<'_>) -> Option<&str> {
    std::str::from_utf8(cell?).ok()
}

fn numbers_within(one: &str, other: &str, share: f64) -> bool {
    let (Ok(one), Ok(other)) = (one.parse::<f64>(), other.parse::<f64>()) else {
        return false;
    };
    one.is_finite() && other.is_finite() && (one - other).abs() <= share * one.abs().max(other.abs())
}

/// Whether one decimal number is the other rounded or cut to fewer digits behind the point.
fn fewer_digits(one: &str, other: &str) -> bool {
    let scale = |text: &str| text.split_once('.').map_or(0, |(_, digits)| digits.len());
    let (few, many) = (scale(one).min(scale(other)), scale(one).max(scale(other)));
    let (Ok(first), Ok(second)) = (one.parse::<f64>(), other.parse::<f64>()) else {
        return false;
    };
    let unit = 10_f64.powi(-i32::try_from(few).unwrap_or(i32::MAX));
    few < many && first.is_finite() && (first - second).abs() < unit
}

/// Date, time of day, and what follows it (a zone, an era) of an ISO time.
fn split_time(text: &str) -> Option<(&str, &str, &str)> {
    let (date, rest) = match text.find(' ') {
        Some(at) if text[at + 1..].starts_with(|c: char| c.is_ascii_digit()) => (&text[..at], &text[at + 1..]),
        _ => ("", text),
    };
    let end = rest
        .find(|c: char| !(c.is_ascii_digit() || c == ':' || c == '.'))
        .unwrap_or(rest.len());
    rest[..end].contains(':').then(|| (date, &rest[..end], &rest[end..]))
}

fn fraction(time: &str) -> &str {
    time.split_once('.').map_or("", |(_, fraction)| fraction)
}

/// Microseconds since midnight.
fn microseconds(time: &str) -> Option<u64> {
    let (whole, fraction) = time.split_once('.').unwrap_or((time, ""));
    let mut seconds = 0;
    for part in whole.split(':') {
        seconds = seconds * 60 + part.parse::<u64>().ok()?;
    }
    let digits: u64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    Some(seconds * 1_000_000 + digits)
}

fn times_within(one: &str, other: &str, precision: Duration) -> bool {
    let (Some((date, one, zone)), Some((other_date, other, other_zone))) = (split_time(one), split_time(other)) else {
        return false;
    };
    let (Some(one), Some(other)) = (microseconds(one), microseconds(other)) else {
        return false;
    };
    date == other_date && zone == other_zone && u128::from(one.abs_diff(other)) < precision.as_micros()
}

fn same_json(one: &str, other: &str) -> bool {
    let (Ok(one), Ok(other)) = (serde_json::from_str::<Value>(one), serde_json::from_str::<Value>(other)) else {
        return false;
    };
    same_document(&one, &other)
}

fn same_document(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same_document(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one
                    .iter()
                    .all(|(key, value)| other.get(key).is_some_and(|other| same_document(value, other)))
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(text: &str) -> Cell<'_> {
        (text != "null").then_some(text.as_bytes())
    }

    #[test]
    fn alike_by_a_rule() {
        let millisecond = How::TimestampPrecision(Duration::from_millis(1));
        for (how, one, other, expected) in [
            (None, "a", "a", true),
            (None, "null", "null", true),
            (None, "null", "", false),
            (None, "1.0", "1.00", false),
            (Some(How::FloatTolerance(1e-6)), "100", "100.00001", true),
            (Some(How::FloatTolerance(1e-6)), "100", "100.001", false),
            (Some(How::FloatTolerance(1e-6)), "0", "0.0000001", false),
            (Some(How::FloatTolerance(1e-6)), "null", "0", false),
            (Some(How::FloatTolerance(1e-6)), "NaN", "1", false),
            (Some(How::FloatTolerance(1e-6)), "Infinity", "1", false),
            (
                Some(millisecond),
                "2026-01-02 03:04:05.123456+00",
                "2026-01-02 03:04:05.123+00",
                true,
            ),
            (
                Some(millisecond),
                "2026-01-02 03:04:05.9999+00",
                "2026-01-02 03:04:06+00",
                true,
            ),
            (
                Some(millisecond),
                "2026-01-02 03:04:05.123+00",
                "2026-01-02 03:04:05.124+00",
                false,
            ),
            (
                Some(millisecond),
                "2026-01-02 03:04:05.123+00",
                "2026-01-02 03:04:05.123+01",
                false,
            ),
            (Some(millisecond), "2026-01-02 03:04:05", "2026-01-03 03:04:05", false),
            (Some(millisecond), "03:04:05.1234", "03:04:05.1233", true),
            (Some(millisecond), "yesterday", "today", false),
            (Some(How::Json), r#"{"a": 1, "b": [1.0]}"#, r#"{"b":[1],"a":1}"#, true),
            (Some(How::Json), r#"{"a": 1}"#, r#"{"a": 1, "b": 2}"#, false),
            (Some(How::Json), "[1,2]", "[2,1]", false),
            (Some(How::Json), "{", "{ ", false),
            (Some(How::Collation), "a", "b", false),
        ] {
            assert_eq!(alike(how, cell(one), cell(other)), expected, "{how:?} {one} {other}");
            assert_eq!(alike(how, cell(other), cell(one)), expected, "{how:?} {other} {one}");
        }
    }

    #[test]
    fn precision_only() {
        for (type_oid, one, other, expected) in [
            (oid::FLOAT8, "0.30000000000000004", "0.3", true),
            (oid::FLOAT8, "0.31", "0.3", false),
            (oid::FLOAT4, "0.1", "0.100000001", true),
            (oid::NUMERIC, "1.5", "1.50", true),
            (oid::NUMERIC, "1.57", "1.6", true),
            (oid::NUMERIC, "1.57", "1.58", false),
            (oid::NUMERIC, "1.57", "2.7", false),
            (
                oid::TIMESTAMP,
                "2026-01-02 03:04:05.123456",
                "2026-01-02 03:04:05.123",
                true,
            ),
            (
                oid::TIMESTAMP,
                "2026-01-02 03:04:05.123456",
                "2026-01-02 03:04:05",
                true,
            ),
            (oid::TIMESTAMP, "2026-01-02 03:04:05.1", "2026-01-02 03:04:05.2", false),
            (oid::TIMESTAMP, "2026-01-02 03:04:05.1", "2026-01-02 03:04:07", false),
            (oid::TEXT, "1.5", "1.50", false),
        ] {
            assert_eq!(
                only_precision(type_oid, cell(one), cell(other)),
                expected,
                "{one} {other}"
            );
        }
    }
}
