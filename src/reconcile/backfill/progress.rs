//! How far a job is, and what is said of it.

use tokio::time::Instant;

use super::job::Job;
use super::status::{BackfillStatus, Counts, remaining};
use super::stop::Ended;
use super::table::TableJob;

impl Job {
    pub(super) fn measure(&mut self, now: Instant) {
        let size = |table: &TableJob| table.plan.bytes_expected as f64;
        self.meter.note(
            now,
            self.tables.iter().map(|table| size(table) * table.fraction()).sum(),
        );
        let counts = self.counts();
        self.rows.note(now, counts.read as f64);
        self.bytes.note(now, counts.bytes as f64);
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.tables.iter().for_each(|table| counts.merge(table.counts));
        counts
    }

    pub(super) fn publish(&self, ended: &Ended, running: bool) {
        let now = Instant::now();
        let settings = *self.setup.settings.borrow();
        let (state, note) = match ended {
            _ if running => ("running", None),
            Ended::Done => ("done", None),
            Ended::Cancelled => ("cancelled", None),
            Ended::Stopped(why) => ("stopped", Some(why.clone())),
            Ended::Interrupted(why) => ("interrupted", Some(why.clone())),
        };
        let left: f64 = self
            .tables
            .iter()
            .map(|table| table.plan.bytes_expected as f64 * (1.0 - table.fraction()))
            .sum();
        self.report.send_replace(Some(BackfillStatus {
            state: state.into(),
            note,
            workers: settings.workers,
            max_rate: settings.max_rate.map(|rate| rate.to_string()),
            slowed_by: self.slowed_by.clone().filter(|_| running),
            rows_expected: self.tables.iter().map(|table| table.plan.rows_expected).sum(),
            counts: self.counts(),
            rows_per_second: if running { self.rows.rate(now) } else { 0.0 },
            bytes_per_second: if running { self.bytes.rate(now) } else { 0.0 },
            remaining_seconds: if running {
                remaining(left, self.meter.rate(now))
            } else {
                None
            },
            tables: self.tables.iter().map(|table| table.status(now)).collect(),
        }));
    }
}
