//! The approach to a hold: fewer and fewer transactions are let run at once.
//!
//! Where a server has more transactions open than it can work on, they wait for each other's locks
//! and for processors; a hold would wait for all of them. How long a transaction takes from its
//! client's view is the number that is under way over the rate at which they are done (Little's
//! law), wherever they wait. So as long as the rate does not fall, keeping some of them waiting
//! here, in the order they came, costs nobody anything, and leaves few to wait for in the end.
//! Where the rate does fall, the server could have worked on them: then the hold begins at once.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::registry::{Hold, Registry};

/// As few are waited for at once in any case.
const FEW: usize = 3;
/// Of the transactions that are open at first, an eighth fewer in each step.
const STEPS: usize = 8;
/// A step: long enough to see some transactions done.
const STEP: Duration = Duration::from_millis(40);

/// How the approach went.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Tapered {
    /// Transactions that were open at its beginning, and were let run at its end.
    pub from: usize,
    pub to: usize,
    pub ms: f64,
}

impl Registry {
    /// Approaches the hold, which is there already: what it admits are exceptions.
    pub async fn taper(&self, hold: &Hold) -> Tapered {
        let began = Instant::now();
        let from = self.under_way();
        let (mut limit, mut best, mut slow) = (from, 0, 0);
        // One slow step may be the disk's.
        while limit > FEW && slow < 2 {
            limit = limit.saturating_sub((from / STEPS).max(1)).max(FEW);
            let done = self.admit_up_to(hold, limit, Instant::now() + STEP).await;
            // By half: a few transactions more or less are chance.
            slow = if done * 2 < best { slow + 1 } else { 0 };
            best = best.max(done);
        }
        Tapered {
            from,
            to: limit,
            ms: began.elapsed().as_secs_f64() * 1000.0,
        }
    }

    /// Lets transactions begin while fewer than `limit` are under way; returns how many were done.
    async fn admit_up_to(&self, hold: &Hold, limit: usize, until: Instant) -> usize {
        let (before, mut admitted) = (self.under_way(), 0);
        loop {
            let changed = self.rest_of_one();
            tokio::pin!(changed);
            changed.as_mut().enable();
            admitted += self.admit(hold, limit.saturating_sub(self.under_way()));
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return (before + admitted).saturating_sub(self.under_way());
            }
        }
    }
}
