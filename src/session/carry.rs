//! Moving an idle session to the other side: its state is read from the server it is on, and
//! brought about on a connection to the other one. That is done before a switchover holds
//! anybody; what a session has run since is followed by one short question to its server
//! ([`super::footprint`]), and only where that finds a change is its state copied once more. The
//! move itself asks nobody: the two connections change places.

use super::asking::{ANSWER_TIMEOUT, Answer, Trouble, in_time};
use super::footprint::{self, Digest, Footprint};
use super::registry::{BackendKey, State as RegistryState};
use super::relay::{Direction, End, Session};
use super::standby::Standby;
use crate::control::Side;

/// As of when a session's state lies on its standby.
pub(super) struct Copied {
    /// How many transactions the session had begun.
    transactions: u64,
    /// What can be told of its state in short; nothing where it could not be asked for.
    footprint: Option<Footprint>,
}

impl Session {
    /// Sees to it that a connection to `side` has this session's state, so that it can move there.
    /// The inner error says why it cannot.
    pub(super) async fn make_ready(&mut self, side: Side) -> Result<Result<(), String>, End> {
        if self.side == side {
            return Ok(Ok(()));
        }
        if self.active {
            return Ok(Err("a transaction is open".into()));
        }
        if self.standby.as_ref().is_none_or(|standby| standby.side != side) {
            let limit = self.context.settings.load().limits.connect_timeout;
            let target = self.pair.config.target(side);
            let _permit = self.registered.registry.opening().acquire_owned().await;
            match crate::upstream::within(limit, target, &self.login).await {
                Ok(backend) => self.standby = Some(Box::new(Standby::new(side, backend))),
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        // What the client parsed on the secondary is told first, so that it is asked for, too.
        self.pay_back().await?;
        if self.is_ready(side) || self.follow_footprint().await? {
            self.registered.shared.set_ready(true);
            return Ok(Ok(()));
        }
        self.copy_state().await
    }

    /// Nothing has been run since the state was copied.
    fn is_ready(&self, side: Side) -> bool {
        let standby = self.standby.as_ref().filter(|standby| standby.side == side);
        let copied = standby.and_then(|standby| standby.copied.as_ref());
        copied.is_some_and(|copied| copied.transactions == self.transactions)
    }

    /// Moves to the primary, which is on the other side. False: its state there is missing or old.
    pub(super) fn move_to_primary(&mut self) -> bool {
        let ready = self.is_ready(self.control.primary);
        if ready {
            self.swap();
        }
        ready
    }

    /// Goes where the primary is, also where nobody has seen to it that it can: the session finished
    /// a read meanwhile, or its proxy heard of the flip late.
    ///
    /// # Errors
    /// It cannot move, and its statements must not reach the side that is not the primary.
    pub(super) async fn follow_late(&mut self) -> Result<(), End> {
        if self.follow()? {
            return Ok(());
        }
        let primary = self.control.primary;
        // A hold that begins now waits for it.
        self.registered.shared.publish(RegistryState::Active);
        let ready = self.make_ready(primary).await;
        self.registered.shared.publish(RegistryState::Idle);
        self.registered.registry.came_to_rest();
        match ready? {
            Ok(()) => self.follow().map(|_| ()),
            Err(reason) => Err(End::Ordered(format!(
                "terminating connection: the primary is now {primary}, and this session could not be moved there: {reason}"
            ))),
        }
    }

    /// What has changed since the state was copied, if that is no more than the unnamed statement.
    /// False: it has to be copied anew.
    async fn follow_footprint(&mut self) -> Result<bool, End> {
        let copied = self.standby.as_ref().and_then(|standby| standby.copied.as_ref());
        let Some(before) = copied.and_then(|copied| copied.footprint.clone()) else {
            return Ok(false);
        };
        if before.settings != self.statements.settings_noted() {
            return Ok(false);
        }
        let Some(state) = self.ask_footprint().await? else {
            return Ok(false);
        };
        let now = Footprint::new(state, &self.statements);
        let Some(standby) = &mut self.standby else {
            return Ok(false);
        };
        if now.state != before.state {
            return Ok(false);
        }
        if now.unnamed != before.unnamed {
            let unnamed = self.statements.unnamed();
            let told = tokio::time::timeout(ANSWER_TIMEOUT, standby.prepare_unnamed(unnamed)).await;
            if !matches!(told, Ok(Ok(()))) {
                self.standby = None;
                return Ok(false);
            }
        }
        standby.copied = Some(Copied {
            transactions: self.transactions,
            footprint: Some(now),
        });
        Ok(true)
    }

    async fn ask_footprint(&mut self) -> Result<Option<Digest>, End> {
        // Its statement has gone with a DISCARD, say.
        let told = |answer: Answer| answer.error.is_none().then(|| footprint::digest(&answer.rows));
        let answered = in_time(self.exchange(&footprint::question())).await?;
        Ok(answered.ok().and_then(told))
    }

    /// Has the server ready for the short question, while nobody waits; returns its answer now.
    async fn introduce_footprint(&mut self, settable: &[u8]) -> Result<Option<Digest>, End> {
        let introduction = footprint::introduction(settable, self.statements.custom());
        let answer = in_time(self.exchange(&introduction)).await?;
        let Some(answer) = answer.ok().filter(|answer| answer.error.is_none()) else {
            return Ok(None);
        };
        self.footprinted = true;
        Ok(Some(footprint::digest(&answer.rows)))
    }

    /// Leaves nothing of ours on the client's server connection.
    pub(super) async fn forget_footprint(&mut self) -> Result<(), End> {
        if std::mem::take(&mut self.footprinted) {
            // One that it refuses is gone already.
            in_time(self.exchange(&footprint::goodbye())).await?.ok();
        }
        Ok(())
    }

    /// The client's statements go to the other connection from here on.
    fn swap(&mut self) {
        let Some(standby) = self.standby.take() else { return };
        // Its other side is another now.
        self.canary = None;
        let mut standby = *standby;
        let reported = std::mem::replace(&mut self.reported, standby.reported);
        reported.put_differences(&self.reported, self.down.outbox.bytes());
        self.lex = self.reported.lex();
        let old = Standby {
            side: self.side,
            stream: std::mem::replace(&mut self.server, standby.stream),
            pid: 0,
            key: Box::default(),
            reported,
            pending: std::mem::take(&mut self.down.pending),
            // Until the session does anything, the way back is open.
            copied: Some(Copied {
                transactions: self.transactions,
                footprint: None,
            }),
            used: true,
        };
        self.footprinted = false;
        self.registered.shared.set_ready(false);
        let new = BackendKey {
            target: self.pair.config.target(standby.side).clone(),
            pid: standby.pid,
            key: std::mem::take(&mut standby.key),
        };
        let old = match self.registered.shared.backend() {
            Some(backend) => Standby {
                pid: backend.pid,
                key: backend.key,
                ..old
            },
            None => old,
        };
        self.side = standby.side;
        self.registered.shared.set_backend(new);
        let outbox = std::mem::take(&mut self.down.outbox);
        self.down = Direction {
            outbox,
            ..Direction::beginning_with(standby.pending)
        };
        self.standby = Some(Box::new(old));
    }

    /// Brings the standby to this session's state. The inner error says what cannot be.
    pub(super) async fn copy_state(&mut self) -> Result<Result<(), String>, End> {
        self.pay_back().await?;
        let state = match in_time(self.inspect()).await? {
            Ok(state) => state,
            Err(reason) => return Ok(Err(reason)),
        };
        let footprint = self.introduce_footprint(&state.settable).await?;
        let unnamed = self.statements.unnamed();
        let Some(standby) = &mut self.standby else {
            return Ok(Err("no connection to the other side".into()));
        };
        let replayed = tokio::time::timeout(ANSWER_TIMEOUT, standby.replay(&state, unnamed, &self.login.user));
        let result = match replayed.await {
            Ok(Ok(())) => {
                let footprint = footprint.map(|digest| Footprint::new(digest, &self.statements));
                standby.copied = Some(Copied {
                    transactions: self.transactions,
                    footprint,
                });
                self.registered.shared.set_ready(true);
                return Ok(Ok(()));
            }
            Ok(Err(Trouble::Refused(reason))) => Err(reason),
            Ok(Err(Trouble::Gone(cause))) => Err(format!("the other side's connection: {cause}")),
            Err(_) => Err("the other side does not answer".into()),
        };
        // Half-way to a state that is nobody's: not used again.
        self.standby = None;
        Ok(result)
    }
}
