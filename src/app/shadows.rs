//! The shadow reads of every database: starts one intake for each, and shows it the reads that
//! sessions come by.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use bytes::Bytes;
use dashmap::DashMap;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use crate::admin::api::{Flip, ShadowReads, ShadowsAnswer};
use crate::chain::{self, Head};
use crate::config::Config;
use crate::control::Control;
use crate::session::hooks::{self, Observer, Read};
use crate::shadow::{
    Analysis, Asked, Call, Candidate, Catalog, Counted, Cuts, CutsFuture, DigestBuilder, HeldCut, Interval,
    MismatchLog, NoCut, Outcome, Plans, Sampling, Shadow, ShadowRead, ShadowReport, ShadowSink, ShadowTasks, Skipped,
    SlowerWatch, Timing, ValueWriter, events, load_or_create_key, read_counted, spawn,
};
use crate::sql::{FingerprintId, Script};
use crate::switchover::Tandem;
use crate::upstream::control::connect;

pub(super) struct Shadows {
    databases: Arc<DashMap<String, Intake>>,
    /// Whether proxy.yaml wants any read shadowed, or answered by the secondary.
    wanted: Arc<AtomicBool>,
    /// How many times as slow as legacy a statement is on new to be named.
    slower_ratio: ArcSwap<f64>,
    log: MismatchLog,
    _log_writer: JoinHandle<()>,
    _phases: AbortOnDropHandle<()>,
    /// What earlier runs counted.
    earlier: Earlier,
    _look_back: AbortOnDropHandle<()>,
    /// By database, what this run's lines of statistics have told.
    told: Mutex<HashMap<String, ShadowReport>>,
    /// What the log was last told of the shares that are compared.
    sampling: Mutex<Option<Sampling>>,
    /// By database, what is known of statements that are slower on new.
    slower: Mutex<HashMap<String, SlowerWatch>>,
    control: watch::Receiver<Control>,
}

/// By database, what the log tells of runs before this one; empty until it has been read.
pub(super) type Earlier = Arc<ArcSwap<BTreeMap<String, Counted>>>;

struct Intake {
    sink: ShadowSink,
    tasks: ShadowTasks,
}

impl Shadows {
    /// Opens the mismatch log; databases are attended to one by one.
    ///
    /// # Errors
    /// The key of the hashes cannot be had. A log that cannot be written is alarmed instead.
    pub(super) fn start(config: &Config, control: watch::Receiver<Control>) -> anyhow::Result<Self> {
        let log = &config.mismatch_log;
        let (path, back) = (log.path.clone(), log.count_back);
        let key = load_or_create_key(&log.key_file)
            .with_context(|| format!("mismatch_log: key_file: {}", log.key_file.display()))?;
        let values = ValueWriter::with_key(log.values, key).by_column(log.columns.clone());
        let (log, log_writer) = MismatchLog::open(log.chain(), values);
        let earlier = Earlier::default();
        let look_back = look_back(path, back, log.clone(), earlier.clone());
        Ok(Self {
            earlier,
            _look_back: AbortOnDropHandle::new(tokio::spawn(look_back)),
            databases: Arc::default(),
            wanted: Arc::new(AtomicBool::new(config.reads.shows_any())),
            slower_ratio: ArcSwap::from_pointee(config.reads.slower_ratio),
            _log_writer: log_writer,
            _phases: AbortOnDropHandle::new(tokio::spawn(record_phases(log.clone(), control.clone()))),
            log,
            told: Mutex::default(),
            sampling: Mutex::default(),
            slower: Mutex::default(),
            control,
        })
    }

    /// Writes what the shadow reads came to since the last such lines. What cannot be written is
    /// told by the next ones.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_statistics(&self) -> Result<Head, String> {
        let mut told = self.told.lock().await;
        for (database, now) in self.counted() {
            let before = told.get(&database).cloned().unwrap_or_default();
            for interval in Interval::between(&database, &before, &now) {
                let keys = chain::body(&interval).map_err(|error| error.to_string())?;
                self.log.record(events::STATISTICS, keys).await?;
            }
            told.insert(database, now);
        }
        Ok(self.log.status().head)
    }

    /// Tells the log what share of the traffic is compared from now on, where that is not what it was
    /// told last.
    pub(super) async fn record_sampling(&self, config: &Config) {
        let mut told = self.sampling.lock().await;
        let now = Sampling::of(config);
        if told.as_ref() == Some(&now) {
            return;
        }
        let recorded = match chain::body(&now) {
            Ok(keys) => self.log.record(events::SAMPLING, keys).await.map(|_| ()),
            Err(error) => Err(error.to_string()),
        };
        match recorded {
            Ok(()) => *told = Some(now),
            Err(error) => tracing::warn!(error, "the mismatch log does not tell what share is compared"),
        }
    }

    /// The last line: this proxy was not killed.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_end(&self) -> Result<(), String> {
        self.log
            .record(events::CLOSED, serde_json::Map::new())
            .await
            .map(|_| ())
    }

    /// Tells the log of statements that take clearly longer on new.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_slower(&self) -> Result<(), String> {
        let mut watches = self.slower.lock().await;
        let ratio = **self.slower_ratio.load();
        for (database, now) in self.counted() {
            let planner = self.databases.get(&database).map(|intake| intake.tasks.planner.clone());
            let Some(planner) = planner else { continue };
            let watch = watches.entry(database.clone()).or_default();
            watch.tell(&self.log, &planner, &database, &now, ratio).await?;
        }
        Ok(())
    }

    /// Also one that was abandoned: an auditor asks why. Nobody waits for the disk.
    pub(super) fn note_switchover(&self, flip: &Flip) {
        let (log, keys) = (self.log.clone(), chain::body(flip));
        tokio::spawn(async move {
            let recorded = match keys {
                Ok(keys) => log.record(events::SWITCHOVER, keys).await.map(|_| ()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = recorded {
                tracing::warn!(error, "the mismatch log does not tell of a switchover");
            }
        });
    }

    /// What a database's rehearsals share with its shadow reads.
    pub(super) fn sink(&self, database: &str) -> Option<ShadowSink> {
        self.databases.get(database).map(|intake| intake.sink.clone())
    }

    pub(super) const fn log(&self) -> &MismatchLog {
        &self.log
    }

    /// How values are shown to operators.
    pub(super) const fn values(&self) -> &ValueWriter {
        self.log.values()
    }

    /// What sessions show their reads to.
    pub(super) fn hook(&self) -> Arc<dyn hooks::Shadow> {
        Arc::new(Shown {
            databases: self.databases.clone(),
            wanted: self.wanted.clone(),
        })
    }

    /// What is known of each database's functions and views.
    pub(super) fn catalogs(&self) -> Catalogs {
        Catalogs(self.databases.clone())
    }

    /// Begins with databases that are new, and leaves those that are gone.
    pub(super) fn attend(&self, tandems: &[Arc<Tandem>], config: &Config) {
        self.databases
            .retain(|name, _| tandems.iter().any(|tandem| tandem.name() == name));
        for tandem in tandems {
            self.databases.entry(tandem.name().to_owned()).or_insert_with(|| {
                let (sink, tasks) = spawn(Shadow {
                    database: tandem.name().to_owned(),
                    targets: tandem.targets().clone(),
                    reads: config.reads.clone(),
                    control: self.control.clone(),
                    cuts: Arc::new(TandemCuts(Arc::downgrade(tandem))),
                    log: self.log.clone(),
                });
                Intake { sink, tasks }
            });
        }
    }

    /// After a reload.
    pub(super) fn reload(&self, config: &Config) {
        self.wanted.store(config.reads.shows_any(), Ordering::Relaxed);
        self.slower_ratio.store(Arc::new(config.reads.slower_ratio));
        for database in self.databases.iter() {
            database.sink.configure(&config.reads);
        }
    }

    /// The catalog by which a database's reads are judged, as it is now; `None` where a server
    /// cannot be asked.
    pub(super) async fn read_catalog(tandem: &Tandem, control: Control) -> Option<Catalog> {
        let primary = connect(tandem.targets().target(control.primary), "explain")
            .await
            .ok()?;
        let secondary = connect(tandem.targets().target(control.secondary()), "explain")
            .await
            .ok()?;
        Catalog::load(control.primary, &primary, Some(&secondary)).await.ok()
    }

    pub(super) fn of_database(&self, name: &str) -> ShadowReads {
        let Some(database) = self.databases.get(name) else {
            return ShadowReads::default();
        };
        let stats = database.sink.stats();
        let (since, counts) = match self.earlier.load().get(name) {
            Some(earlier) => earlier.reads(&stats),
            None => (stats.since, stats.counts),
        };
        ShadowReads {
            since,
            matched: counts.matched,
            mismatched: counts.mismatched,
            transient: counts.transient,
            not_comparable: counts.not_comparable,
            skipped: counts.skipped.values().sum(),
            dropped: counts.dropped.values().sum(),
            failed: counts.failed,
            log_lost: stats.log_lost,
        }
    }

    /// Both sides' plans of a statement.
    pub(super) async fn plans(&self, fingerprint: &str) -> Result<Plans, String> {
        let id: FingerprintId = fingerprint.parse()?;
        let planners: Vec<_> = self
            .databases
            .iter()
            .map(|database| database.tasks.planner.clone())
            .collect();
        let mut outcome = Err("no database is attended to".to_owned());
        for planner in planners {
            outcome = planner.plans(id).await;
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// What this run has counted of the reads, by database.
    fn counted(&self) -> BTreeMap<String, ShadowReport> {
        let slower = **self.slower_ratio.load();
        let databases = self.databases.iter();
        databases
            .map(|database| (database.key().clone(), database.sink.report(slower)))
            .collect()
    }

    /// All that is known of the reads, by database: with what earlier runs counted.
    pub(super) fn report(&self) -> ShadowsAnswer {
        let (earlier, slower) = (self.earlier.load(), **self.slower_ratio.load());
        let whole = |name: &String, live: ShadowReport| match earlier.get(name) {
            Some(earlier) => earlier.read_report(&live, slower),
            None => live,
        };
        ShadowsAnswer {
            databases: self
                .counted()
                .into_iter()
                .map(|(name, live)| (name.clone(), whole(&name, live)))
                .collect(),
            ..ShadowsAnswer::default()
        }
    }

    /// What earlier runs counted.
    pub(super) fn earlier(&self) -> Earlier {
        self.earlier.clone()
    }
}

/// Reads what the log tells of runs before this one. Where it cannot be written, nothing says which
/// lines are theirs: then counts begin with this run.
async fn look_back(path: PathBuf, back: Duration, log: MismatchLog, earlier: Earlier) {
    log.flushed().await;
    let (Some(opened), Some(from)) = (log.status().opened, OffsetDateTime::now_utc().checked_sub(span(back))) else {
        return;
    };
    if back.is_zero() {
        return;
    }
    match tokio::task::spawn_blocking(move || read_counted(&path, from, opened)).await {
        Ok(Ok(counted)) => earlier.store(Arc::new(counted)),
        Ok(Err(error)) => tracing::warn!(%error, "the mismatch log does not tell what was counted before"),
        Err(error) => tracing::warn!(%error, "the mismatch log was not read to its end"),
    }
}

fn span(of: Duration) -> time::Duration {
    of.try_into().unwrap_or(time::Duration::MAX)
}

/// The log says where the migration stood when.
async fn record_phases(log: MismatchLog, mut control: watch::Receiver<Control>) {
    while control.changed().await.is_ok() {
        let now = *control.borrow_and_update();
        let keys = serde_json::json!({ "phase": now.phase, "primary": now.primary, "epoch": now.epoch });
        if let serde_json::Value::Object(keys) = keys
            && let Err(error) = log.record(events::PHASE, keys).await
        {
            tracing::warn!(error, "the mismatch log does not tell of a change of phase");
        }
    }
}

/// Each database's intake: its primary's catalog, kept current, and its counters.
pub(super) struct Catalogs(Arc<DashMap<String, Intake>>);

impl Catalogs {
    pub(super) fn sink(&self, database: &str) -> Option<ShadowSink> {
        self.0.get(database).map(|database| database.sink.clone())
    }

    /// Whether a text may change rows of a database.
    pub(super) fn may_write(&self, database: &str, script: &Script) -> bool {
        self.0
            .get(database)
            .is_none_or(|database| database.sink.may_write(script))
    }
}

/// The sessions' view: a read goes to its database's intake.
struct Shown {
    databases: Arc<DashMap<String, Intake>>,
    wanted: Arc<AtomicBool>,
}

impl hooks::Shadow for Shown {
    fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn sampled(&self, asked: &Asked<'_>) -> bool {
        self.databases
            .get(asked.database)
            .is_some_and(|database| database.sink.samples(asked))
    }

    fn passed_over(&self, database: &str, script: &Script, text: &[u8], why: Outcome) {
        if let Some(database) = self.databases.get(database) {
            database.sink.withdraw(script.fingerprint(text), why);
        }
    }

    fn may_write(&self, database: &str, text: &[u8]) -> bool {
        self.databases
            .get(database)
            .is_none_or(|database| database.sink.read_may_write(text))
    }

    fn observe(&self, read: &Read<'_>) -> Option<Box<dyn Observer>> {
        let sink = self.databases.get(read.database)?.sink.clone();
        let candidate = Candidate {
            script: read.script.map(|script| &**script),
            text: read.text,
            arguments: read.arguments,
            after_write: read.after_write,
            temporary: read.temporary,
            settings_known: read.settings.is_some(),
        };
        if !sink.wants(&candidate) {
            return None;
        }
        let settings = read.settings?;
        let call = match read.call {
            hooks::Call::Simple => Call::Simple,
            hooks::Call::Extended { types, values } => Call::Extended {
                parameter_types: Bytes::copy_from_slice(types),
                bind: Bytes::copy_from_slice(values),
            },
            hooks::Call::Prepared { name, prepare, execute } => Call::Prepared {
                name: name.to_owned(),
                prepare: Bytes::copy_from_slice(prepare),
                execute: Bytes::copy_from_slice(execute),
            },
        };
        Some(Box::new(Observed {
            sink,
            read: Some(ShadowRead {
                control: read.control,
                login: read.login.clone(),
                settings: settings.clone(),
                text: Bytes::copy_from_slice(read.text),
                analysis: match read.script {
                    Some(script) => script.clone().into(),
                    None => Analysis::default(),
                },
                call,
                digest: DigestBuilder::default().finish(),
                timing: Timing::default(),
                canary: read.canary,
            }),
            digest: DigestBuilder::default(),
        }))
    }
}

/// One answer passing through.
struct Observed {
    sink: ShadowSink,
    /// Taken when it is known what becomes of it.
    read: Option<ShadowRead>,
    digest: DigestBuilder,
}

impl Observed {
    fn withdraw(&mut self, why: Outcome) {
        if let Some(read) = self.read.take() {
            self.sink.withdraw(read.fingerprint(), why);
        }
    }
}

impl Observer for Observed {
    fn begin(&mut self, kind: u8) {
        self.digest.begin(kind);
    }

    fn piece(&mut self, body: &[u8]) {
        self.digest.piece(body);
    }

    fn end(&mut self) {
        self.digest.end();
    }

    fn frame(&mut self, kind: u8, body: &[u8]) {
        self.digest.frame(kind, body);
    }

    fn complete(mut self: Box<Self>, timing: Timing) {
        if let Some(mut read) = self.read.take() {
            read.digest = self.digest.finish();
            read.timing = timing;
            self.sink.offer(read);
        }
    }

    fn give_up(mut self: Box<Self>, why: Outcome) {
        self.withdraw(why);
    }

    fn forget(mut self: Box<Self>) {
        self.read = None;
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.withdraw(Outcome::Skipped(Skipped::CutOff));
    }
}

/// The applier's rounds and cuts, in whichever direction it mirrors now.
struct TandemCuts(Weak<Tandem>);

impl TandemCuts {
    fn applier(&self) -> Result<Arc<crate::apply::Applier>, NoCut> {
        self.0
            .upgrade()
            .and_then(|tandem| tandem.applier())
            .ok_or_else(|| NoCut("nothing is mirrored".into()))
    }
}

impl Cuts for TandemCuts {
    fn round_after_now(&self) -> CutsFuture<'_, u64> {
        Box::pin(async {
            let cut = self.applier()?.round_after_now().await;
            cut.map(|cut| cut.round).map_err(|error| NoCut(error.to_string()))
        })
    }

    fn is_awaited(&self) -> bool {
        self.0.upgrade().is_some_and(|tandem| tandem.is_awaited())
    }

    fn hold_cut(&self) -> CutsFuture<'_, HeldCut> {
        Box::pin(async {
            let held = self.applier()?.cut().await.map_err(|error| NoCut(error.to_string()))?;
            Ok(HeldCut::new(held.cut.round, held.primary_snapshot.clone(), held))
        })
    }
}
