//! Reads that a flip does not wait for: they are finished on the side where they began, and their
//! sessions move afterwards.
//!
//! What is known not to write needs no hold: a transaction that said that it only reads, and a
//! single statement outside transactions that the catalog shows to write nothing. The session
//! knows the first by itself. Of the second it keeps no text, which would cost every statement
//! something; so the server is asked what it is running, and the session makes sure that it is
//! still the same. Who is wrong about it loses nothing: the fence refuses the write.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::oneshot;

use super::registry::{Hold, Registry, Shared, State, order};
use super::relay::Session;
use super::sniff::{Access, Sniff};
use crate::control::Side;
use crate::wire::backend::Status;

/// Sessions that are between two of their turns answer later, and are asked again.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a server process runs, as `pg_stat_activity` shows it.
#[derive(Debug, Clone)]
pub struct Running {
    pub text: String,
    /// The server keeps no more of it (`track_activity_query_size`).
    pub cut_off: bool,
    /// It waits for a lock, perhaps of another statement than the one that it goes on with.
    pub waits_for_lock: bool,
}

/// Asked of a session.
pub(super) struct ReadAsked {
    /// What its server process runs, where that has been asked for.
    running: Option<Running>,
    answer: oneshot::Sender<Said>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    /// The flip need not wait.
    Reading,
    /// It depends on what the statement is.
    OneStatement,
    /// It may write.
    Busy,
}

impl Registry {
    /// Lets busy sessions of `side` finish what only reads; `ask` tells what server processes are
    /// running there.
    pub async fn let_reads_be(
        &self,
        _hold: &Hold,
        side: Side,
        ask: impl AsyncFnOnce(Vec<i32>) -> HashMap<i32, Running>,
    ) {
        let undecided = self.ask_readers(side, |session, _| session.is_busy().then_some(None));
        let undecided = undecided.await;
        if undecided.is_empty() {
            return;
        }
        let running = ask(undecided).await;
        self.ask_readers(side, |_, pid| running.get(&pid).cloned().map(Some))
            .await;
    }

    /// How many sessions finish a read where it began.
    pub fn reading(&self) -> usize {
        let mut reading = 0;
        self.each(|session| reading += usize::from(session.state() == State::Reading));
        reading
    }

    /// Asks those sessions of `side` that `with` gives something for, by their server process; returns
    /// the processes of those whose statement decides.
    async fn ask_readers(&self, side: Side, with: impl Fn(&Shared, i32) -> Option<Option<Running>>) -> Vec<i32> {
        let mut answers = Vec::new();
        self.each(|session| {
            let Some(backend) = session.backend().filter(|backend| backend.target.side == side) else {
                return;
            };
            if let Some(running) = with(session, backend.pid) {
                let (answer, answered) = oneshot::channel();
                session.asked().read = Some(ReadAsked { running, answer });
                session.order(order::READ);
                answers.push(async move { (backend.pid, answered.await) });
            }
        });
        let answers = join_all(answers.into_iter().map(|answer| tokio::time::timeout(PATIENCE, answer)));
        let undecided = answers.await.into_iter().filter_map(|answer| match answer {
            Ok((pid, Ok(Said::OneStatement))) => Some(pid),
            _ => None,
        });
        undecided.collect()
    }
}

impl Session {
    /// Takes note of what a transaction says that it may do.
    pub(super) fn note_access(&mut self, sniff: Sniff) {
        match sniff.access {
            Some(Access::Default) if self.reported.get(b"default_transaction_read_only") == Some(b"on") => {
                self.access = Some(Access::ReadOnly);
            }
            Some(Access::Default) | None => {}
            said => self.access = said,
        }
    }

    pub(super) fn say_what_it_reads(&mut self, asked: ReadAsked) {
        let said = self.what_it_reads(asked.running.as_ref());
        if said == Said::Reading {
            self.reading = true;
            let shared = &self.registered.shared;
            shared.publish(State::Reading);
            // Nobody waits for it to be ready.
            shared.clear(order::READY);
            if let Some((_, answer)) = shared.asked().ready.take() {
                answer.send(Ok(())).ok();
            }
            self.registered.registry.came_to_rest();
        }
        asked.answer.send(said).ok();
    }

    fn what_it_reads(&self, running: Option<&Running>) -> Said {
        // Of the last look: it has begun nothing since that keeps a session where it is.
        let stays = self.registered.shared.looked().uncarriable.is_some();
        if !self.active || stays || self.on_secondary() || self.tracker.readies() > 1 {
            return Said::Busy;
        }
        if self.access == Some(Access::ReadOnly) && self.tracker.status() != Status::Idle {
            return Said::Reading;
        }
        if !self.tracker.is_one_statement() || self.acknowledging.is_some() {
            return Said::Busy;
        }
        match running {
            None => Said::OneStatement,
            Some(running) if self.writes_nothing(running) => Said::Reading,
            Some(_) => Said::Busy,
        }
    }

    /// The server told it of the one statement that was and is under way; while a Parse is, too, it
    /// may have been that one's.
    fn writes_nothing(&self, running: &Running) -> bool {
        let text = running.text.as_bytes();
        if self.tracker.awaits_parse() && running.waits_for_lock {
            return false;
        }
        if !running.cut_off {
            return self.is_read(text);
        }
        let mut whole = self.statements.beginning_with(text).peekable();
        whole.peek().is_some() && whole.all(|text| self.is_read(text))
    }

    fn is_read(&self, text: &[u8]) -> bool {
        let Some(hook) = self.context.hooks.acknowledge.as_deref() else {
            return false;
        };
        let script = self.context.hooks.statements.get_as(text, self.lex);
        !script.statements.is_empty() && !hook.may_write(&self.pair.name, &script)
    }
}
