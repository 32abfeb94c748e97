//! Canary reads of every database: whether the secondary may answer any now, and when that ends by
//! itself.
//!
//! A database's canary is *on* while proxy.yaml wants it, the phase shadows, the secondary is in good
//! order (all tables synced, nothing in quarantine, not too far behind) and its budget has not been
//! exceeded. Order and lag come and go; a budget that was exceeded turns the canary off until the
//! operator reloads proxy.yaml.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use dashmap::DashMap;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::shadows::Catalogs;
use crate::admin::api::{CanaryStatus, CanaryTurnedOff};
use crate::apply::{ApplierState, ApplierStatus};
use crate::chain;
use crate::config::Canary as Config;
use crate::control::{Control, Side};
use crate::session::hooks::{self, Applied, CanaryRead};
use crate::shadow::{
    Asked, CanaryCounts, CanaryEvent, CanaryLine, CanaryNews, Candidate, MismatchLog, Spent, Window, events, exceeded,
};
use crate::switchover::Tandem;

/// Between two looks at the secondary's order and the budget.
const EVERY: Duration = Duration::from_millis(250);
/// An applier that has just been replaced (a flip, a lost lease) is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// Of one database; older ones are in the mismatch log.
const TURNED_OFF_MAX: usize = 20;

/// Shared by all sessions.
pub(super) struct Canaries {
    config: ArcSwap<Config>,
    /// Whether proxy.yaml wants any.
    wanted: AtomicBool,
    sinks: Catalogs,
    control: watch::Receiver<Control>,
    databases: DashMap<String, Arc<Database>>,
    log: MismatchLog,
}

struct Database {
    tandem: Weak<Tandem>,
    on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Why it is off, where it is.
    off_because: Option<String>,
    /// The budget was exceeded.
    tripped: bool,
    /// The side that answers. What it has proved does not speak for the other.
    side: Option<Side>,
    /// Since when it has been on, and for how long before that, without being turned off.
    since: Option<Instant>,
    before: Duration,
    turned_off: Vec<CanaryTurnedOff>,
    window: Window,
    within: CanaryCounts,
    /// What the mismatch log has been told.
    told: CanaryCounts,
}

impl State {
    fn on_for(&self) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Database {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Canaries {
    pub(super) fn new(
        config: &Config,
        sinks: Catalogs,
        control: watch::Receiver<Control>,
        log: MismatchLog,
    ) -> Arc<Self> {
        Arc::new(Self {
            wanted: AtomicBool::new(config.any()),
            config: ArcSwap::from_pointee(config.clone()),
            sinks,
            control,
            databases: DashMap::new(),
            log,
        })
    }

    /// After a reload, which is also the operator's word to go on where a budget was exceeded.
    pub(super) fn reload(&self, config: &Config) {
        self.config.store(Arc::new(config.clone()));
        self.wanted.store(config.any(), Ordering::Relaxed);
        for database in &self.databases {
            let mut state = database.state();
            state.tripped = false;
            state.window.clear();
            drop(state);
            self.look(database.key(), &database);
        }
    }

    /// The databases there are now.
    pub(super) fn attend(&self, tandems: &[Arc<Tandem>]) {
        self.databases
            .retain(|name, _| tandems.iter().any(|tandem| tandem.name() == name));
        for tandem in tandems {
            self.databases.entry(tandem.name().to_owned()).or_insert_with(|| {
                Arc::new(Database {
                    tandem: Arc::downgrade(tandem),
                    on: AtomicBool::new(false),
                    state: Mutex::default(),
                })
            });
        }
    }

    /// Looks after the canaries as long as the process lives.
    pub(super) async fn watch(self: Arc<Self>) {
        loop {
            for (name, database) in self.all() {
                self.look(&name, &database);
            }
            sleep(EVERY).await;
        }
    }

    fn all(&self) -> Vec<(String, Arc<Database>)> {
        self.databases
            .iter()
            .map(|entry| (entry.key().clone(), entry.value().clone()))
            .collect()
    }

    fn look(&self, name: &str, database: &Database) {
        let config = self.config.load_full();
        let now = Instant::now();
        let counts = self.sinks.sink(name).map(|sink| sink.canary()).unwrap_or_default();
        let unfit = self.unfit(&config, database);
        let side = self.control.borrow().secondary();
        let mut state = database.state();
        if state.side.replace(side) != Some(side) {
            state.since = None;
            state.before = Duration::ZERO;
            state.window.clear();
        }
        state.within = state.window.look(now, &counts, config.budget.window);
        let spent = (!state.tripped)
            .then(|| exceeded(&config.budget, &state.within))
            .flatten();
        let was_on = state.since.is_some();
        if let Some(reason) = spent.filter(|_| was_on) {
            self.trip(name, &mut state, &config, &counts, reason);
        }
        if !state.tripped {
            state.off_because = unfit;
        }
        let on = state.off_because.is_none();
        match (was_on, on) {
            (false, true) => state.since = Some(now),
            (true, false) => {
                state.before = state.on_for();
                state.since = None;
            }
            _ => {}
        }
        if state.tripped {
            state.before = Duration::ZERO;
        }
        database.on.store(on, Ordering::Relaxed);
        if on != was_on {
            tracing::info!(
                database = name,
                on,
                why = state.off_because.as_deref().unwrap_or("in good order"),
                "canary reads"
            );
        }
    }

    /// Why no read may go to the secondary now, the budget aside.
    fn unfit(&self, config: &Config, database: &Database) -> Option<String> {
        if !config.any() {
            return Some("reads.canary_percent is 0".into());
        }
        let phase = self.control.borrow().phase;
        if !phase.shadows() {
            return Some(format!("phase {phase} has no canary reads"));
        }
        let applier = database.tandem.upgrade().and_then(|tandem| tandem.applier());
        let Some(applier) = applier else {
            return Some("nothing is mirrored".into());
        };
        out_of_order(&applier.status().borrow(), config.max_lag)
    }

    fn trip(&self, name: &str, state: &mut State, config: &Config, counts: &CanaryCounts, reason: String) {
        tracing::error!(
            database = name,
            reason,
            "canary reads turned themselves off: the budget is exceeded; a reload turns them on again"
        );
        metrics::counter!("pgtandem_canary_turned_off_total", "database" => name.to_owned()).increment(1);
        let turned_off = CanaryTurnedOff {
            at: crate::shadow::now(),
            reason: reason.clone(),
            after_seconds: state.on_for().as_secs_f64(),
        };
        if state.turned_off.len() == TURNED_OFF_MAX {
            state.turned_off.remove(0);
        }
        state.turned_off.push(turned_off);
        state.tripped = true;
        state.off_because = Some(reason.clone());
        state.window.clear();
        self.tell(&CanaryLine {
            database: name.to_owned(),
            what: CanaryNews::TurnedOff,
            reason: Some(reason),
            percent: config.percent,
            seconds_on: state.on_for().as_secs_f64(),
            counts: counts.since(&state.told),
        });
        state.told = counts.clone();
    }

    /// Nobody waits for the disk.
    fn tell(&self, line: &CanaryLine) {
        let (log, keys) = (self.log.clone(), chain::body(line));
        tokio::spawn(async move {
            let recorded = match keys {
                Ok(keys) => log.record(events::CANARY, keys).await.map(|_| ()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = recorded {
                tracing::warn!(error, "the mismatch log does not tell of a canary");
            }
        });
    }

    /// Writes what the canaries came to since the last such lines.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_statistics(&self) -> Result<(), String> {
        let percent = self.config.load().percent;
        for (name, database) in self.all() {
            let now = self.sinks.sink(&name).map(|sink| sink.canary()).unwrap_or_default();
            let (counts, seconds_on) = {
                let state = database.state();
                (now.since(&state.told), state.on_for().as_secs_f64())
            };
            if counts == CanaryCounts::default() {
                continue;
            }
            let line = CanaryLine {
                database: name,
                what: CanaryNews::Counts,
                reason: None,
                percent,
                seconds_on,
                counts,
            };
            let keys = chain::body(&line).map_err(|error| error.to_string())?;
            self.log.record(events::CANARY, keys).await?;
            database.state().told = now;
        }
        Ok(())
    }

    /// Absent where there is nothing to tell.
    pub(super) fn status(&self, name: &str) -> Option<CanaryStatus> {
        let config = self.config.load();
        let database = self.databases.get(name)?;
        let sink = self.sinks.sink(name);
        let counts = sink.as_ref().map(|sink| sink.canary()).unwrap_or_default();
        if !config.any() && counts == CanaryCounts::default() {
            return None;
        }
        let state = database.state();
        Some(CanaryStatus {
            on: database.on.load(Ordering::Relaxed),
            off_because: state.off_because.clone(),
            turned_off_by_budget: state.tripped,
            percent: config.percent,
            rules: config.rules.len(),
            on_seconds: state.on_for().as_secs_f64(),
            share: share(&counts),
            window_seconds: config.budget.window.as_secs_f64(),
            spent: Spent::of(&state.within),
            since: sink.map(|sink| sink.stats().since).unwrap_or_default(),
            counts,
            turned_off: state.turned_off.clone(),
        })
    }
}

/// Per cent of what was considered that the secondary answered.
fn share(counts: &CanaryCounts) -> f64 {
    if counts.considered == 0 {
        return 0.0;
    }
    100.0 * (counts.served.min(counts.considered)) as f64 / counts.considered as f64
}

/// Why the secondary's answers are not to be relied on.
fn out_of_order(status: &ApplierStatus, max_lag: Duration) -> Option<String> {
    match &status.state {
        ApplierState::Running | ApplierState::Waiting => {}
        ApplierState::Connecting { error } => {
            return Some(format!(
                "mirroring is connecting{}",
                error.as_ref().map_or_else(String::new, |error| format!(": {error}"))
            ));
        }
        ApplierState::Failing { error } | ApplierState::Halted { error } => {
            return Some(format!("mirroring stands still: {error}"));
        }
        ApplierState::Stopped => return Some("mirroring is stopped".into()),
    }
    if status.tables_to_seed() > 0 {
        return Some(format!("{} tables are not synced", status.tables_to_seed()));
    }
    if status.quarantine.transactions > 0 {
        return Some(format!(
            "{} transactions are in quarantine",
            status.quarantine.transactions
        ));
    }
    let lag = status.lag_now().seconds;
    (lag > max_lag.as_secs_f64()).then(|| {
        format!(
            "the secondary is {lag:.1} s behind; reads.canary_max_lag is {:.1} s",
            max_lag.as_secs_f64()
        )
    })
}

impl hooks::Canary for Canaries {
    fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn on(&self, database: &str) -> bool {
        self.databases
            .get(database)
            .is_some_and(|database| database.on.load(Ordering::Relaxed))
    }

    fn chooses(&self, asked: &Asked<'_>, read: &CanaryRead<'_>) -> bool {
        let Some(sink) = self.sinks.sink(asked.database) else {
            return false;
        };
        sink.count_canary(asked.text, CanaryEvent::Considered);
        sink.in_canary(asked) && sink.servable(&candidate(read), false)
    }

    fn chooses_transaction(&self, asked: &Asked<'_>, drawn: u64) -> bool {
        let Some(sink) = self.sinks.sink(asked.database) else {
            return false;
        };
        sink.count_canary(asked.text, CanaryEvent::Considered);
        sink.transaction_in_canary(asked, drawn)
    }

    fn servable(&self, read: &CanaryRead<'_>, inside: bool) -> bool {
        self.sinks
            .sink(read.database)
            .is_some_and(|sink| sink.servable(&candidate(read), inside))
    }

    fn types(&self, database: &str, types: &[u8]) -> Option<Vec<u8>> {
        self.sinks.sink(database)?.types_on_secondary(types)
    }

    fn arrived(&self, database: &str) -> Applied {
        let tandem = self.databases.get(database).map(|database| database.tandem.clone());
        let control = self.control.clone();
        Box::pin(async move {
            while control.borrow().phase.mirrors() {
                let Some(tandem) = tandem.as_ref().and_then(Weak::upgrade) else {
                    break;
                };
                if let Some(applier) = tandem.applier()
                    && applier.round_after_now().await.is_ok()
                {
                    return Ok(());
                }
                sleep(ASK_AGAIN).await;
            }
            Err("nothing is mirrored".into())
        })
    }

    fn wait(&self) -> Duration {
        self.config.load().wait
    }

    fn waited(&self, database: &str, time: Duration) {
        if let Some(sink) = self.sinks.sink(database) {
            sink.canary_waited(time);
        }
    }

    fn count(&self, database: &str, text: &[u8], event: CanaryEvent) {
        if let Some(sink) = self.sinks.sink(database) {
            sink.count_canary(text, event);
        }
    }
}

const fn candidate<'a>(read: &CanaryRead<'a>) -> Candidate<'a> {
    Candidate {
        script: Some(read.script),
        text: read.text,
        arguments: None,
        after_write: false,
        temporary: read.temporary,
        settings_known: true,
    }
}
