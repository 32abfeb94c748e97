//! The rehearsed writes of every database: starts one intake for each, and leaves there the
//! transactions that sessions come by.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use tokio::sync::{Mutex, watch};

use super::shadows::{Earlier, Shadows};
use crate::apply;
use crate::chain;
use crate::config::Config;
use crate::control::Control;
use crate::session::hooks;
use crate::shadow::rehearsal::{
    Pace, RehearsalReport, RehearsalSink, RehearsalTasks, Rehearsals as Wanted, Rehearsed, Transaction,
    spawn_rehearsals,
};
use crate::shadow::{Asked, Interval, MismatchLog, events};
use crate::sql::Script;
use crate::switchover::Tandem;

pub(super) struct Rehearsals {
    databases: Arc<DashMap<String, Intake>>,
    /// Whether proxy.yaml wants any write rehearsed.
    wanted: Arc<AtomicBool>,
    control: watch::Receiver<Control>,
    /// What earlier runs counted.
    earlier: Earlier,
    /// By database, what this run's lines of statistics have told.
    told: Mutex<HashMap<String, RehearsalReport>>,
}

struct Intake {
    sink: RehearsalSink,
    _tasks: RehearsalTasks,
}

impl Rehearsals {
    pub(super) fn new(config: &Config, control: watch::Receiver<Control>, shadows: &Shadows) -> Self {
        Self {
            earlier: shadows.earlier(),
            told: Mutex::default(),
            databases: Arc::default(),
            wanted: Arc::new(AtomicBool::new(config.rehearse.any())),
            control,
        }
    }

    pub(super) fn hook(&self) -> Arc<dyn hooks::Rehearse> {
        Arc::new(Shown {
            databases: self.databases.clone(),
            wanted: self.wanted.clone(),
        })
    }

    /// Begins with databases that are new, and leaves those that are gone.
    pub(super) fn attend(&self, tandems: &[Arc<Tandem>], config: &Config, shadows: &Shadows) {
        self.databases
            .retain(|name, _| tandems.iter().any(|tandem| tandem.name() == name));
        for tandem in tandems {
            let Some(reads) = shadows.sink(tandem.name()) else {
                continue;
            };
            self.databases.entry(tandem.name().to_owned()).or_insert_with(|| {
                let (sink, tasks) = spawn_rehearsals(Wanted {
                    database: tandem.name().to_owned(),
                    targets: tandem.targets().clone(),
                    rehearse: config.rehearse.clone(),
                    control: self.control.clone(),
                    pace: Arc::new(TandemPace(Arc::downgrade(tandem))),
                    log: shadows.log().clone(),
                    reads: &reads,
                });
                Intake { sink, _tasks: tasks }
            });
        }
    }

    /// After a reload.
    pub(super) fn reload(&self, config: &Config) {
        self.wanted.store(config.rehearse.any(), Ordering::Relaxed);
        for database in self.databases.iter() {
            database.sink.configure(&config.rehearse);
        }
    }

    /// Absent where nothing was ever rehearsed, nor is to be.
    pub(super) fn of_database(&self, name: &str) -> Option<Rehearsed> {
        let mut stats = self.databases.get(name)?.sink.stats();
        if let Some(earlier) = self.earlier.load().get(name) {
            stats = earlier.writes(&stats).unwrap_or(stats);
        }
        (self.wanted.load(Ordering::Relaxed) || stats.counts.executions > 0).then_some(stats)
    }

    /// What this run has counted of the writes, by database.
    fn counted(&self, slower: f64) -> BTreeMap<String, RehearsalReport> {
        self.databases
            .iter()
            .map(|database| (database.key().clone(), database.sink.report(slower)))
            .collect()
    }

    /// All that is known of the writes, by database: with what earlier runs counted.
    pub(super) fn report(&self, slower: f64) -> BTreeMap<String, RehearsalReport> {
        let earlier = self.earlier.load();
        self.counted(slower)
            .into_iter()
            .map(|(name, live)| match earlier.get(&name) {
                Some(earlier) if earlier.writes(&live.totals).is_some() => {
                    let whole = earlier.write_report(&live, slower);
                    (name, whole)
                }
                _ => (name, live),
            })
            .filter(|(_, report)| report.totals.counts.executions > 0 || report.totals.waiting > 0)
            .collect()
    }

    /// Writes what the rehearsals came to since the last such lines. What cannot be written is told by
    /// the next ones.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_statistics(&self, log: &MismatchLog) -> Result<(), String> {
        let mut told = self.told.lock().await;
        // What is slower is not told here.
        for (database, now) in self.counted(f64::INFINITY) {
            let before = told.get(&database).cloned().unwrap_or_default();
            for interval in Interval::of_writes(&database, &before, &now) {
                let keys = chain::body(&interval).map_err(|error| error.to_string())?;
                log.record(events::STATISTICS, keys).await?;
            }
            told.insert(database, now);
        }
        Ok(())
    }
}

/// The sessions' view: a transaction goes to its database's intake.
struct Shown {
    databases: Arc<DashMap<String, Intake>>,
    wanted: Arc<AtomicBool>,
}

impl hooks::Rehearse for Shown {
    fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn sampled(&self, asked: &Asked<'_>, script: &Script) -> bool {
        self.databases
            .get(asked.database)
            .is_some_and(|database| database.sink.samples(asked, script))
    }

    fn pass_over(&self, database: &str, script: &Script, text: &[u8]) {
        if let Some(database) = self.databases.get(database) {
            database.sink.pass_over(script, text);
        }
    }

    fn may_write(&self, database: &str, script: &Script) -> bool {
        self.databases
            .get(database)
            .is_some_and(|database| database.sink.may_write(script))
    }

    fn schema_changed(&self, database: &str) {
        if let Some(database) = self.databases.get(database) {
            database.sink.schema_changed();
        }
    }

    fn applied_round(&self, database: &str) -> u64 {
        self.databases
            .get(database)
            .map_or(0, |database| database.sink.applied_round())
    }

    fn offer(&self, database: &str, transaction: Transaction) {
        if let Some(database) = self.databases.get(database) {
            database.sink.offer(transaction);
        }
    }
}

/// The applier's rounds, in whichever direction it mirrors now.
struct TandemPace(Weak<Tandem>);

impl TandemPace {
    fn applier(&self) -> Option<Arc<apply::Applier>> {
        self.0.upgrade()?.applier()
    }
}

impl Pace for TandemPace {
    fn applied_round(&self) -> u64 {
        self.applier().map_or(0, |applier| applier.applied_round())
    }

    fn round_after_now(&self) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async {
            match self.applier() {
                Some(applier) => applier.round_after_now().await.is_ok(),
                None => false,
            }
        })
    }

    fn catch_up(&self) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async {
            match self.applier() {
                Some(applier) => applier.catch_up().await.is_ok(),
                None => false,
            }
        })
    }

    fn sequences_are_compared(&self) -> bool {
        self.applier().is_some_and(|applier| applier.sequences_are_compared())
    }
}
