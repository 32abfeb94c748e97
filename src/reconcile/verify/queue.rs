//! The ranges that are still to be read, and the tables that they are of: what the workers share.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use super::work::Work;
use crate::reconcile::compare::Plan;
use crate::reconcile::key::KeyRange;

/// How often a table's ranges may meet a TRUNCATE, or a deadlock.
const PUT_OFF_MAX: u32 = 100;

/// What the workers share.
pub(super) struct Queue {
    pub works: Vec<Work>,
    pub left: VecDeque<(usize, usize)>,
    pub rows: u64,
    /// Ranges of tables that were truncated or rewritten: to be read at another cut.
    pub later: Vec<(usize, usize)>,
    /// Tables that were finished in this batch.
    pub finished: Vec<usize>,
}

impl Queue {
    pub(super) fn next(&mut self) -> Option<(usize, usize, Arc<Plan>, KeyRange)> {
        let (at, part) = self.left.pop_front()?;
        let work = &mut self.works[at];
        work.began.get_or_insert_with(Instant::now);
        let range = work.ranges[part].clone();
        work.plan.clone().map(|plan| (at, part, plan, range))
    }

    pub(super) fn put_off(&mut self, at: usize, part: usize) {
        self.works[at].put_off += 1;
        if self.works[at].put_off > PUT_OFF_MAX {
            self.give_up(
                at,
                "it was truncated, rewritten or locked whenever it was to be read".into(),
            );
        } else {
            self.later.push((at, part));
        }
    }

    /// A table that cannot be read, on whichever side.
    pub(super) fn give_up(&mut self, at: usize, why: String) {
        self.left.retain(|(other, _)| *other != at);
        self.later.retain(|(other, _)| *other != at);
        let work = &mut self.works[at];
        if work.not_compared.is_none() {
            work.not_compared = Some(why);
            self.finished.push(at);
        }
    }
}
