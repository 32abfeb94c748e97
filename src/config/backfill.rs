//! `backfill:` in proxy.yaml.

use std::time::Duration;

use serde::Deserialize;

use super::value::{Percent, Seconds, Text};

/// How existing rows are copied; all of it can be changed while they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backfill {
    /// Ranges that are copied at once, each over a connection to either side.
    pub workers: usize,
    pub max_rate: Option<MaxRate>,
    /// How long mirroring may stand still for one round of copying: ranges are sized by it.
    pub hold_max: Duration,
    /// Copying pauses while the secondary is further behind than this.
    pub max_lag: Duration,
    /// Copying slows down while the primary takes longer than this to answer a small query.
    pub max_primary_latency: Duration,
    /// Per cent of a table's rows that the secondary may refuse (ten are always set aside)
    /// before the backfill stops.
    pub error_threshold: f64,
    /// How often a failure that may pass (a lost connection) is tried again before it stops.
    pub retry_attempts: u32,
}

impl Default for Backfill {
    fn default() -> Self {
        Self {
            workers: 2,
            max_rate: None,
            hold_max: Duration::from_millis(250),
            max_lag: Duration::from_secs(2),
            max_primary_latency: Duration::from_millis(100),
            error_threshold: 0.1,
            retry_attempts: 5,
        }
    }
}

/// At most so much is copied in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxRate {
    Rows(u64),
    /// As COPY writes them.
    Bytes(u64),
}

impl std::fmt::Display for MaxRate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows(rows) => write!(f, "{rows} rows/s"),
            Self::Bytes(bytes) => write!(f, "{bytes} B/s"),
        }
    }
}

/// Parses `50000` or `50000 rows/s`, and `20MiB/s`, `500 kB/s` or `1000 B/s`.
impl std::str::FromStr for MaxRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected rows or bytes a second, such as 50000, 50000rows/s or 20MiB/s".to_owned();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| expected())?;
        if number == 0 {
            return Err("a rate of 0 would never end; cancel the backfill instead".into());
        }
        let unit = unit.trim();
        let factor = match unit.strip_suffix("/s").unwrap_or(unit) {
            "" | "rows" => return Ok(Self::Rows(number)),
            "B" => 1,
            "kB" => 1000,
            "KiB" => 1 << 10,
            "MB" => 1_000_000,
            "MiB" => 1 << 20,
            "GB" => 1_000_000_000,
            "GiB" => 1 << 30,
            _ => return Err(expected()),
        };
        Ok(Self::Bytes(number.saturating_mul(factor)))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawBackfill {
    workers: usize,
    max_rate: Option<Text>,
    hold_max: Seconds,
    max_lag: Seconds,
    max_primary_latency: Seconds,
    error_threshold: Percent,
    retry_attempts: u32,
}

impl Default for RawBackfill {
    fn default() -> Self {
        let usual = Backfill::default();
        Self {
            workers: usual.workers,
            max_rate: None,
            hold_max: Seconds(usual.hold_max),
            max_lag: Seconds(usual.max_lag),
            max_primary_latency: Seconds(usual.max_primary_latency),
            error_threshold: Percent(usual.error_threshold),
            retry_attempts: usual.retry_attempts,
        }
    }
}

impl RawBackfill {
    pub(super) fn check(self) -> Result<Backfill, String> {
        if self.workers == 0 {
            return Err("backfill: workers: at least 1".into());
        }
        let max_rate: Option<MaxRate> = match self.max_rate {
            Some(text) => Some(text.0.parse().map_err(|why| format!("backfill: max_rate: {why}"))?),
            None => None,
        };
        Ok(Backfill {
            workers: self.workers,
            max_rate,
            hold_max: self.hold_max.0,
            max_lag: self.max_lag.0,
            max_primary_latency: self.max_primary_latency.0,
            error_threshold: self.error_threshold.0,
            retry_attempts: self.retry_attempts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::MaxRate;

    #[test]
    fn rates() {
        for (text, rate) in [
            ("50000", Some(MaxRate::Rows(50_000))),
            ("7 rows/s", Some(MaxRate::Rows(7))),
            ("20MiB/s", Some(MaxRate::Bytes(20 << 20))),
            ("5 kB", Some(MaxRate::Bytes(5000))),
            ("0", None),
            ("fast", None),
            ("5 parsecs", None),
        ] {
            assert_eq!(text.parse().ok(), rate, "{text}");
        }
    }

    #[test]
    fn a_rate_is_read_as_it_is_written() {
        for rate in [MaxRate::Rows(3), MaxRate::Bytes(4096)] {
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
    }
}
