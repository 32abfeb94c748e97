//! The auditor's report: what the mismatch log, the two databases and the running proxy say, as
//! one document ([`Report`], the `--json` of it), one HTML page and one Markdown text.
//!
//! | file | holds |
//! | --- | --- |
//! | `bound.rs` | the upper bound of a mismatch rate |
//! | `history.rs` | what the databases record |
//! | `tale.rs` | what the logs tell, line by line |
//! | `runs.rs` | when proxies ran, and what share they compared |
//! | `plot.rs` | where lines and points are drawn |
//! | `page.rs`, `templates/report.html`, `templates/report.md` | how it looks |

mod bound;
mod history;
mod page;
mod plot;
mod runs;
mod tale;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub use bound::{CONFIDENCE, upper_bound};
pub use history::{Divergence, QuarantineEvent, SideHistory, VerifiedTable};
pub use runs::{Ended, Run, Sampled};
pub use tale::Happening;

use self::tale::{CanaryPeriod, Tale};
use crate::admin::api::{Flip, Status};
use crate::chain::{self, Verification};
use crate::config::{MismatchLog, Target};
use crate::control::Side;
use crate::reconcile::report::{TableResult, VerificationReport};
use crate::shadow::rehearsal::RehearsalReport;
use crate::shadow::{Acknowledgement, FingerprintSummary, Kind, Mismatch, ShadowReport, SlowerOnNew};
use crate::switchover::told;

pub const FORMAT: &str = "pgtandem report";
/// Grows when a key changes its meaning; keys may be added without.
pub const VERSION: u32 = 1;

/// The document. Times are RFC 3339 (UTC), rates and shares lie between 0 and 1.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`FORMAT`]
    pub format: &'static str,
    /// [`VERSION`]
    pub version: u32,
    pub pgtandem: &'static str,
    pub made_at: String,
    pub made_by: String,
    /// The period's beginning; absent: the log's.
    pub since: Option<String>,
    /// First and last line of the log in the period.
    pub log_period: Option<(String, String)>,
    /// What the running proxy says; absent where none answers.
    pub proxy: Option<Proxy>,
    pub overall: Rate,
    pub databases: Vec<Database>,
    /// Flips and rehearsals, the latest first: as the databases record them, or the log where they
    /// no longer do.
    pub flips: Vec<RecordedFlip>,
    /// Phases, flips, acknowledgements, starts, in order.
    pub happenings: Vec<Happening>,
    pub acknowledgements: Vec<Acknowledgement>,
    /// When a proxy ran; while none did, nothing was compared.
    pub runs: Vec<Run>,
    /// What share of the traffic was to be compared, since when.
    pub sampled: Vec<Sampled>,
    pub verifications: Vec<VerificationFile>,
    pub log: Log,
    /// Of other proxies: each has a chain of its own. The report's `log: 1` is the first of these.
    pub other_logs: Vec<Log>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Proxy {
    pub phase: String,
    pub primary: Side,
    pub epoch: u64,
    pub uptime_seconds: u64,
    pub problem: Option<String>,
    pub gates: Vec<crate::admin::api::Gate>,
}

/// A flip, and who tells of it.
#[derive(Debug, Clone, Serialize)]
pub struct RecordedFlip {
    #[serde(flatten)]
    pub flip: Flip,
    /// `pgtandem.flip` has it, on either side; otherwise the log alone.
    pub in_databases: bool,
    /// The log's line; absent where another proxy led it, or the log could not take it.
    pub line: Option<u64>,
}

/// How often answers differed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub compared: u64,
    /// By the counters or by the log's lines, whichever has more: a proxy that was killed may not
    /// have written its last counts.
    pub mismatched: u64,
    /// Of those compared; absent where none was.
    pub match_rate: Option<f64>,
    /// With 95 % confidence the true mismatch rate is not above this.
    pub upper_bound: Option<f64>,
}

impl Rate {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub fn new(compared: u64, mismatched: u64) -> Self {
        let compared = compared.max(mismatched);
        Self {
            compared,
            mismatched,
            match_rate: (compared > 0).then(|| 1.0 - mismatched as f64 / compared as f64),
            upper_bound: upper_bound(mismatched, compared),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Database {
    pub name: String,
    pub rate: Rate,
    /// By fingerprint.
    pub rates: BTreeMap<String, Rate>,
    pub kinds: BTreeMap<&'static str, u64>,
    /// The period's counts, coverage and latencies.
    pub reads: ShadowReport,
    /// The period's rehearsed writes; absent where there were none.
    pub writes: Option<RehearsalReport>,
    /// Absent where the secondary was not asked to answer any.
    pub canary: Option<CanaryPeriod>,
    pub mismatches: Vec<FingerprintSummary>,
    /// As the log tells it, once a statement and window: no part of any rate.
    pub slower: Vec<SlowerOnNew>,
    pub legacy: SideHistory,
    pub new: SideHistory,
}

/// A report of `pgtandem verify --report FILE`, in short.
#[derive(Debug, Clone, Serialize)]
pub struct VerificationFile {
    pub file: String,
    /// Of the file's bytes, in hex.
    pub sha256: String,
    pub equal: bool,
    pub databases: Vec<VerifiedDatabase>,
}

#[derive(Debug, Clone, Serialize)]
pub struct VerifiedDatabase {
    pub database: String,
    pub equal: bool,
    pub began: String,
    pub ended: String,
    pub tables_equal: usize,
    pub tables_different: usize,
    pub tables_not_compared: usize,
    pub rows: u64,
    pub rows_differing: u64,
    pub sequences: usize,
    pub sequences_different: usize,
    pub cuts: usize,
}

/// The log that all this comes from, and what ties the report to it.
#[derive(Debug, Clone, Serialize)]
pub struct Log {
    pub path: String,
    /// Lines that could not be written, as the log itself and the running proxy tell.
    pub lost: u64,
    /// The head is this one's; with it the log can be held against this report at any time.
    pub chain: Verification,
}

/// What a report is made for.
pub struct Wanted {
    /// Each proxy's log. None: the one that proxy.yaml names.
    pub logs: Vec<PathBuf>,
    pub since: Option<OffsetDateTime>,
    pub by: String,
    /// Files of `verify --report`.
    pub verifications: Vec<PathBuf>,
    /// How many times as slow as legacy a statement is on new to be named
    /// (`reads.slower_ratio`).
    pub slower_ratio: f64,
}

/// Reads everything and puts it together.
///
/// # Errors
/// The log or a verification's file cannot be read. A database that cannot be asked, and a proxy
/// that does not run, are told in the report.
pub async fn gather(
    log: &MismatchLog,
    pairs: &BTreeMap<String, [Target; 2]>,
    proxy: Option<Status>,
    wanted: &Wanted,
) -> anyhow::Result<Report> {
    let paths = match &wanted.logs[..] {
        [] => vec![log.path.clone()],
        named => named.to_vec(),
    };
    let chains: Vec<Verification> = paths
        .iter()
        .map(|path| {
            chain::verify(path, log.signing_key().as_ref())
                .with_context(|| format!("read the mismatch log {}", path.display()))
        })
        .collect::<anyhow::Result<_>>()?;
    let tale = Tale::read(&paths, wanted.since)?;
    let mut databases = Vec::new();
    for name in tale.databases(pairs.keys()) {
        let targets = pairs.get(&name);
        databases.push(database(&tale, name, targets, wanted).await);
    }
    let flips = flips(&tale, pairs, wanted.since).await;
    let verifications = wanted
        .verifications
        .iter()
        .map(|file| verification(file))
        .collect::<anyhow::Result<_>>()?;
    let sum = |of: fn(&Rate) -> u64| databases.iter().map(|database| of(&database.rate)).sum();
    let running = proxy.as_ref().and_then(|status| status.mismatch_log.as_ref());
    let of_running = |path: &Path| running.filter(|status| Path::new(&status.path) == path);
    let mut logs: Vec<Log> = paths
        .iter()
        .zip(chains)
        .zip(&tale.logs)
        .map(|((path, chain), told)| Log {
            path: path.display().to_string(),
            lost: told.lost.max(of_running(path).map_or(0, |status| status.lost)),
            chain,
        })
        .collect();
    let mut runs = tale.runs();
    for (place, path) in paths.iter().enumerate() {
        let last = runs.iter_mut().rfind(|run| run.log == place);
        if let Some(last) = last
            && of_running(path).is_some()
        {
            last.ended = Ended::Running;
        }
    }
    let now = OffsetDateTime::now_utc();
    Ok(Report {
        format: FORMAT,
        version: VERSION,
        pgtandem: env!("CARGO_PKG_VERSION"),
        made_at: rfc3339(now),
        made_by: wanted.by.clone(),
        since: wanted.since.map(rfc3339),
        log_period: tale.period.clone(),
        overall: Rate::new(sum(|rate| rate.compared), sum(|rate| rate.mismatched)),
        happenings: tale.happenings(&databases, &flips),
        flips,
        databases,
        acknowledgements: tale.acknowledgements(),
        runs,
        sampled: tale.sampled.clone(),
        verifications,
        log: logs.remove(0),
        other_logs: logs,
        proxy: proxy.map(|status| Proxy {
            phase: status.phase.to_string(),
            primary: status.primary,
            epoch: status.epoch.0,
            uptime_seconds: status.uptime_seconds,
            problem: status.problem,
            gates: status.gates,
        }),
    })
}

fn rfc3339(time: OffsetDateTime) -> String {
    time.replace_nanosecond(0)
        .unwrap_or(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// One database of the proxy records them, on both sides; which one is not asked.
async fn flips(tale: &Tale, pairs: &BTreeMap<String, [Target; 2]>, since: Option<OffsetDateTime>) -> Vec<RecordedFlip> {
    let sides: Vec<&Target> = pairs.values().flatten().collect();
    let told = futures_util::future::join_all(sides.into_iter().map(told::on)).await;
    // A side that cannot be asked is told beside its history.
    let recorded = told::flips(told.into_iter().filter_map(Result::ok).flatten());
    let mut flips: Vec<RecordedFlip> = recorded
        .into_iter()
        .filter(|flip| tale::is_late(&flip.at, since))
        .map(|flip| RecordedFlip {
            line: tale.line_of(&flip.id),
            in_databases: true,
            flip,
        })
        .collect();
    for (line, flip) in tale.flips() {
        if !flips.iter().any(|known| known.flip.id == flip.id) {
            flips.push(RecordedFlip {
                flip: flip.clone(),
                in_databases: false,
                line: Some(line),
            });
        }
    }
    flips.sort_by(|one, other| other.flip.at.cmp(&one.flip.at));
    flips
}

async fn database(tale: &Tale, name: String, targets: Option<&[Target; 2]>, wanted: &Wanted) -> Database {
    let since = wanted.since;
    let reads = tale.reads(&name, wanted.slower_ratio);
    let found: Vec<Mismatch> = tale.mismatches_of(&name).cloned().collect();
    let of_reads: Vec<Mismatch> = found.iter().filter(|one| !one.kind.is_write()).cloned().collect();
    let (rate, rates) = rates(&reads, &of_reads);
    let mut kinds: BTreeMap<&'static str, u64> = BTreeMap::new();
    for mismatch in &found {
        *kinds.entry(Kind::as_str(mismatch.kind)).or_default() += 1;
    }
    let (legacy, new) = match targets {
        Some([legacy, new]) => tokio::join!(history::of_side(legacy, since), history::of_side(new, since)),
        None => (unnamed(), unnamed()),
    };
    Database {
        rate,
        rates,
        kinds,
        slower: tale.slower_in(&name),
        canary: tale.canary(&name),
        mismatches: tale.by_fingerprint(&name),
        reads,
        writes: tale.writes(&name, wanted.slower_ratio),
        legacy,
        new,
        name,
    }
}

/// The log knows a database that proxy.yaml does not.
fn unnamed() -> SideHistory {
    SideHistory {
        error: Some("proxy.yaml no longer names this database".into()),
        ..SideHistory::default()
    }
}

fn rates(reads: &ShadowReport, found: &[Mismatch]) -> (Rate, BTreeMap<String, Rate>) {
    let mut logged: BTreeMap<&str, u64> = BTreeMap::new();
    for mismatch in found {
        *logged.entry(&mismatch.fingerprint).or_default() += 1;
    }
    let counted = reads.fingerprints.iter().map(|one| {
        let lines = logged.remove(one.fingerprint.as_str()).unwrap_or(0);
        let counts = &one.counts;
        (
            one.fingerprint.clone(),
            Rate::new(counts.compared, counts.mismatched.max(lines)),
        )
    });
    let mut rates: BTreeMap<String, Rate> = counted.collect();
    // Lines of fingerprints that were not counted one by one, or whose counts were lost.
    let others = &reads.others;
    let mut beyond = Rate::new(others.compared, others.mismatched);
    for (fingerprint, lines) in logged {
        rates.insert(fingerprint.to_owned(), Rate::new(0, lines));
        beyond.mismatched = beyond.mismatched.saturating_sub(lines);
        beyond.compared = beyond.compared.saturating_sub(lines);
    }
    let sum = |of: fn(&Rate) -> u64| rates.values().map(of).sum::<u64>() + of(&beyond);
    (Rate::new(sum(|rate| rate.compared), sum(|rate| rate.mismatched)), rates)
}

fn verification(file: &Path) -> anyhow::Result<VerificationFile> {
    let doing = || format!("read the verification {}", file.display());
    let text = std::fs::read(file).with_context(doing)?;
    let report: VerificationReport = serde_json::from_slice(&text).with_context(doing)?;
    Ok(VerificationFile {
        file: file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        sha256: chain::sha256(&text),
        equal: report.equal,
        databases: report
            .databases
            .iter()
            .map(|database| {
                let tables = |result| database.tables.iter().filter(|table| table.result == result).count();
                VerifiedDatabase {
                    database: database.database.clone(),
                    equal: database.equal,
                    began: database.began.clone(),
                    ended: database.ended.clone(),
                    tables_equal: tables(TableResult::Equal),
                    tables_different: tables(TableResult::Different),
                    tables_not_compared: tables(TableResult::NotCompared),
                    rows: database.tables.iter().map(|table| table.rows).sum(),
                    rows_differing: database.tables.iter().map(|table| table.differing.total()).sum(),
                    sequences: database.sequences.len(),
                    sequences_different: database.sequences.iter().filter(|sequence| !sequence.equal).count(),
                    cuts: database.cuts.len(),
                }
            })
            .collect(),
    })
}

impl Report {
    pub fn logs(&self) -> impl Iterator<Item = &Log> {
        std::iter::once(&self.log).chain(&self.other_logs)
    }

    /// Every chain holds, and no line was lost.
    pub fn is_whole(&self) -> bool {
        self.logs().all(|log| log.chain.intact && log.lost == 0)
    }

    /// One self-contained page: no script, nothing fetched.
    ///
    /// # Errors
    /// The page cannot be put together.
    pub fn html(&self) -> anyhow::Result<String> {
        page::html(self)
    }

    /// The same for a terminal or a ticket.
    ///
    /// # Errors
    /// The text cannot be put together.
    pub fn markdown(&self) -> anyhow::Result<String> {
        page::markdown(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_count_what_was_logged_at_least() {
        assert_eq!(Rate::new(0, 0).match_rate, None);
        let rate = Rate::new(100, 1);
        assert_eq!(rate.match_rate, Some(0.99));
        assert!((rate.upper_bound.unwrap() - 0.0466).abs() < 1e-4);
        // The last counts of a killed proxy are lost, its mismatches are not.
        assert_eq!((Rate::new(2, 3).compared, Rate::new(2, 3).mismatched), (3, 3));
    }
}
