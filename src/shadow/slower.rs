//! Statements that take clearly longer on new, told in the mismatch log: not wrong answers, so they
//! have lines of their own and no part in the match rate.
//!
//! The rule: of the reads since a statement was last judged, at least [`SLOWER_READS_MIN`], new's
//! median is at least [`SLOWER_MS_MIN`] and `reads.slower_ratio` times legacy's. One statement is
//! told at most once in [`TOLD_AGAIN`].

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tokio::time::{Duration, Instant, timeout};
use xxhash_rust::xxh3::xxh3_64;

use super::compare::Kind;
use super::interval::latency_between;
use super::log::{MismatchLog, events};
use super::plans::{Planner, Plans};
use super::stats::{FingerprintReport, SLOWER_MS_MIN, SLOWER_READS_MIN, ShadowReport, Slower, slower_on_new};
use crate::chain;

/// One statement is told once in this time.
const TOLD_AGAIN: Duration = Duration::from_secs(3600);
/// Of what is found at once, the plans of so many are asked for: each is an EXPLAIN on both sides.
const EXPLAINED_MAX: usize = 10;
/// A side that takes longer has no plan in the line.
const PLAN_PATIENCE: Duration = Duration::from_secs(3);
/// Nodes of a plan that a line has.
const NODES_MAX: usize = 40;

/// A line of the mismatch log: a statement that takes clearly longer on new.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlowerOnNew {
    #[serde(default)]
    pub seq: u64,
    #[serde(default)]
    pub time: String,
    pub database: String,
    /// [`Kind::Slower`]
    pub kind: Kind,
    pub fingerprint: String,
    pub statement: String,
    /// Those of the window: since the statement was last judged.
    pub reads: u64,
    pub legacy: Quantiles,
    pub new: Quantiles,
    /// New's median of legacy's.
    pub ratio: f64,
    /// What had to be reached.
    pub rule: Rule,
    /// Absent where a side could not be asked, or more was found at once than is explained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plans: Option<PlanShapes>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub p50_ms: f64,
    pub p99_ms: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    pub reads: u64,
    pub ratio: f64,
    pub p50_ms: f64,
}

/// How both sides would carry it out now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanShapes {
    pub legacy: PlanShape,
    pub new: PlanShape,
    /// Nodes, their order and what they read are the same.
    pub same: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanShape {
    /// Of all nodes without their costs: 16 hex digits, the same for the same plan.
    pub fingerprint: String,
    /// The first of them, a line each.
    pub nodes: Vec<String>,
}

impl PlanShape {
    fn of(lines: &[String]) -> Self {
        // Costs change with every ANALYZE; conditions hold values.
        let nodes: Vec<String> = lines
            .iter()
            .filter_map(|line| Some(line.split_once("(cost=")?.0.trim_end().to_owned()))
            .collect();
        Self {
            fingerprint: format!("{:016x}", xxh3_64(nodes.join("\n").as_bytes())),
            nodes: nodes.into_iter().take(NODES_MAX).collect(),
        }
    }
}

impl From<&Plans> for PlanShapes {
    fn from(plans: &Plans) -> Self {
        let (legacy, new) = (PlanShape::of(&plans.legacy), PlanShape::of(&plans.new));
        Self {
            same: legacy.fingerprint == new.fingerprint,
            legacy,
            new,
        }
    }
}

/// Watches one database's statements.
#[derive(Default)]
pub struct SlowerWatch {
    /// When counting began; other counters mean that all is new.
    since: String,
    /// As each was when it was last judged.
    judged: HashMap<String, FingerprintReport>,
    told: HashMap<String, Instant>,
}

impl SlowerWatch {
    /// Judges what has been read since the last time, and tells the log of what is slower. Returns
    /// how many lines were written.
    ///
    /// # Errors
    /// The log cannot be written.
    pub async fn tell(
        &mut self,
        log: &MismatchLog,
        planner: &Planner,
        database: &str,
        now: &ShadowReport,
        ratio: f64,
    ) -> Result<usize, String> {
        let found = self.judge(Instant::now(), now, ratio);
        for (place, slower) in found.iter().enumerate() {
            let plans = match slower.0.fingerprint.parse() {
                Ok(id) if place < EXPLAINED_MAX => timeout(PLAN_PATIENCE, planner.plans(id)).await.ok(),
                _ => None,
            };
            let plans = plans.and_then(Result::ok).map(|plans| PlanShapes::from(&plans));
            let line = line(database, slower, ratio, plans);
            tracing::warn!(
                database,
                fingerprint = line.fingerprint,
                statement = line.statement,
                ratio = line.ratio,
                reads = line.reads,
                "shadow reads: slower on new"
            );
            metrics::counter!("pgtandem_shadow_slower_total", "database" => database.to_owned()).increment(1);
            let body = chain::body(&line).map_err(|error| error.to_string())?;
            log.record(events::SLOWER, body).await?;
        }
        Ok(found.len())
    }

    /// The reports beside each hold the latencies of the window alone.
    fn judge(&mut self, at: Instant, now: &ShadowReport, ratio: f64) -> Vec<(Slower, FingerprintReport)> {
        if self.since != now.since {
            *self = Self {
                since: now.since.clone(),
                ..Self::default()
            };
        }
        let mut found = Vec::new();
        for one in &now.fingerprints {
            let window = FingerprintReport {
                latency: latency_between(self.judged.get(&one.fingerprint), one),
                ..one.clone()
            };
            let reads = window.latency.as_ref().map_or(0, |latency| latency.new.total.count);
            if reads < SLOWER_READS_MIN {
                continue;
            }
            self.judged.insert(one.fingerprint.clone(), one.clone());
            let told = self.told.get(&one.fingerprint);
            if told.is_some_and(|told| at.duration_since(*told) < TOLD_AGAIN) {
                continue;
            }
            if let Some(slower) = slower_on_new(std::slice::from_ref(&window), ratio).pop() {
                self.told.insert(one.fingerprint.clone(), at);
                found.push((slower, window));
            }
        }
        found
    }
}

fn line(
    database: &str,
    (slower, window): &(Slower, FingerprintReport),
    ratio: f64,
    plans: Option<PlanShapes>,
) -> SlowerOnNew {
    let latency = window.latency.clone().unwrap_or_default();
    let quantiles = |total: &super::stats::Durations| Quantiles {
        p50_ms: total.p50_ms,
        p99_ms: total.p99_ms,
    };
    SlowerOnNew {
        seq: 0,
        time: String::new(),
        database: database.to_owned(),
        kind: Kind::Slower,
        fingerprint: slower.fingerprint.clone(),
        statement: slower.text.clone(),
        reads: slower.reads,
        legacy: quantiles(&latency.legacy.total),
        new: quantiles(&latency.new.total),
        ratio: slower.ratio,
        rule: Rule {
            reads: SLOWER_READS_MIN,
            ratio,
            p50_ms: SLOWER_MS_MIN,
        },
        plans,
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::{Counters, Timing};
    use super::*;
    use crate::control::Side;

    fn read(counters: &Counters, text: &str, count: u64, legacy: u64, new: u64) {
        let entry = counters.of(&crate::sql::fingerprint(text.as_bytes()));
        for _ in 0..count {
            for (side, milliseconds) in [(Side::Legacy, legacy), (Side::New, new)] {
                let total = Duration::from_millis(milliseconds);
                entry.record(side, Timing { first_row: None, total });
            }
        }
    }

    #[test]
    fn judged_by_enough_reads_of_the_window_and_told_once() {
        let counters = Counters::new("shop");
        let mut watch = SlowerWatch::default();
        let start = Instant::now();
        let mut found = |counters: &Counters, after: Duration| -> Vec<(String, u64)> {
            let found = watch.judge(start + after, &counters.report(2.0), 2.0);
            found
                .into_iter()
                .map(|(slower, _)| (slower.text, slower.reads))
                .collect()
        };
        let soon = Duration::from_secs(1);
        read(&counters, "select a", SLOWER_READS_MIN - 1, 5, 50);
        assert_eq!(found(&counters, soon), []);
        // One more: now it can be judged.
        read(&counters, "select a", 1, 5, 50);
        assert_eq!(found(&counters, soon), [("select a".into(), SLOWER_READS_MIN)]);
        read(&counters, "select a", 100, 5, 50);
        assert_eq!(found(&counters, soon), []);
        // Mended meanwhile: the slow reads of before do not count again.
        read(&counters, "select a", 100, 5, 5);
        assert_eq!(found(&counters, TOLD_AGAIN + soon), []);
        read(&counters, "select a", 30, 5, 50);
        assert_eq!(found(&counters, TOLD_AGAIN + soon), [("select a".into(), 30)]);
        // As slow as before, faster on new, and too fast to matter.
        read(&counters, "select b", 100, 5, 6);
        read(&counters, "select c", 100, 50, 5);
        read(&counters, "select d", 100, 0, 0);
        assert_eq!(found(&counters, 2 * TOLD_AGAIN), []);
    }

    #[test]
    fn a_plans_shape_has_neither_costs_nor_values() {
        let plan = |cost: &str, index: &str| {
            PlanShape::of(&[
                format!("Sort  (cost={cost} rows=1 width=4)"),
                "  Sort Key: a".into(),
                format!("  ->  {index} on t  (cost={cost} rows=1 width=4)"),
                "        Filter: (name = 'secret'::text)".into(),
            ])
        };
        let one = plan("0.00..1.00", "Index Scan using t_name");
        assert_eq!(one, plan("0.00..9.00", "Index Scan using t_name"));
        assert_eq!(one.nodes, ["Sort", "  ->  Index Scan using t_name on t"]);
        assert_ne!(one.fingerprint, plan("0.00..1.00", "Seq Scan").fingerprint);
    }
}
