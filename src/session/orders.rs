//! What a session does when the registry tells it to: prepare for a flip, move, end.

use std::cell::RefCell;
use std::rc::Rc;

use tokio_util::task::AbortOnDropHandle;

use super::registry::{Looked, PreparedOne, State, order};
use super::relay::{End, Session};
use super::standby::Standby;
use crate::control::Side;
use crate::upstream::{Backend, LoginError, within};

/// The other side's connection while it is being opened: by a task beside the session, which goes
/// on relaying.
pub(super) struct Opening {
    side: Side,
    result: Rc<RefCell<Option<Result<Backend, LoginError>>>>,
    _task: AbortOnDropHandle<()>,
}

impl Session {
    /// Does what was ordered, as far as it can be done now.
    pub(super) async fn obey(&mut self) -> Result<(), End> {
        let shared = self.registered.shared.clone();
        let orders = shared.orders();
        if orders & order::END_NOW != 0 || (orders & order::END_WHEN_IDLE != 0 && !self.active) {
            let reason = shared.asked().end_because.take();
            return Err(End::Ordered(reason.unwrap_or_else(|| {
                "terminating connection due to administrator command".to_owned()
            })));
        }
        if orders & order::FOLLOW != 0 && !self.active {
            shared.clear(order::FOLLOW);
            self.follow_late().await?;
        }
        if orders & order::SETTLE != 0 && !self.active {
            shared.clear(order::SETTLE | order::COPY);
            shared.set_ready(false);
            self.opening = None;
            if let Some(standby) = self.standby.take() {
                standby.close().await;
            }
            self.forget_footprint().await?;
        }
        if orders & order::PREPARE != 0 {
            shared.clear(order::PREPARE);
            let asked = shared.asked().prepare.take();
            if let Some((side, answer)) = asked {
                self.preparing = Some(answer);
                self.prepare(side).await;
            }
        }
        if orders & order::STANDBY != 0 {
            shared.clear(order::STANDBY);
            self.standby_opened().await?;
        }
        if orders & order::COPY != 0 && !self.active {
            shared.clear(order::COPY);
            // Under a hold it is asked for, and whoever asks hears of what is in the way.
            if self.standby.is_some() && !self.registered.registry.held() {
                self.copy_at_rest().await?;
            }
        }
        if orders & order::LOOK != 0 {
            shared.clear(order::LOOK);
            let asked = shared.asked().look.take();
            self.find_obstacles().await?;
            // Whoever asked has gone on by now, or hears it.
            asked.map(|answer| answer.send(()).ok());
        }
        if orders & order::READ != 0 {
            shared.clear(order::READ);
            let asked = shared.asked().read.take();
            if let Some(asked) = asked {
                self.say_what_it_reads(asked);
            }
        }
        if orders & order::READY != 0 && !self.active {
            shared.clear(order::READY);
            let asked = shared.asked().ready.take();
            if let Some((side, answer)) = asked {
                let ready = self.make_ready(side).await?;
                answer.send(ready).ok();
            }
        }
        Ok(())
    }

    async fn prepare(&mut self, side: Side) {
        if self.side == side {
            self.answer(None, None);
            return;
        }
        if let Some(standby) = &self.standby
            && standby.side == side
        {
            // Left from an attempt that was given up.
            self.registered.shared.order(order::STANDBY);
            return;
        }
        self.standby = None;
        if let Some(lane) = self.give_up_lane(side) {
            self.standby = Some(lane);
            self.registered.shared.order(order::STANDBY);
            return;
        }
        let result = Rc::new(RefCell::new(None));
        let (slot, shared) = (result.clone(), self.registered.shared.clone());
        let (pair, login) = (self.pair.clone(), self.login.clone());
        let limit = self.context.settings.load().limits.connect_timeout;
        let task = tokio::task::spawn_local(async move {
            let opened = within(limit, pair.config.target(side), &login).await;
            *slot.borrow_mut() = Some(opened);
            shared.order(order::STANDBY);
        });
        self.opening = Some(Opening {
            side,
            result,
            _task: AbortOnDropHandle::new(task),
        });
    }

    /// The other side's connection is there, or could not be opened.
    async fn standby_opened(&mut self) -> Result<(), End> {
        if let Some(opening) = self.opening.take() {
            let opened = opening.result.borrow_mut().take();
            match opened {
                Some(Ok(backend)) => self.standby = Some(Box::new(Standby::new(opening.side, backend))),
                Some(Err(error)) => {
                    self.answer(Some(error.to_string()), None);
                    return Ok(());
                }
                None => self.opening = Some(opening),
            }
        }
        if self.standby.is_none() {
            return Ok(());
        }
        if self.active {
            // Nobody waits for its transaction here.
            self.registered.shared.order(order::COPY);
            self.answer(None, None);
            return Ok(());
        }
        let uncarriable = self.copy_at_rest().await?;
        self.answer(None, uncarriable);
        Ok(())
    }

    /// Copies the session's state to its standby; returns why that cannot be done.
    async fn copy_at_rest(&mut self) -> Result<Option<String>, End> {
        // A hold that begins now waits until the session's state has been read.
        self.registered.shared.publish(State::Active);
        let copied = self.copy_state().await;
        self.registered.shared.publish(State::Idle);
        self.registered.registry.came_to_rest();
        Ok(copied?.err())
    }

    /// Asks the server what would keep the session where it is. Not while it is busy, and not under a
    /// hold, which would have to wait for the answer.
    async fn find_obstacles(&mut self) -> Result<(), End> {
        let shared = self.registered.shared.clone();
        let known = shared.looked().at == Some(self.transactions);
        if known || self.active || self.registered.registry.held() {
            return Ok(());
        }
        shared.publish(State::Active);
        let found = self.uncarriable().await;
        shared.publish(State::Idle);
        self.registered.registry.came_to_rest();
        let uncarriable = found?;
        *shared.looked() = Looked {
            at: Some(self.transactions),
            uncarriable,
        };
        Ok(())
    }

    fn answer(&mut self, failed: Option<String>, uncarriable: Option<String>) {
        if let Some(answer) = self.preparing.take() {
            answer.send(PreparedOne { failed, uncarriable }).ok();
        }
    }
}
