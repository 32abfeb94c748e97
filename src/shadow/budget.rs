//! Whether canary reads cost more than they may: errors, mismatches and time over a window. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::canary::CanaryCounts;
use crate::config::Budget;

/// Looks that are kept of a window; more of them would tell nothing new.
const LOOKS_MAX: u32 = 120;

/// What was counted since the window's beginning.
#[derive(Debug, Default)]
pub struct Window {
    looks: VecDeque<(Instant, CanaryCounts)>,
}

impl Window {
    /// Takes another look at the counters; returns what they have counted within the window.
    pub fn look(&mut self, now: Instant, counts: &CanaryCounts, window: Duration) -> CanaryCounts {
        // The last look before the window's beginning stays: what came since is all of it.
        while self.looks.get(1).is_some_and(|(at, _)| now - *at >= window) {
            self.looks.pop_front();
        }
        let recent = self.looks.back().is_some_and(|(at, _)| now - *at < window / LOOKS_MAX);
        if !recent {
            self.looks.push_back((now, counts.clone()));
        }
        self.looks
            .front()
            .map_or_else(CanaryCounts::default, |(_, first)| counts.since(first))
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        self.looks.clear();
    }
}

/// What a window comes to, beside its budget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// Reads that were sent to the secondary, or should have been.
    pub reads: u64,
    /// Per cent of them that the secondary failed at.
    pub errors: f64,
    /// Per cent of those compared that were confirmed mismatches.
    pub mismatches: f64,
    /// The secondary's time of the primary's, for the same reads; 0 where none is known on both.
    pub latency_ratio: f64,
}

impl Spent {
    pub fn of(window: &CanaryCounts) -> Self {
        let percent = |part: u64, all: u64| {
            if all == 0 {
                0.0
            } else {
                100.0 * part as f64 / all as f64
            }
        };
        Self {
            reads: window.tried(),
            errors: percent(window.failures(), window.tried()),
            mismatches: percent(window.mismatched, window.compared),
            latency_ratio: if window.primary_ms > 0.0 {
                window.secondary_ms / window.primary_ms
            } else {
                0.0
            },
        }
    }
}

/// Why the canary has to end, where it has.
pub fn exceeded(budget: &Budget, window: &CanaryCounts) -> Option<String> {
    let spent = Spent::of(window);
    if spent.reads >= budget.min_reads && spent.errors > budget.errors {
        return Some(format!(
            "{:.2} % of {} reads failed on the secondary; the budget is {} %",
            spent.errors, spent.reads, budget.errors
        ));
    }
    if window.compared >= budget.min_reads && spent.mismatches > budget.mismatches {
        return Some(format!(
            "{:.2} % of {} compared reads were mismatches; the budget is {} %",
            spent.mismatches, window.compared, budget.mismatches
        ));
    }
    if window.timed >= budget.min_reads && spent.latency_ratio > budget.latency_ratio {
        return Some(format!(
            "the secondary took {:.2} times as long as the primary for {} reads; the budget is {}",
            spent.latency_ratio, window.timed, budget.latency_ratio
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_of_the_budget_ends_it() {
        let budget = Budget {
            min_reads: 10,
            ..Budget::default()
        };
        let counts = |errors, mismatched, secondary_ms| CanaryCounts {
            served: 100 - errors,
            errors,
            compared: 100,
            mismatched,
            timed: 100,
            primary_ms: 100.0,
            secondary_ms,
            ..CanaryCounts::default()
        };
        for (window, expected) in [
            (counts(0, 0, 100.0), None),
            (counts(1, 0, 300.0), None),
            (counts(2, 0, 100.0), Some("2.00 % of 100 reads failed")),
            (counts(0, 1, 100.0), Some("1.00 % of 100 compared reads")),
            (counts(0, 0, 301.0), Some("3.01 times as long")),
            (
                CanaryCounts {
                    errors: 9,
                    ..CanaryCounts::default()
                },
                None,
            ),
        ] {
            let found = exceeded(&budget, &window);
            match expected {
                None => assert_eq!(found, None),
                Some(expected) => assert!(found.as_deref().unwrap_or_default().contains(expected), "{found:?}"),
            }
        }
    }

    #[test]
    fn what_lies_before_the_window_does_not_count() {
        let begun = Instant::now();
        let mut window = Window::default();
        let span = Duration::from_secs(60);
        let counts = |errors| CanaryCounts {
            errors,
            ..CanaryCounts::default()
        };
        for (second, errors, within) in [
            (0, 5, 0),
            (10, 7, 2),
            (59, 8, 3),
            (70, 9, 2),
            (131, 9, 0),
            (140, 20, 11),
            // In between nothing new is kept, but all is counted.
            (140, 21, 12),
        ] {
            let now = begun + Duration::from_secs(second);
            assert_eq!(window.look(now, &counts(errors), span).errors, within, "{second}");
        }
        window.clear();
        assert_eq!(window.look(begun, &counts(30), span).errors, 0);
    }
}
