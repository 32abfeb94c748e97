//! The rehearsed writes of every database: starts one intake for each, and leaves there the
//! transactions that sessions come by.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use tokio::sync::watch;

use super::shadows::Shadows;
use crate::apply;
use crate::config::Config;
use crate::control::Control;
use crate::session::hooks;
use crate::shadow::Asked;
use crate::shadow::rehearsal::{
    Pace, RehearsalReport, RehearsalSink, RehearsalTasks, Rehearsals as Wanted, Rehearsed, Transaction,
    spawn_rehearsals,
};
use crate::sql::Script;
use crate::switchover::Tandem;

pub(super) struct Rehearsals {
    databases: Arc<DashMap<String, Intake>>,
    /// Whether proxy.yaml wants any write rehearsed.
    wanted: Arc<AtomicBool>,
    control: watch::Receiver<Control>,
}

struct Intake {
    sink: RehearsalSink,
    _tasks: RehearsalTasks,
}

impl Rehearsals {
    pub(super) fn new(config: &Config, control: watch::Receiver<Control>) -> Self {
        Self {
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
        let stats = self.databases.get(name)?.sink.stats();
        (self.wanted.load(Ordering::Relaxed) || stats.counts.executions > 0).then_some(stats)
    }

    /// All that is known of the writes, by database.
    pub(super) fn report(&self, slower: f64) -> BTreeMap<String, RehearsalReport> {
        self.databases
            .iter()
            .map(|database| (database.key().clone(), database.sink.report(slower)))
            .filter(|(_, report)| report.totals.counts.executions > 0 || report.totals.waiting > 0)
            .collect()
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
