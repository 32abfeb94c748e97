//! The shadow reads of every database: starts one intake for each, and shows it the reads that
//! sessions come by.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::admin::api::{ShadowReads, ShadowsAnswer};
use crate::config::Config;
use crate::control::Control;
use crate::session::hooks::{self, Observer, Read};
use crate::shadow::{
    Call, Catalog, Cuts, CutsFuture, DigestBuilder, HeldCut, MismatchLog, NoCut, Outcome, Shadow, ShadowLimits,
    ShadowRead, ShadowSink, ShadowTasks, Timing, ValueWriter, spawn,
};
use crate::sql::{LexSettings, NotComparable, Script, glance};
use crate::switchover::Tandem;
use crate::upstream::control::connect;

pub(super) struct Shadows {
    databases: Arc<DashMap<String, Intake>>,
    log: MismatchLog,
    _log_writer: JoinHandle<()>,
    control: watch::Receiver<Control>,
}

struct Intake {
    sink: ShadowSink,
    _tasks: ShadowTasks,
}

impl Shadows {
    /// Opens the mismatch log; databases are attended to one by one.
    pub(super) fn start(config: &Config, control: watch::Receiver<Control>) -> Self {
        let log = &config.mismatch_log;
        let (log, log_writer) = MismatchLog::open(log.path.clone(), ValueWriter::new(log.values));
        Self {
            databases: Arc::default(),
            log,
            _log_writer: log_writer,
            control,
        }
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
