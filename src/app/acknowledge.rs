//! `writes.acknowledge: both`: what a commit waits for, and what happens when that takes too long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout};

use super::shadows::Catalogs;
use crate::admin::api::AcknowledgeStatus;
use crate::config::{Acknowledge, WhenLate, Writes};
use crate::control::Control;
use crate::session::hooks::{self, Applied};
use crate::sql::Script;
use crate::switchover::Tandem;

/// An applier that has just been replaced (a flip, a lost lease) is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Shared by all sessions.
pub(super) struct BothSides {
    writes: ArcSwap<Writes>,
    catalogs: Catalogs,
    control: watch::Receiver<Control>,
    databases: DashMap<String, Arc<Waits>>,
}

/// The commits of one database.
struct Waits {
    tandem: Weak<Tandem>,
    control: watch::Receiver<Control>,
    /// Since when commits are answered by the primary alone, because a round came too late.
    degraded: Mutex<Option<Instant>>,
    /// Commits that were answered by the primary alone.
    answered_early: AtomicU64,
    /// Commits whose client was told that the secondary is late.
    refused: AtomicU64,
}

impl BothSides {
    pub(super) fn new(writes: Writes, catalogs: Catalogs, control: watch::Receiver<Control>) -> Arc<Self> {
        Arc::new(Self {
            writes: ArcSwap::from_pointee(writes),
            catalogs,
            control,
            databases: DashMap::new(),
        })
    }

    /// After a reload.
    pub(super) fn reload(&self, writes: Writes) {
        self.writes.store(Arc::new(writes));
    }

    /// The databases there are now.
    pub(super) fn attend(&self, tandems: &[Arc<Tandem>]) {
        self.databases
            .retain(|name, _| tandems.iter().any(|tandem| tandem.name() == name));
        for tandem in tandems {
            self.databases.entry(tandem.name().to_owned()).or_insert_with(|| {
                Arc::new(Waits {
                    tandem: Arc::downgrade(tandem),
                    control: self.control.clone(),
                    degraded: Mutex::default(),
                    answered_early: AtomicU64::new(0),
                    refused: AtomicU64::new(0),
                })
            });
        }
    }

    /// Absent where commits are acknowledged by the primary.
    pub(super) fn status(&self, database: &str) -> Option<AcknowledgeStatus> {
        let writes = self.writes.load();
        let waits = self.databases.get(database)?;
        (writes.acknowledge == Acknowledge::Both).then(|| AcknowledgeStatus {
            degraded_seconds: waits.degraded().map(|since| since.elapsed().as_secs_f64()),
            answered_early: waits.answered_early.load(Ordering::Relaxed),
            refused: waits.refused.load(Ordering::Relaxed),
        })
    }
}

impl hooks::Acknowledge for BothSides {
    fn wanted(&self) -> bool {
        self.writes.load().acknowledge == Acknowledge::Both
    }

    fn may_write(&self, database: &str, script: &Script) -> bool {
        self.catalogs.may_write(database, script)
    }

    fn applied(&self, database: &str) -> Applied {
        let writes = **self.writes.load();
        let waits = self.databases.get(database).map(|waits| waits.clone());
        Box::pin(async move {
            match waits {
                Some(waits) => waits.applied(writes).await,
                None => Ok(()),
            }
        })
    }
}

impl Waits {
    fn degraded(&self) -> MutexGuard<'_, Option<Instant>> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn applied(self: Arc<Self>, writes: Writes) -> Result<(), String> {
        if self.degraded().is_some() {
            self.answered_early.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        if timeout(writes.both_timeout, self.round_after_now()).await.is_ok() {
            return Ok(());
        }
        match writes.when_late {
            WhenLate::Degrade => {
                self.answered_early.fetch_add(1, Ordering::Relaxed);
                self.degrade(writes.both_timeout);
                Ok(())
            }
            WhenLate::Error => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(format!(
                    "the {} side has not followed within {:?} (writes.both_timeout)",
                    self.control.borrow().secondary(),
                    writes.both_timeout
                ))
            }
        }
    }

    /// Returns when a round that began after this call has been applied, or nothing is mirrored
    /// any more.
    async fn round_after_now(&self) {
        while self.control.borrow().phase.mirrors() {
            let Some(tandem) = self.tandem.upgrade() else { return };
            if let Some(applier) = tandem.applier()
                && applier.round_after_now().await.is_ok()
            {
                return;
            }
            sleep(ASK_AGAIN).await;
        }
    }

    /// From here on the primary's commit is enough, until the secondary has caught up.
    fn degrade(self: &Arc<Self>, after: Duration) {
        let mut degraded = self.degraded();
        if degraded.is_some() {
            return;
        }
        *degraded = Some(Instant::now());
        let database = self.tandem.upgrade().map(|tandem| tandem.name().to_owned());
        tracing::error!(
            database,
            ?after,
            "commits are acknowledged by the primary alone: the secondary did not follow within writes.both_timeout"
        );
        let waits = self.clone();
        tokio::spawn(async move {
            waits.round_after_now().await;
            let since = waits.degraded().take();
            tracing::warn!(
                database,
                seconds = since.map(|since| since.elapsed().as_secs_f64()),
                "commits are acknowledged by both sides again"
            );
        });
    }
}
