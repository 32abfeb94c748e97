//! The admin API's documents: what `/api/v1/…` answers and the commands print with `--json`.
//!
//! Field names are part of the interface; times are RFC 3339, durations and lags carry their
//! unit in the name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::apply::{Entry, Healed, Outcome, Verified};
use crate::chain::Head;
use crate::control::{Epoch, Phase, Side};
use crate::journal::Stray;
use crate::reconcile::backfill::{BackfillStatus, Order};
use crate::shadow::rehearsal::{RehearsalReport, Rehearsed};
use crate::shadow::{Acknowledgement, CanaryCounts, Kind as Difference, LogStatus, ShadowReport, Spent};
pub use crate::switchover::machine::{Kind, Step};

/// `GET /api/v1/status`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    pub phase: Phase,
    /// `phase:` as proxy.yaml has it now; differs from `phase` while it is being made so, or
    /// where it was refused (then `problem` says why).
    pub wish: Phase,
    pub primary: Side,
    pub epoch: Epoch,
    pub problem: Option<String>,
    pub sessions: Sessions,
    pub databases: Vec<DatabaseStatus>,
    /// What must hold before the next switchover.
    pub gates: Vec<Gate>,
    /// A switchover or rehearsal that is under way.
    #[serde(default)]
    pub switchover: Option<UnderWay>,
    /// Every proxy on the pair, where the phase mirrors.
    #[serde(default)]
    pub proxies: Vec<Proxy>,
    /// The last switchover of this proxy's lifetime.
    pub last_flip: Option<Flip>,
    #[serde(default)]
    pub mismatch_log: Option<LogStatus>,
}

/// A switchover that is under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnderWay {
    pub id: String,
    pub kind: Kind,
    pub to: Side,
    pub step: Step,
    /// The proxy that leads it.
    pub coordinator: String,
    /// Proxies whose answer the step waits for.
    pub waiting_for: Vec<String>,
}

/// A proxy on the pair.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Proxy {
    /// `pid 4711 on host`
    pub name: String,
    /// Where it listens.
    pub address: String,
    pub version: String,
    pub phase: String,
    pub epoch: Epoch,
    /// Since it last said that it is there; a switchover does not wait for one that is silent for
    /// more than 4 s.
    pub silent_seconds: f64,
    /// Of its clock from the primary's.
    pub clock_offset_ms: f64,
    /// Clients' sessions through it.
    #[serde(default)]
    pub sessions: usize,
    /// Those that a switchover could not carry over, as it looked a few seconds ago; the first fifty.
    #[serde(default)]
    pub in_the_way: Vec<SessionInTheWay>,
}

/// A session that a switchover could not carry over as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInTheWay {
    pub user: String,
    pub application: String,
    /// The client's.
    pub address: String,
    pub database: String,
    pub reason: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sessions {
    pub open: usize,
    pub limit: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabaseStatus {
    pub name: String,
    pub legacy: ServerStatus,
    pub new: ServerStatus,
    /// Absent where the phase mirrors nothing.
    pub mirroring: Option<Mirroring>,
    pub shadow_reads: ShadowReads,
    /// Absent where none are wanted (`writes.rehearse_percent`) and none have been.
    #[serde(default)]
    pub rehearsed_writes: Option<Rehearsed>,
    /// Absent where commits are acknowledged by the primary (`writes.acknowledge`).
    pub acknowledge: Option<AcknowledgeStatus>,
    /// Absent where no read was ever meant for the secondary (`reads.canary_percent`).
    #[serde(default)]
    pub canary: Option<CanaryStatus>,
    /// Of the last backfill since the proxy started, or one that was interrupted before.
    pub backfill: Option<BackfillStatus>,
}

/// Reads that the secondary really answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CanaryStatus {
    pub on: bool,
    /// Why not, where it is off.
    pub off_because: Option<String>,
    /// The budget was exceeded; a reload turns it on again.
    pub turned_off_by_budget: bool,
    /// `reads.canary_percent`, and how many rules beside it.
    pub percent: f64,
    pub rules: usize,
    /// How long it has been on, in all, since the budget last turned it off, the roles were swapped,
    /// or the proxy started.
    pub on_seconds: f64,
    /// Per cent of the reads considered that the secondary answered.
    pub share: f64,
    /// When its proxy began to count, RFC 3339.
    #[serde(default)]
    pub since: String,
    /// Since the proxy started.
    pub counts: CanaryCounts,
    /// Within the budget's window.
    pub window_seconds: f64,
    pub spent: Spent,
    /// When and why the budget turned it off, since the proxy started, the last ones.
    pub turned_off: Vec<CanaryTurnedOff>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CanaryTurnedOff {
    pub at: String,
    pub reason: String,
    /// How long it had been on.
    pub after_seconds: f64,
}

/// `writes.acknowledge: both`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AcknowledgeStatus {
    /// Since when commits are answered by the primary alone, because the secondary was late.
    pub degraded_seconds: Option<f64>,
    /// Commits that were.
    pub answered_early: u64,
    /// Commits whose client got an error instead (`writes.when_late: error`).
    pub refused: u64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ServerStatus {
    pub address: String,
    pub version: Option<String>,
    /// Why it cannot be reached, where it cannot.
    pub error: Option<String>,
    /// The server is there and has no such database.
    #[serde(default)]
    pub missing: bool,
    /// The transaction of this database that has been prepared (PREPARE TRANSACTION) for longest.
    #[serde(default)]
    pub prepared: Option<OldestPrepared>,
    /// The last write that came here past pgtandem while this side was the secondary.
    #[serde(default)]
    pub stray: Option<LastStray>,
    /// Tables that are not captured here, and that the proxy's role may not capture.
    #[serde(default)]
    pub uncapturable: Vec<String>,
    /// The database's size, indexes and journal included.
    #[serde(default)]
    pub database_bytes: Option<u64>,
    #[serde(default)]
    pub connections: Option<Connections>,
    /// Clients' connections to this database, of the proxies and past them; the gate says which are.
    #[serde(skip)]
    pub clients: Vec<Client>,
}

/// How many connections a server takes, and has.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Connections {
    /// `max_connections` without those that are reserved.
    pub limit: i64,
    pub used: i64,
    /// Where ALTER DATABASE … CONNECTION LIMIT sets one.
    pub database: Option<ConnectionLimit>,
    /// Where ALTER ROLE … CONNECTION LIMIT sets one.
    pub roles: BTreeMap<String, ConnectionLimit>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ConnectionLimit {
    pub limit: i64,
    pub used: i64,
}

/// A client's connection as its server shows it.
#[derive(Debug, Clone)]
pub struct Client {
    pub pid: i32,
    pub user: String,
    pub application: String,
    /// Where the proxy's role may see it.
    pub address: Option<String>,
    /// Since it connected, where the proxy's role may see it.
    pub seconds: Option<f64>,
    /// It has written in its open transaction.
    pub writing: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OldestPrepared {
    pub gid: String,
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastStray {
    pub seconds: f64,
    /// Role, application and table.
    pub who: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mirroring {
    /// `connecting`, `waiting` (another proxy holds the applier's lease), `running`, `failing`,
    /// `halted` (too much was refused, `writes.error_threshold`), `stopped`.
    pub state: String,
    pub error: Option<String>,
    /// The proxy that applies, this one or another (`pid 4711 on host`); absent while none is
    /// known to.
    pub applier: Option<String>,
    pub round: u64,
    /// The snapshot of the last applied round, as `pg_current_snapshot()` writes it.
    pub watermark: Option<String>,
    /// The end of the primary's log when that snapshot was taken.
    pub position: Option<String>,
    pub changes_applied: u64,
    pub transactions_applied: u64,
    pub lag: Lag,
    pub journal: Journal,
    pub tables: Vec<TableStatus>,
    /// What is not mirrored, and why.
    pub not_mirrored: Vec<String>,
    /// What a DBA must run, because the proxy's role may not.
    pub sql_for_dba: Vec<String>,
    /// What the two sides define otherwise, by DDL that nobody saw: kind and name.
    #[serde(default)]
    pub different: Vec<String>,
    /// Tables whose rows could not be mirrored back after a flip (`transform:`), and why.
    #[serde(default)]
    pub one_way: Vec<String>,
    pub sequence_errors: Vec<String>,
    pub divergences: u64,
    pub stray_writes: u64,
    pub quarantine: Quarantine,
}

/// Transactions that the secondary refused, or that follow one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Quarantine {
    pub transactions: u64,
    /// Of those, how many were refused themselves.
    pub refused: u64,
    pub changes: u64,
    /// When the oldest was put there.
    pub oldest: Option<String>,
    pub oldest_seconds: u64,
    /// The oldest one's error.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Journal {
    pub bytes: u64,
    /// At `journal.max_bytes` under `when_full: block`: writes are refused until it has drained.
    pub full: bool,
    /// Capture was switched off under `when_full: stop_mirroring`: the secondary must be seeded
    /// again.
    pub stopped: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Lag {
    /// Committed transactions not yet applied.
    pub transactions: u64,
    /// Of the primary's log, between the watermark and its end.
    pub bytes: u64,
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TableStatus {
    pub name: String,
    /// `unseeded`, `seeding`, `synced`.
    pub seeding: String,
    /// Why its mirroring is paused, where it is.
    pub paused: Option<String>,
    /// Why a table that was synced no longer is.
    pub note: Option<String>,
    pub diverged: u64,
    /// When, and at which cut, a verification last found both sides equal.
    #[serde(default)]
    pub verified: Option<Verified>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ShadowReads {
    /// When counting began, RFC 3339: with `mismatch_log.count_back`, before the proxy's start.
    #[serde(default)]
    pub since: String,
    pub matched: u64,
    pub mismatched: u64,
    /// Different at first, equal at a cut.
    pub transient: u64,
    pub not_comparable: BTreeMap<String, u64>,
    /// Not chosen by `reads.shadow_percent`.
    pub skipped: u64,
    /// Chosen, but the queue was full.
    pub dropped: u64,
    /// Could not be repeated, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Mismatches that the log could not take.
    pub log_lost: u64,
}

/// A measured condition of a switchover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    pub name: String,
    pub measured: String,
    pub required: String,
    pub open: bool,
}

/// A switchover or rehearsal, from its record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Flip {
    pub id: String,
    pub kind: Kind,
    pub to: Side,
    pub epoch: Epoch,
    /// The proxy that led it.
    pub coordinator: String,
    /// Who ordered it: a name, or `proxy.yaml` where its `phase` was the order; absent where that
    /// was not recorded.
    #[serde(default)]
    pub by: Option<String>,
    pub at: String,
    pub ended: Option<String>,
    /// `done`, `rehearsed`, or why it was abandoned (everything then went on as before); absent
    /// while it is under way.
    pub outcome: String,
    pub forced: Option<String>,
    pub steps: Vec<FlipStep>,
    /// How long transactions were held, on the proxy that held them longest; of a rehearsal, how
    /// long a switchover would have held them.
    pub held_ms: f64,
    pub sessions_carried: usize,
    pub sessions_ended: usize,
    /// Sessions that could not be carried over or had a transaction open.
    pub in_the_way: Vec<InTheWay>,
    /// Proxies that fell silent and were fenced out.
    pub fenced_out: Vec<String>,
}

/// A recorded transition.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlipStep {
    pub name: Step,
    pub at: String,
    /// The proxy that recorded it.
    pub who: String,
    /// Until the next one was recorded; 0 for the last.
    pub ms: f64,
    /// Whether clients waited in it.
    pub held: bool,
    /// What was measured by the step before.
    pub measured: serde_json::Value,
}

/// A session in a switchover's way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InTheWay {
    pub proxy: String,
    pub user: String,
    pub application: String,
    pub reason: String,
}

/// `POST /api/v1/switchover`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SwitchoverRequest {
    /// May be left out in a rehearsal: the side that is secondary.
    #[serde(default)]
    pub to: Option<Side>,
    #[serde(default)]
    pub dry_run: bool,
    /// All of it up to the point of no return, then back.
    #[serde(default)]
    pub rehearse: bool,
    /// The reason given with `--force`: closed gates are recorded, not obeyed.
    #[serde(default)]
    pub force: Option<String>,
    /// Who orders it; it is recorded. Left out: the admin API and the address that asked.
    #[serde(default)]
    pub by: Option<String>,
}

/// What the switchover answers; `flip` is absent for a dry run and where a gate is closed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SwitchoverAnswer {
    pub gates: Vec<Gate>,
    pub flip: Option<Flip>,
    pub done: bool,
}

/// `GET /api/v1/switchover`: every switchover and rehearsal, the latest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct History {
    pub flips: Vec<Flip>,
}

/// `POST /api/v1/reload`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReloadAnswer {
    pub phase: Phase,
    /// What was done, in words.
    pub changed: Vec<String>,
}

/// `GET /api/v1/wait?timeout_ms=…`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WaitAnswer {
    pub caught_up: bool,
    pub waited_ms: f64,
    /// The database still behind, where one is.
    pub behind: Option<String>,
}

/// `GET /api/v1/quarantine`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuarantineList {
    pub entries: Vec<QuarantineEntry>,
}

/// One transaction in quarantine; [`Entry`] has the other fields.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuarantineEntry {
    pub database: String,
    #[serde(flatten)]
    pub entry: Entry,
}

/// `POST /api/v1/quarantine/retry`: all, or one with those it depends on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RetryRequest {
    /// May be left out where there is only one.
    #[serde(default)]
    pub database: Option<String>,
    #[serde(default)]
    pub id: Option<i64>,
    /// Who asks, for the history.
    pub actor: String,
}

/// `POST /api/v1/quarantine/discard`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiscardRequest {
    #[serde(default)]
    pub database: Option<String>,
    pub id: i64,
    pub actor: String,
    pub reason: String,
}

/// What came of it, by database.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuarantineAnswer {
    pub databases: BTreeMap<String, Outcome>,
    /// Whether everything asked for was done.
    pub done: bool,
}

/// `GET /api/v1/strays`: writes that came past pgtandem to the side that was the secondary, and that
/// nobody acknowledged.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StrayList {
    pub strays: Vec<StrayEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StrayEntry {
    pub database: String,
    /// Where they were written.
    pub side: Side,
    #[serde(flatten)]
    pub stray: Stray,
}

/// `POST /api/v1/strays/acknowledge`: all that are recorded until now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AcknowledgeStraysRequest {
    /// Absent: of every database.
    #[serde(default)]
    pub database: Option<String>,
    /// Who, and why they may stand.
    pub by: String,
    pub reason: String,
}

/// What was acknowledged. The databases record it, with the name and the reason.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AcknowledgedStrays {
    pub acknowledged: Vec<StrayEntry>,
    /// The line of the mismatch log that says so; absent where nothing was there to acknowledge.
    pub head: Option<Head>,
    /// Why the log has no such line, where it should have one.
    pub log_error: Option<String>,
}

/// `POST /api/v1/mismatches/acknowledge`: those of a fingerprint so far (of a kind), or one line.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AcknowledgeRequest {
    #[serde(default)]
    pub fingerprint: Option<String>,
    #[serde(default)]
    pub kind: Option<Difference>,
    /// The number of a mismatch's line.
    #[serde(default)]
    pub line: Option<u64>,
    /// Who, and why they may stand.
    pub by: String,
    pub reason: String,
}

impl AcknowledgeRequest {
    /// What the log shall record.
    ///
    /// # Errors
    /// It names nothing, or nobody, or no reason.
    pub fn acknowledgement(&self) -> Result<Acknowledgement, String> {
        if self.fingerprint.is_none() && self.line.is_none() {
            return Err("name a fingerprint or a line".into());
        }
        if self.by.trim().is_empty() || self.reason.trim().is_empty() {
            return Err("an acknowledgement needs a name and a reason".into());
        }
        Ok(Acknowledgement {
            seq: 0,
            time: String::new(),
            by: self.by.clone(),
            reason: self.reason.clone(),
            fingerprint: self.fingerprint.clone(),
            kind: self.kind,
            line: self.line,
        })
    }
}

/// What the log recorded: the number and hash of the line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recorded {
    pub head: Head,
}

/// `POST /api/v1/schema/heal`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HealRequest {
    /// Without it all.
    #[serde(default)]
    pub database: Option<String>,
    /// Tables and other objects by name; without any all.
    #[serde(default)]
    pub tables: Vec<String>,
    #[serde(default)]
    pub dry_run: bool,
    /// Who asks, for the record. Left out: as with a switchover.
    #[serde(default)]
    pub actor: Option<String>,
}

/// What was done, by database.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HealAnswer {
    pub databases: BTreeMap<String, Healed>,
    /// Whether nothing is left.
    pub done: bool,
}

/// `POST /api/v1/verify`, answered by [`Event`](crate::reconcile::report::Event)s, a JSON line each.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// May be left out: all of them.
    #[serde(default)]
    pub database: Option<String>,
    /// `schema.name` or `name`; none: all, with the sequences.
    #[serde(default)]
    pub tables: Vec<String>,
    /// Differing rows are shown as they are, not as their hash.
    #[serde(default)]
    pub plain: bool,
    #[serde(default)]
    pub workers: Option<usize>,
    /// Rows per second on each side.
    #[serde(default)]
    pub rate: Option<u64>,
    /// `POST /api/v1/repair`: who asks, for the record. Left out: as with a switchover.
    #[serde(default)]
    pub actor: Option<String>,
}

/// `POST /api/v1/backfill`: starts one, or changes workers and rate of the one that runs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BackfillRequest {
    /// May be left out: all.
    #[serde(default)]
    pub database: Option<String>,
    #[serde(flatten)]
    pub order: Order,
}

/// `POST /api/v1/backfill/cancel`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BackfillCancelRequest {
    #[serde(default)]
    pub database: Option<String>,
}

/// `GET /api/v1/backfill`, and what the requests above lead to: by database; those that never had
/// one are left out.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BackfillAnswer {
    pub databases: BTreeMap<String, BackfillStatus>,
}

/// `GET /api/v1/shadows`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ShadowsAnswer {
    pub databases: BTreeMap<String, ShadowReport>,
    /// Of the rehearsed writes.
    #[serde(default)]
    pub rehearsals: BTreeMap<String, RehearsalReport>,
}

/// `GET /api/v1/explain?sql=…`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExplainAnswer {
    /// [`crate::sql::Explanation`] as a document.
    pub explanation: serde_json::Value,
    /// The same for a person.
    pub text: String,
}

/// Every answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub error: String,
}
