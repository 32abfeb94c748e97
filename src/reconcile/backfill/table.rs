//! One table on its way: its stage, the ranges that are cut off and not yet copied, what was counted.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use super::copy::Part;
use super::ledger::{self, Onward};
use super::pace::ChunkSize;
use super::plan::{Key, Plan, Range};
use super::status::{BackfillTable, Counts, Meter, remaining};
use crate::reconcile::key::KeyRange;

/// Where a table stands. `Copied` is over once what follows the rows is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Copying,
    Copied,
    Done,
    Refused,
    Failed,
}

impl Stage {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Copying => "copying",
            Self::Copied => "copied",
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

pub(super) struct TableJob {
    pub plan: Arc<Plan>,
    pub stage: Stage,
    pub note: Option<String>,
    /// Cut off and not yet copied.
    pub ready: VecDeque<Part>,
    /// Handed to workers.
    pub out: usize,
    /// `None` once the last range was cut off.
    pub next: Option<Onward>,
    /// Its definition is another one than in the plan.
    pub reshaped: bool,
    pub size: ChunkSize,
    pub counts: Counts,
    pub meter: Meter,
}

impl TableJob {
    pub(super) fn new(plan: Plan) -> Self {
        let mut table = Self {
            plan: Arc::new(plan),
            stage: Stage::Waiting,
            note: None,
            ready: VecDeque::new(),
            out: 0,
            next: None,
            reshaped: false,
            size: ChunkSize::first(0, 0),
            counts: Counts::default(),
            meter: Meter::default(),
        };
        table.begin_anew();
        table
    }

    pub(super) fn begin_anew(&mut self) {
        self.stage = Stage::Waiting;
        self.counts = Counts::default();
        self.next = None;
        let (rows, bytes) = (self.plan.rows_expected, self.plan.bytes_expected);
        self.size = ChunkSize::first(rows, bytes);
        let whole = self.plan.key.is_none() || ChunkSize::holds(rows, bytes);
        self.ready = VecDeque::from([if whole { Part::Whole } else { Part::Begin }]);
    }

    /// Goes on where an earlier backfill came to.
    pub(super) fn resume(&mut self, begun: &ledger::Begun) {
        let same_key = begun.key.is_some() && begun.key == self.plan.key.as_ref().map(Key::signature);
        if !same_key || begun.ranges.iter().any(|range| range.keys == KeyRange::default()) {
            return;
        }
        let (gaps, next) = ledger::missing(&begun.ranges);
        self.stage = Stage::Copying;
        self.ready = gaps
            .into_iter()
            .map(|(number, keys)| Part::Range(Range { number, keys }))
            .collect();
        self.next = next;
        for range in &begun.ranges {
            self.counts.merge(range.counts);
        }
    }

    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.plan.schema, self.plan.name)
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Waiting | Stage::Copying)
    }

    pub(super) fn is_copied(&self) -> bool {
        self.stage == Stage::Copying && self.ready.is_empty() && self.out == 0 && self.next.is_none()
    }

    pub(super) fn fail(&mut self, stage: Stage, why: Option<String>) {
        self.stage = stage;
        self.note = why;
        self.ready.clear();
        self.next = None;
    }

    /// Of the rows that were expected.
    pub(super) fn fraction(&self) -> f64 {
        if !self.is_open() {
            return 1.0;
        }
        let expected = self.plan.rows_expected.max(self.counts.read + 1);
        self.counts.read as f64 / expected as f64
    }

    pub(super) fn status(&self, now: Instant) -> BackfillTable {
        let rate = self.meter.rate(now);
        let left = self.plan.rows_expected.saturating_sub(self.counts.read) as f64;
        BackfillTable {
            name: self.name(),
            state: self.stage.as_str().into(),
            note: self.note.clone(),
            rows_expected: self.plan.rows_expected,
            counts: self.counts,
            rows_per_second: if self.is_open() { rate } else { 0.0 },
            remaining_seconds: if self.stage == Stage::Copying {
                remaining(left, rate)
            } else {
                None
            },
        }
    }
}
