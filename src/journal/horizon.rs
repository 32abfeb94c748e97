//! Where in the journal a round has to look.
//!
//! The applier now and then reads the end of the primary's log and *then* takes a transaction id.
//! Every greater id is given out later, and a change's position is taken after its transaction's
//! id (the triggers fire after the row was written, `pgtandem.append` asks for the id first): so
//! all changes of greater ids lie at or behind that end. A snapshot's own xmax would not do: it is
//! one beyond the last id that has *completed*, and greater ones may have been at work for long.
//!
//! The index over positions is a BRIN: it costs writers next to nothing, where a btree over ids
//! cost an eighth of the primary's CPU time under TPC-B (its rightmost page is every writer's).

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::read::Unsigned;
use super::{JournalError, doing};
use crate::catalog::snapshot::Snapshot;

/// More are thinned out: then rounds look a little further back than they must while a
/// transaction stays open for long.
const HORIZONS_MAX: usize = 1024;

/// All changes of transactions whose id is greater than `xid` lie at or behind `position`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Horizon {
    xid: u64,
    position: u64,
}

/// What one session with the primary has learned. It must not outlive that session: after a
/// crash, positions that were never flushed are given out again.
#[derive(Debug, Default)]
pub struct Horizons(VecDeque<Horizon>);

impl Horizons {
    /// `position` was the end of the log before `xid` was given out.
    pub fn learn(&mut self, xid: u64, position: u64) {
        self.0.push_back(Horizon { xid, position });
        if self.0.len() > HORIZONS_MAX {
            let mut keep = false;
            self.0.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// The position at or behind which all changes lie that `since` does not see. 0: not known.
    pub fn of(&mut self, since: &Snapshot) -> u64 {
        let listed = since.in_progress().iter().copied();
        let oldest = listed.min().unwrap_or(u64::MAX).min(since.xmax());
        // Snapshots only grow, so what lies before the one that serves is never asked for again.
        while self.0.get(1).is_some_and(|next| next.xid < oldest) {
            self.0.pop_front();
        }
        self.0
            .front()
            .filter(|horizon| horizon.xid < oldest)
            .map_or(0, |horizon| horizon.position)
    }
}

/// How often a horizon is learned and the index brought up to the table's end, while changes come.
/// What lies between is scanned by every round; each time costs the primary a transaction id.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Keeps rounds from looking at what they have seen.
#[derive(Debug, Default)]
pub struct Lookout {
    /// The first block of each slot that the index does not summarize yet.
    next: [i64; 3],
    last: Option<Instant>,
}

impl Lookout {
    /// Learns a horizon and summarizes what writers have left behind, if it is time. Where
    /// somebody holds a table's lock (a VACUUM by hand), that is done another time.
    pub async fn keep_up(&mut self, client: &Client, horizons: &mut Horizons) -> Result<(), JournalError> {
        if self.last.is_some_and(|last| last.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        self.last = Some(Instant::now());
        let answer = client
            .query_one(
                "SELECT log_end, xid, next FROM pgtandem.look_out($1)",
                &[&&self.next[..]],
            )
            .await;
        let row = match answer {
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(()),
            answer => answer.map_err(doing("summarize the journal's index"))?,
        };
        horizons.learn(row.get::<_, Unsigned>(1).0, row.get::<_, Unsigned>(0).0);
        if let Ok(next) = row.get::<_, Vec<i64>>(2).try_into() {
            self.next = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn horizons(learned: &[(u64, u64)]) -> Horizons {
        let mut horizons = Horizons::default();
        for &(xid, position) in learned {
            horizons.learn(xid, position);
        }
        horizons
    }

    #[test]
    fn a_round_looks_behind_the_last_horizon_below_all_it_has_not_seen() {
        for (learned, since, position) in [
            (&[][..], "10:10:", 0),
            (&[(20, 100)], "10:20:", 0),
            (&[(20, 100)], "21:21:", 100),
            (&[(20, 100), (30, 200)], "30:30:", 100),
            (&[(20, 100), (30, 200)], "31:31:", 200),
            // 25 stays open.
            (&[(20, 100), (30, 200), (40, 300)], "25:50:25", 100),
            (&[(20, 100), (30, 200), (40, 300)], "15:50:15,45", 0),
        ] {
            let since: Snapshot = since.parse().unwrap();
            assert_eq!(horizons(learned).of(&since), position, "{learned:?} {since}");
        }
    }

    #[test]
    fn what_is_no_longer_needed_goes_and_the_rest_is_thinned_out() {
        let mut horizons = Horizons::default();
        let open: Snapshot = "15:60000:15".parse().unwrap();
        for turn in 1..=5000 {
            horizons.learn(turn * 10, turn * 100);
            assert_eq!(horizons.of(&open), if turn * 10 < 15 { turn * 100 } else { 100 });
        }
        assert!(horizons.0.len() <= HORIZONS_MAX);
        let position = horizons.of(&"40000:60000:40000".parse().unwrap());
        assert!((300_000..400_000).contains(&position), "{position}");
        horizons.of(&"60000:60000:".parse().unwrap());
        assert_eq!(horizons.0.len(), 1);
    }
}
