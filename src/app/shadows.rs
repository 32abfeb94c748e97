//! The shadow reads of every database: starts one intake for each, and shows it the reads that
//! sessions come by.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use anyhow::Context as _;
use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use crate::admin::api::{Flip, ShadowReads, ShadowsAnswer};
use crate::chain::{self, Head};
use crate::config::Config;
use crate::control::Control;
use crate::session::hooks::{self, Observer, Read};
use crate::shadow::{
    Call, Catalog, Cuts, CutsFuture, DigestBuilder, HeldCut, Interval, MismatchLog, NoCut, Outcome, Shadow,
    ShadowLimits, ShadowRead, ShadowReport, ShadowSink, ShadowTasks, Timing, ValueWriter, events, load_or_create_key,
    spawn,
};
use crate::sql::{LexSettings, NotComparable, Script, glance};
use crate::switchover::Tandem;
use crate::upstream::control::connect;

pub(super) struct Shadows {
    databases: Arc<DashMap<String, Intake>>,
    log: MismatchLog,
    _log_writer: JoinHandle<()>,
    _phases: AbortOnDropHandle<()>,
    /// By database, what the log's lines of statistics have told.
    told: Mutex<HashMap<String, ShadowReport>>,
    control: watch::Receiver<Control>,
}

struct Intake {
    sink: ShadowSink,
    _tasks: ShadowTasks,
}

impl Shadows {
    /// Opens the mismatch log; databases are attended to one by one.
    ///
    /// # Errors
    /// The key of the hashes cannot be had. A log that cannot be written is alarmed instead.
    pub(super) fn start(config: &Config, control: watch::Receiver<Control>) -> anyhow::Result<Self> {
        let log = &config.mismatch_log;
        let key = load_or_create_key(&log.key_file)
            .with_context(|| format!("mismatch_log: key_file: {}", log.key_file.display()))?;
        let values = ValueWriter::with_key(log.values, key).by_column(log.columns.clone());
        let (log, log_writer) = MismatchLog::open(log.chain(), values);
        Ok(Self {
            databases: Arc::default(),
            _log_writer: log_writer,
            _phases: AbortOnDropHandle::new(tokio::spawn(record_phases(log.clone(), control.clone()))),
            log,
            told: Mutex::default(),
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
        for (database, now) in self.report().databases {
            let before = told.get(&database).cloned().unwrap_or_default();
            for interval in Interval::between(&database, &before, &now) {
                let keys = chain::body(&interval).map_err(|error| error.to_string())?;
                self.log.record(events::STATISTICS, keys).await?;
            }
            told.insert(database, now);
        }
        Ok(self.log.status().head)
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
                    percent: config.reads.shadow_percent,
                    control: self.control.clone(),
                    cuts: Arc::new(TandemCuts(Arc::downgrade(tandem))),
                    log: self.log.clone(),
                    limits: ShadowLimits::default(),
                });
                Intake { sink, _tasks: tasks }
            });
        }
    }

    /// After a reload.
    pub(super) fn reload(&self, config: &Config) {
        for database in self.databases.iter() {
            database.sink.set_percent(config.reads.shadow_percent);
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
        let counts = stats.counts;
        ShadowReads {
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

    /// All that is known of the reads, by database.
    pub(super) fn report(&self) -> ShadowsAnswer {
        let databases = self.databases.iter();
        ShadowsAnswer {
            databases: databases
                .map(|database| (database.key().clone(), database.sink.report(SLOWER)))
                .collect(),
        }
    }
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

/// How many times as slow as legacy a statement is on new to be named.
const SLOWER: f64 = 2.0;

/// Each primary's catalog, kept current for the shadow reads.
pub(super) struct Catalogs(Arc<DashMap<String, Intake>>);

impl Catalogs {
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
}

impl hooks::Shadow for Shown {
    fn sampled(&self, database: &str, text: &[u8], values: &[u8]) -> bool {
        let glance = glance(text, LexSettings::default());
        self.databases
            .get(database)
            .is_some_and(|database| database.sink.samples(glance, text, values))
    }

    fn observe(&self, read: &Read<'_>) -> Option<Box<dyn Observer>> {
        let sink = self.databases.get(read.database)?.sink.clone();
        let (parameters, call) = match read.call {
            hooks::Call::Simple => (&[][..], Call::Simple),
            hooks::Call::Extended { types, values } => (
                values,
                Call::Extended {
                    parameter_types: Bytes::copy_from_slice(types),
                    bind: Bytes::copy_from_slice(values),
                },
            ),
        };
        if !sink.wants(read.control, read.script, read.text, parameters) {
            return None;
        }
        if read.after_write {
            sink.withdraw(
                read.script.fingerprint(read.text),
                Outcome::NotComparable(NotComparable::EarlierWrite),
            );
            return None;
        }
        let Some(settings) = read.settings else {
            sink.withdraw(
                read.script.fingerprint(read.text),
                Outcome::NotComparable(NotComparable::UnknownSettings),
            );
            return None;
        };
        Some(Box::new(Observed {
            sink,
            read: ShadowRead {
                control: read.control,
                login: read.login.clone(),
                settings: settings.clone(),
                text: Bytes::copy_from_slice(read.text),
                script: read.script.clone(),
                call,
                digest: DigestBuilder::default().finish(),
                timing: Timing::default(),
            },
            digest: DigestBuilder::default(),
        }))
    }
}

/// One answer passing through.
struct Observed {
    sink: ShadowSink,
    read: ShadowRead,
    digest: DigestBuilder,
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

    fn complete(mut self: Box<Self>, timing: Timing) {
        self.read.digest = self.digest.finish();
        self.read.timing = timing;
        self.sink.offer(self.read);
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

    fn hold_cut(&self) -> CutsFuture<'_, HeldCut> {
        Box::pin(async {
            let held = self.applier()?.cut().await.map_err(|error| NoCut(error.to_string()))?;
            Ok(HeldCut::new(held.cut.round, held.primary_snapshot.clone(), held))
        })
    }
}
