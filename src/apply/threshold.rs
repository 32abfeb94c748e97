//! When errors are too many to be put aside one by one: their share of the transactions over a
//! window. Pure; the clock is the caller's.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Writes;

/// Below this many errors no share means anything: the first transaction of a quiet hour would
/// be 100 per cent.
pub const ERRORS_MIN: u64 = 10;

/// What came over the last `writes.error_window`.
#[derive(Debug, Default)]
pub struct ErrorWindow {
    /// When, how many transactions, how many of them in error.
    rounds: VecDeque<(Instant, u64, u64)>,
    transactions: u64,
    errors: u64,
}

/// Too many.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{errors} of the last {transactions} transactions could not be mirrored as they are, more than writes.error_threshold allows"
)]
pub struct TooMany {
    pub errors: u64,
    pub transactions: u64,
}

impl ErrorWindow {
    /// Counts a round that is about to be committed; an error means that it must not be, and is
    /// then not counted.
    pub fn count(&mut self, now: Instant, transactions: u64, errors: u64, limit: &Writes) -> Result<(), TooMany> {
        self.expire(now, limit.error_window);
        let all = self.transactions + transactions;
        let wrong = self.errors + errors;
        if errors > 0 && wrong >= ERRORS_MIN && wrong as f64 * 100.0 > limit.error_threshold * all as f64 {
            return Err(TooMany {
                errors: wrong,
                transactions: all,
            });
        }
        if transactions > 0 {
            self.rounds.push_back((now, transactions, errors));
            (self.transactions, self.errors) = (all, wrong);
            self.merge();
        }
        Ok(())
    }

    /// After an operator has said to go on.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    fn expire(&mut self, now: Instant, window: Duration) {
        while let Some(&(at, transactions, errors)) = self.rounds.front() {
            if now.saturating_duration_since(at) <= window {
                break;
            }
            self.rounds.pop_front();
            self.transactions -= transactions;
            self.errors -= errors;
        }
    }

    /// Rounds within one second share an entry: a window of hours stays small.
    fn merge(&mut self) {
        let Some((at, transactions, errors)) = self.rounds.pop_back() else {
            return;
        };
        match self.rounds.back_mut() {
            Some(last) if at.saturating_duration_since(last.0) < Duration::from_secs(1) => {
                last.1 += transactions;
                last.2 += errors;
            }
            _ => self.rounds.push_back((at, transactions, errors)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Acknowledge;

    fn limit(error_threshold: f64) -> Writes {
        Writes {
            acknowledge: Acknowledge::Primary,
            retry_attempts: 5,
            error_threshold,
            error_window: Duration::from_secs(60),
            ..Writes::default()
        }
    }

    #[test]
    fn a_share_counts_only_from_ten_errors_on() {
        let now = Instant::now();
        let mut window = ErrorWindow::default();
        assert_eq!(window.count(now, 9, 9, &limit(5.0)), Ok(()));
        let too_many = window.count(now, 1, 1, &limit(5.0)).unwrap_err();
        assert_eq!((too_many.errors, too_many.transactions), (10, 10));
        // Refused rounds are not counted; clean ones always pass.
        assert_eq!(window.count(now, 500, 0, &limit(5.0)), Ok(()));
        assert_eq!(window.count(now, 1, 1, &limit(5.0)), Ok(()));
        assert_eq!(window.count(now, 100, 100, &limit(5.0)).unwrap_err().errors, 110);
    }

    #[test]
    fn what_is_older_than_the_window_no_longer_counts() {
        let start = Instant::now();
        let mut window = ErrorWindow::default();
        assert_eq!(window.count(start, 9, 9, &limit(5.0)), Ok(()));
        assert_eq!(window.count(start + Duration::from_secs(61), 9, 9, &limit(5.0)), Ok(()));
        assert!(
            window
                .count(start + Duration::from_secs(62), 9, 9, &limit(5.0))
                .is_err()
        );
        window.forget();
        assert_eq!(window.count(start + Duration::from_secs(63), 9, 9, &limit(5.0)), Ok(()));
    }

    #[test]
    fn a_hundred_per_cent_never_stops() {
        let mut window = ErrorWindow::default();
        assert_eq!(window.count(Instant::now(), 1000, 1000, &limit(100.0)), Ok(()));
    }
}
