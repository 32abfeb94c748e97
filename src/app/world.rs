//! What the process is about: its configuration, its databases, where the migration stands.
//! The one place that writes [`Control`].

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::bail;
use arc_swap::ArcSwap;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::acknowledge::BothSides;
use super::canaries::Canaries;
use super::flips::Ordered;
use super::leaving::{beside, end_others};
use super::rehearsals::Rehearsals;
use super::shadows::Shadows;
use crate::admin::api::{Flip, ReloadAnswer};
use crate::apply::Awaited;
use crate::chain::Head;
use crate::config::{Config, EVERY_OTHER_DATABASE};
use crate::control::{Control, Epoch, Phase};
use crate::routing::{Databases, Pair};
use crate::session::hooks::{DdlHooks, Hooks, Mirrored, OwnConnections};
use crate::switchover::records::Member;
use crate::switchover::{Beginning, CannotBegin, Participant, Tandem, recover, settle_database};
use crate::{journal, session};

/// Between two tries to find out which side is primary.
const BEGIN_RETRY: Duration = Duration::from_secs(1);

pub(super) struct World {
    pub(super) config: ArcSwap<Config>,
    pub(super) sessions: Arc<session::Context>,
    pub(super) shadows: Shadows,
    pub(super) rehearsals: Rehearsals,
    pub(super) both_sides: Arc<BothSides>,
    pub(super) canaries: Arc<Canaries>,
    pub(super) control: watch::Sender<Control>,
    /// One for each database; `"*"` stands for as many as its servers have.
    tandems: ArcSwap<Vec<Arc<Tandem>>>,
    /// Their names, for sessions that begin.
    names: watch::Sender<Arc<HashSet<String>>>,
    /// A session wants a database that is not among them.
    look: Arc<Notify>,
    /// Held by whoever changes the phase: one change at a time.
    pub(super) transition: Arc<tokio::sync::Mutex<()>>,
    pub(super) participant: Arc<Participant>,
    /// Databases that a client is about to drop, and until when they are left alone.
    leaving: Arc<Leaving>,
    facts: Mutex<Facts>,
    pub(super) started: Instant,
}

/// A server gives connections that are in the way of DROP DATABASE five seconds; the drop on
/// the secondary follows within a round or two.
const LEFT_ALONE: Duration = Duration::from_secs(15);
/// Names of databases on their way to be dropped: a client drops few at once.
const LEAVING_MAX: usize = 64;

struct Leaving {
    until: Mutex<HashMap<String, Instant>>,
    names: mpsc::Sender<String>,
}

impl Leaving {
    fn is_left_alone(&self, dbname: &str) -> bool {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.retain(|_, until| *until > Instant::now());
        until.contains_key(dbname)
    }
}

impl OwnConnections for Leaving {
    fn leave(&self, dbname: &str) {
        let until = Instant::now() + LEFT_ALONE;
        let mut leaving = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.insert(dbname.to_owned(), until);
        // No room: the server says that the database is in use, and the client asks again.
        self.names.try_send(dbname.to_owned()).ok();
    }
}

/// What the admin pages tell besides the databases' own status.
#[derive(Default)]
pub(super) struct Facts {
    /// Why `phase:` of proxy.yaml is not what is served.
    pub(super) problem: Option<String>,
    pub(super) last_flip: Option<Flip>,
    pub(super) serving: bool,
}

impl World {
    pub(super) fn new(config: Config) -> anyhow::Result<Arc<Self>> {
        let control = Control {
            phase: Phase::Initial,
            primary: config.phase.primary(),
            epoch: Epoch::FIRST,
        };
        let (sender, receiver) = watch::channel(control);
        let shadows = Shadows::start(&config, receiver.clone())?;
        let both_sides = BothSides::new(config.writes, shadows.catalogs(), receiver.clone());
        let rehearsals = Rehearsals::new(&config, receiver.clone(), &shadows);
        let canaries = Canaries::new(
            &config.reads.canary,
            shadows.catalogs(),
            receiver.clone(),
            shadows.log().clone(),
        );
        let settings = session::Settings::from_config(&config)?;
        let (names, leaving_names) = mpsc::channel(LEAVING_MAX);
        let leaving = Arc::new(Leaving {
            until: Mutex::default(),
            names,
        });
        let (tandem_names, mirrored_names) = watch::channel(Arc::default());
        let look = Arc::new(Notify::new());
        let hooks = Hooks {
            mirrored: Some(Mirrored {
                names: mirrored_names,
                look: look.clone(),
            }),
            connections: Some(leaving.clone()),
            ddl: Some(DdlHooks {
                before: Some(journal::DDL_HOOK_BEFORE.into()),
                in_transaction: journal::DDL_HOOK.into(),
                outside: journal::DDL_HOOK_OUTSIDE.into(),
            }),
            shadow: Some(shadows.hook()),
            acknowledge: Some(both_sides.clone()),
            rehearse: Some(rehearsals.hook()),
            canary: Some(canaries.clone()),
            ..Hooks::default()
        };
        let sessions = session::Context::new(settings, receiver, hooks);
        let listen: Vec<String> = config.listen.iter().map(ToString::to_string).collect();
        let participant = Participant::new(Member {
            id: format!("{:016x}", rand::random::<u64>()),
            name: crate::apply::this_proxy(),
            address: listen.join(", "),
        });
        let world = Arc::new(Self {
            leaving,
            config: ArcSwap::from_pointee(config),
            sessions,
            shadows,
            rehearsals,
            both_sides,
            canaries,
            control: sender,
            tandems: ArcSwap::default(),
            names: tandem_names,
            look,
            transition: Arc::default(),
            participant,
            facts: Mutex::new(Facts {
                problem: Some("starting: it is not yet known which side is primary".into()),
                ..Facts::default()
            }),
            started: Instant::now(),
        });
        tokio::spawn(world.clone().leave_databases(leaving_names));
        Ok(world)
    }

    pub(super) fn sessions(&self) -> Arc<session::Context> {
        self.sessions.clone()
    }

    pub(super) fn tandems(&self) -> Arc<Vec<Arc<Tandem>>> {
        self.tandems.load_full()
    }

    /// Those that are new are captured already, where the phase mirrors.
    fn set_tandems(&self, tandems: Vec<Arc<Tandem>>) {
        let names = tandems.iter().map(|tandem| tandem.name().to_owned()).collect();
        self.tandems.store(Arc::new(tandems));
        self.names.send_replace(Arc::new(names));
    }

    /// Shadow reads and waiting commits are those of the databases there are.
    fn attend(&self) {
        let tandems = self.tandems();
        self.shadows.attend(&tandems, &self.config.load());
        self.rehearsals.attend(&tandems, &self.config.load(), &self.shadows);
        self.both_sides.attend(&tandems);
        self.canaries.attend(&tandems);
    }

    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn control_now(&self) -> Control {
        *self.control.borrow()
    }

    /// Finds out where the migration stands and leads it to the phase of proxy.yaml.
    ///
    /// # Errors
    /// What the databases record contradicts proxy.yaml, or each other. A server that cannot be
    /// reached, and whose answer is needed, is asked until it can.
    pub(super) async fn begin(self: &Arc<Self>) -> anyhow::Result<()> {
        let _changing = self.transition.lock().await;
        let wish = self.config.load().phase;
        let control = loop {
            match self.look(wish).await {
                Ok(control) => break control,
                Err(CannotBegin::Contradiction(why)) => bail!(why),
                Err(CannotBegin::NotYet(why)) => {
                    tracing::warn!(why, "not serving yet");
                    self.facts().problem = Some(why);
                    tokio::time::sleep(BEGIN_RETRY).await;
                }
            }
        };
        self.control.send_replace(control);
        if control.phase.mirrors() {
            for tandem in self.tandems().iter() {
                tandem.start_mirroring(control).await.map_err(anyhow::Error::msg)?;
            }
        }
        self.attend();
        if let Some(differs) = self.wish_differs(control) {
            tracing::warn!(differs);
            self.facts().problem = Some(differs);
            return Ok(());
        }
        if let Some(why) = self.unconfirmed(wish) {
            tracing::warn!(
                why,
                "proxy.yaml says phase: complete, which is not done by starting a proxy"
            );
            self.facts().problem = Some(why);
            return Ok(());
        }
        match self.make_so(wish, Ordered::in_config()).await {
            Ok(changed) => {
                self.facts().problem = None;
                tracing::info!(phase = %self.control_now().phase, primary = %self.control_now().primary, ?changed, "begun");
                Ok(())
            }
            Err(why) => bail!(why),
        }
    }

    /// Clients are let in.
    pub(super) fn serving(self: &Arc<Self>) {
        self.facts().serving = true;
        let world = self.clone();
        tokio::spawn(async move { world.discover_databases().await });
    }

    /// Asks every database's two sides for what they record.
    async fn look(&self, wish: Phase) -> Result<Control, CannotBegin> {
        let tandems = self.find_tandems(wish).await?;
        self.settle_flips(&tandems).await?;
        let mut common: Option<(Control, String)> = None;
        for tandem in &tandems {
            let control = loop {
                let (legacy, new) = tandem.observe_both().await;
                match recover(&legacy, &new, wish)? {
                    Beginning::At(control) => break control,
                    Beginning::Restore { side, epoch } => {
                        tracing::warn!(database = tandem.name(), %side, %epoch, "a switchover was interrupted half-way; going where its record says");
                        // Its record may have been out of reach a moment ago.
                        self.settle_flips(&tandems).await?;
                        let settled = settle_database(&tandems, tandem, side).await;
                        if !settled.map_err(CannotBegin::NotYet)? {
                            tandem.restore(side, epoch).await.map_err(CannotBegin::NotYet)?;
                        }
                    }
                }
            };
            match &mut common {
                None => common = Some((control, tandem.name().to_owned())),
                Some((first, name)) => {
                    if first.primary != control.primary {
                        return Err(CannotBegin::Contradiction(format!(
                            "database {name} records {} as primary, database {} records {}; switch one of them over first, with a proxy.yaml that names it alone",
                            first.primary,
                            tandem.name(),
                            control.primary
                        )));
                    }
                    // Where some are mirrored and others are new here, the new ones are installed.
                    first.epoch = first.epoch.max(control.epoch);
                    first.phase = first.phase.max(control.phase);
                }
            }
        }
        self.set_tandems(tandems);
        common
            .map(|(control, _)| control)
            .ok_or_else(|| CannotBegin::NotYet("there is no database yet".into()))
    }

    /// The databases that proxy.yaml names, with those that `"*"` stands for on the primary.
    async fn find_tandems(&self, wish: Phase) -> Result<Vec<Arc<Tandem>>, CannotBegin> {
        let config = self.config.load();
        let databases = Databases::new(&config.databases);
        let mut names: Vec<String> = config
            .databases
            .keys()
            .filter(|name| *name != EVERY_OTHER_DATABASE)
            .cloned()
            .collect();
        if let Some(every_other) = config.databases.get(EVERY_OTHER_DATABASE) {
            let target = every_other.target(wish.primary());
            let listed = crate::catalog::databases(target).await.map_err(CannotBegin::NotYet)?;
            names.extend(
                listed
                    .into_iter()
                    .filter(|name| !config.databases.contains_key(name) && !self.leaving.is_left_alone(name)),
            );
        }
        let known = self.tandems();
        Ok(names
            .iter()
            .filter_map(|name| {
                let existing = known.iter().find(|tandem| tandem.name() == name).cloned();
                existing.or_else(|| databases.find(name).map(|pair| self.new_tandem(pair)))
            })
            .collect())
    }

    fn new_tandem(&self, pair: Arc<Pair>) -> Arc<Tandem> {
        let config = self.config.load();
        Tandem::new(
            pair,
            config.journal,
            config.writes,
            config.stray_writers,
            config.verify,
            config.backfill,
            self.awaited(),
        )
    }

    /// A database that is found while others are mirrored was perhaps created in one of those, and
    /// comes to the secondary with that one's round. Once each of them has had a round since, it does
    /// not.
    fn awaited(&self) -> Awaited {
        // The statement is recorded right after it has succeeded.
        const RECORDED_WITHIN: Duration = Duration::from_secs(1);
        let created_until = Instant::now() + RECORDED_WITHIN;
        let others: Vec<Weak<Tandem>> = self.tandems().iter().map(Arc::downgrade).collect();
        Awaited::as_long_as(move || {
            let mut others = others.iter().filter_map(Weak::upgrade);
            !others.all(|other| other.has_caught_up_since(created_until))
        })
    }

    /// Under `"*"`, databases come and go: looks for them as long as the process lives.
    async fn discover_databases(self: Arc<Self>) {
        const EVERY: Duration = Duration::from_secs(2);
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = self.look.notified() => {}
            }
            if !self.config.load().databases.contains_key(EVERY_OTHER_DATABASE) {
                continue;
            }
            let _changing = self.transition.lock().await;
            if let Err(error) = self.adopt_databases().await {
                tracing::warn!(error, "look for new databases");
            }
        }
    }

    /// Closes the proxy's own connections to databases that clients are about to drop.
    async fn leave_databases(self: Arc<Self>, mut names: mpsc::Receiver<String>) {
        while let Some(name) = names.recv().await {
            let (gone, staying): (Vec<_>, Vec<_>) =
                self.tandems().iter().cloned().partition(|tandem| {
                    tandem.targets().legacy.dbname() == name || tandem.targets().new.dbname() == name
                });
            let primary = self.control_now().primary;
            for targets in gone.iter().filter_map(|gone| {
                let mut staying = staying.iter();
                staying.find_map(|staying| beside(gone.targets(), staying.targets(), primary))
            }) {
                tokio::spawn(end_others(name.clone(), targets, Instant::now() + LEFT_ALONE));
            }
            self.set_tandems(staying);
            self.attend();
            for tandem in gone {
                tracing::info!(
                    database = tandem.name(),
                    "a client is dropping it; left alone meanwhile"
                );
                tandem.stop_applier().await;
            }
        }
    }

    async fn adopt_databases(&self) -> Result<(), String> {
        let control = self.control_now();
        let tandems = self
            .find_tandems(control.phase)
            .await
            .map_err(|error| error.to_string())?;
        let known = self.tandems();
        for tandem in &tandems {
            if !known.iter().any(|other| other.name() == tandem.name()) && control.phase.mirrors() {
                tandem
                    .start_mirroring(control)
                    .await
                    .map_err(|error| error.to_string())?;
                tracing::info!(database = tandem.name(), "a new database is mirrored");
            }
        }
        for gone in known
            .iter()
            .filter(|old| !tandems.iter().any(|tandem| tandem.name() == old.name()))
        {
            gone.stop_applier().await;
            tracing::info!(database = gone.name(), "a dropped database is no longer mirrored");
        }
        self.set_tandems(tandems);
        self.attend();
        Ok(())
    }

    /// Reads proxy.yaml again and makes it so.
    ///
    /// # Errors
    /// The file is wrong (then nothing was changed), or the phase cannot be made so (then the
    /// rest of the file is in force, and the status says why). Without `yes`, also a phase that
    /// ends the way back.
    pub(super) async fn reload_config(self: &Arc<Self>, yes: bool) -> Result<ReloadAnswer, String> {
        let _changing = self.transition.lock().await;
        let old = self.config.load_full();
        let new = Config::load(&old.path).map_err(|error| error.to_string())?;
        if let (Some(why), false) = (self.unconfirmed(new.phase), yes) {
            return Err(why);
        }
        let mut changed = self.check_reloadable(&old, &new)?;
        let settings = session::Settings::from_config(&new).map_err(|error| format!("tls: {error}"))?;
        let wish = new.phase;
        // Where too much was refused, this is the operator's word to go on.
        self.tandems().iter().for_each(|tandem| tandem.go_on());
        self.sessions.reload(settings);
        self.shadows.reload(&new);
        self.shadows.record_sampling(&new).await;
        self.rehearsals.reload(&new);
        self.both_sides.reload(new.writes);
        self.canaries.reload(&new.reads.canary);
        for tandem in self.tandems().iter() {
            tandem.backfill().configure(new.backfill);
            tandem.configure_verify(new.verify);
        }
        self.config.store(Arc::new(new));
        let outcome = self.make_so(wish, Ordered::in_config()).await;
        self.facts().problem = outcome.as_ref().err().cloned();
        changed.extend(outcome?);
        Ok(ReloadAnswer {
            phase: self.control_now().phase,
            changed,
        })
    }

    /// What a reload takes over by itself, in words.
    fn check_reloadable(&self, old: &Config, new: &Config) -> Result<Vec<String>, String> {
        let fixed = |key: &str| Err(format!("{key}: cannot be changed by a reload; restart the proxy"));
        if old.databases != new.databases {
            return fixed("databases");
        }
        if old.listen != new.listen {
            return fixed("listen");
        }
        if old.admin != new.admin {
            return fixed("admin");
        }
        if old.limits.worker_threads != new.limits.worker_threads {
            return fixed("limits: worker_threads");
        }
        if old.journal != new.journal {
            return fixed("journal");
        }
        let of_quarantine = |config: &Config| {
            (
                config.writes.retry_attempts,
                config.writes.error_threshold,
                config.writes.error_window,
            )
        };
        if of_quarantine(old) != of_quarantine(new) {
            return fixed("writes: retry_attempts, error_threshold, error_window");
        }
        if old.mismatch_log != new.mismatch_log {
            return fixed("mismatch_log");
        }
        if old.stray_writers != new.stray_writers {
            return fixed("stray_writers");
        }
        let mut changed = Vec::new();
        for (name, differs) in [
            ("auth", old.auth != new.auth),
            ("limits", old.limits != new.limits),
            ("writes", old.writes != new.writes),
            ("reads", old.reads != new.reads),
            ("switchover", old.switchover != new.switchover),
            ("backfill", old.backfill != new.backfill),
            ("verify", old.verify != new.verify),
        ] {
            if differs {
                changed.push(format!("{name} changed"));
            }
        }
        Ok(changed)
    }

    /// Appliers finish their round and give their lease back.
    pub(super) async fn end(&self) {
        for tandem in self.tandems().iter() {
            tandem.stop_applier().await;
        }
        if let Err(error) = self.record_reads().await {
            tracing::warn!(error, "the mismatch log does not tell of the last reads");
        }
        if let Err(error) = self.shadows.record_end().await {
            tracing::warn!(error, "the mismatch log does not tell that the proxy stopped");
        }
    }

    /// Writes what the shadow and canary reads and the rehearsed writes came to since the last such lines.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(super) async fn record_reads(&self) -> Result<Head, String> {
        self.canaries.record_statistics().await?;
        // Where the log could not take it before.
        self.shadows.record_sampling(&self.config.load()).await;
        self.rehearsals.record_statistics(self.shadows.log()).await?;
        self.shadows.record_statistics().await
    }

    /// The log's lines of statistics, as long as the process lives.
    pub(super) async fn keep_statistics(self: Arc<Self>) {
        self.shadows.record_sampling(&self.config.load()).await;
        loop {
            tokio::time::sleep(self.config.load().mismatch_log.statistics_every).await;
            if let Err(error) = self.record_reads().await {
                tracing::warn!(error, "statistics could not be written to the mismatch log");
            }
            if let Err(error) = self.shadows.record_slower().await {
                tracing::warn!(error, "the mismatch log does not tell of what is slower on new");
            }
        }
    }
}
