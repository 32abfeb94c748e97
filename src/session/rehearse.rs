//! Transactions on their way, noted for their rehearsal on the secondary.
//!
//! What a transaction writes is noted as it passes, with what the primary says of each statement;
//! when it is over, it is offered as a whole. The client waits for none of it.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::hooks::{Asked, Rehearse};
use super::known::Portal;
use super::relay::Session;
use super::sniff::{Sniff, Word};
use crate::shadow::rehearsal::{Said, Step, Transaction};
use crate::sql::{Class, LeftOut, Part, Script, Statement, TransactionControl, part, single_read};
use crate::wire::backend::{self, Status};
use crate::wire::tracker::Mark;

/// Of one transaction; a longer one is left out.
const STEPS_MAX: usize = 64;
const BYTES_MAX: usize = 512 * 1024;

/// What is known of the open transaction's writes.
pub(super) struct Rehearsing {
    transaction: Transaction,
    bytes: usize,
    /// `None` until something that writes has come.
    sampled: Option<bool>,
    /// Of each marked request, whose answers are to come.
    awaited: VecDeque<VecDeque<Slot>>,
    /// When each step was sent; and when the last answer came.
    sent: Vec<Instant>,
    answered: Option<Instant>,
    /// Something failed, a statement or a commit.
    erred: bool,
    /// What the end of an explicit transaction said.
    ended: Option<Said>,
}

/// What one statement's answer is to be noted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Step(usize),
    /// COMMIT or ROLLBACK.
    End,
    Nothing,
}

impl Rehearsing {
    fn leave_out(&mut self, why: LeftOut) {
        self.transaction.left_out.get_or_insert(why);
    }

    /// An answer to something that was marked.
    fn answer(&mut self, kind: u8, body: &[u8]) {
        let said = match kind {
            b'C' => Said::Done(backend::tag(body)),
            b'E' => Said::Refused(
                backend::error_field(body, b'C')
                    .map(|code| String::from_utf8_lossy(code).into_owned())
                    .unwrap_or_default(),
            ),
            b's' => return self.leave_out(LeftOut::NotUnderstood),
            _ => return,
        };
        let Some(slots) = self.awaited.front_mut() else { return };
        let slot = slots.pop_front();
        if kind == b'E' || slots.is_empty() {
            self.awaited.pop_front();
        }
        let now = Instant::now();
        let before = self.answered.replace(now);
        match slot {
            Some(Slot::Step(at)) => {
                if let (Some(step), Some(&sent)) = (self.transaction.steps.get_mut(at), self.sent.get(at)) {
                    // In a pipeline its turn came when the one before it was answered.
                    step.took = now - before.map_or(sent, |before| before.max(sent));
                    step.said = Some(said);
                }
            }
            Some(Slot::End) => self.ended = Some(said),
            Some(Slot::Nothing) | None => {}
        }
    }

    /// So many marked requests are still to be answered: those before them were skipped.
    fn outstanding(&mut self, requests: usize) {
        while self.awaited.len() > requests {
            self.awaited.pop_front();
        }
    }

    /// The first step whose answer is to come.
    fn next_step(&self) -> Option<usize> {
        let slots = self.awaited.iter().flatten();
        slots
            .filter_map(|slot| match slot {
                Slot::Step(at) => Some(*at),
                Slot::End | Slot::Nothing => None,
            })
            .next()
    }

    /// A transaction is over. What was sent behind it stays.
    fn finish(&mut self) -> Option<Transaction> {
        let over = self.next_step().unwrap_or(self.transaction.steps.len());
        let rest = self.transaction.steps.split_off(over);
        let mut done = Transaction {
            steps: std::mem::replace(&mut self.transaction.steps, rest),
            ..self.transaction.clone()
        };
        self.sent.drain(..over.min(self.sent.len()));
        for slot in self.awaited.iter_mut().flatten() {
            if let Slot::Step(at) = slot {
                *at -= over;
            }
        }
        self.bytes = 0;
        self.transaction.left_out = self.transaction.steps.iter().find_map(|step| match step.part {
            Part::LeftOut(why) => Some(why),
            _ => None,
        });
        if done.steps.iter().any(|step| step.part == Part::Control) {
            // The settings are those of before.
            self.transaction.left_out.get_or_insert(LeftOut::UnknownSettings);
        }
        match self.ended.take() {
            // What it refuses is held against the last write.
            Some(refused @ Said::Refused(_)) => {
                let last = done
                    .steps
                    .iter_mut()
                    .rfind(|step| matches!(step.part, Part::Write { .. }));
                if let Some(last) = last {
                    last.said = Some(refused);
                }
                done.refused_at_end = true;
            }
            Some(Said::Done(tag)) => done.committed = tag == "COMMIT",
            None => {
                done.committed = !self.erred;
                done.refused_at_end = self.erred;
            }
        }
        self.erred = false;
        // What was skipped after an error, neither side has run.
        done.steps
            .retain(|step| step.said.is_some() || matches!(step.part, Part::LeftOut(_)));
        let writes = done.steps.iter().any(|step| step.part != Part::Control);
        (self.sampled == Some(true) && writes).then_some(done)
    }
}

impl Session {
    /// The hook, where writes are rehearsed now.
    pub(super) fn rehearses(&self) -> Option<Arc<dyn Rehearse>> {
        let hook = self.context.hooks.rehearse.as_ref()?;
        (self.control.phase.mirrors() && hook.wanted()).then(|| hook.clone())
    }

    pub(super) fn rehearsal_wanted(&self) -> bool {
        self.control.phase.mirrors() && self.context.hooks.rehearse.as_ref().is_some_and(|hook| hook.wanted())
    }

    /// Takes note of a statement that is about to pass; marks it where its answer is needed.
    pub(super) fn note_rehearsal(&mut self, text: &[u8], portal: Option<&Portal>, sniff: Sniff) -> Mark {
        let Some(hook) = self.rehearses() else {
            return Mark::None;
        };
        if sniff.word == Word::Read && !sniff.write && !sniff.setting {
            self.note_read_before_rehearsal(&*hook, text);
            return Mark::None;
        }
        let script = self.context.hooks.statements.get_as(text, self.lex);
        self.changes_schema |= script.has_ddl();
        let parts = self.parts(text, script);
        let several = parts.len() > 1;
        let mut slots = VecDeque::with_capacity(parts.len());
        for (text, script, part) in parts {
            slots.push_back(match part {
                Part::Nothing => {
                    if several {
                        self.note_read_before_rehearsal(&*hook, text);
                    }
                    Slot::Nothing
                }
                Part::Boundary => self.note_boundary(&*hook, &script),
                Part::Write { .. } | Part::Control | Part::LeftOut(_) => {
                    self.note_step(&*hook, text, &script, portal, part)
                }
            });
        }
        match &mut self.rehearsing {
            Some(rehearsing) if slots.iter().any(|slot| *slot != Slot::Nothing) => {
                rehearsing.awaited.push_back(slots);
                self.attention();
                Mark::Rehearsed
            }
            _ => Mark::None,
        }
    }

    /// The statements of a text.
    fn parts<'a>(&self, text: &'a [u8], script: Arc<Script>) -> Vec<(&'a [u8], Arc<Script>, Part)> {
        if script.statements.len() < 2 {
            let part = match part(&script, text) {
                Part::LeftOut(LeftOut::SqlExecute) if self.executes_a_read(&script) => Part::Nothing,
                part => part,
            };
            return vec![(text, script, part)];
        }
        let one = |statement: &Statement| {
            let text = statement.of(text);
            let script = self.context.hooks.statements.get_as(text, self.lex);
            let part = part(&script, text);
            (text, script, part)
        };
        let parts: Vec<_> = script.statements.iter().map(one).collect();
        let last = parts.len() - 1;
        let inside = |(at, (_, script, part)): (usize, &(&[u8], Arc<Script>, Part))| {
            let wanted = if begins(script) { 0 } else { last };
            *part == Part::Boundary && at != wanted
        };
        if parts.iter().enumerate().any(inside) {
            // One text, several transactions.
            return vec![(text, script, Part::LeftOut(LeftOut::SeveralStatements))];
        }
        parts
    }

    /// A read that may write, in a transaction, is not repeated, so neither is the rest of it.
    fn note_read_before_rehearsal(&mut self, hook: &dyn Rehearse, text: &[u8]) {
        let alone = self.tracker.status() == Status::Idle && self.tracker.at_sync() && self.rehearsing.is_none();
        let sampled = self
            .rehearsing
            .as_ref()
            .is_none_or(|rehearsing| rehearsing.sampled != Some(false));
        if alone || !sampled {
            return;
        }
        let script = self.context.hooks.statements.get_as(text, self.lex);
        if hook.may_write(&self.pair.name, &script) {
            self.rehearsing(hook).leave_out(LeftOut::VolatileRead);
        }
    }

    fn executes_a_read(&self, script: &Script) -> bool {
        let Some(Class::Execute(execute)) = script.single().map(|statement| &statement.class) else {
            return false;
        };
        self.shadowing.sql.prepared(&execute.name).is_some_and(|prepared| {
            let inner = self.context.hooks.statements.get_as(&prepared.statement, self.lex);
            single_read(&inner).is_ok()
        })
    }

    fn note_boundary(&mut self, hook: &dyn Rehearse, script: &Script) -> Slot {
        if begins(script) {
            self.begun_at_round
                .get_or_insert_with(|| hook.applied_round(&self.pair.name));
            return Slot::Nothing;
        }
        match &self.rehearsing {
            Some(rehearsing) if rehearsing.sampled != Some(false) => Slot::End,
            _ => Slot::Nothing,
        }
    }

    fn note_step(
        &mut self,
        hook: &dyn Rehearse,
        text: &[u8],
        script: &Arc<Script>,
        portal: Option<&Portal>,
        part: Part,
    ) -> Slot {
        let values = portal.map_or(Some(&b""[..]), |portal| portal.values.as_deref());
        let database = self.pair.name.clone();
        let sampled = self.rehearsing(hook).sampled;
        let sampled = match (sampled, part) {
            (None, Part::Control) => true,
            (Some(sampled), _) => sampled,
            (None, _) => {
                let asked = Asked {
                    database: &self.pair.name,
                    user: &self.login.user,
                    application: &self.registered.shared.application,
                    text,
                    values: values.unwrap_or_default(),
                };
                let sampled = hook.sampled(&asked, script);
                self.rehearsing(hook).sampled = Some(sampled);
                sampled
            }
        };
        if !sampled {
            if part != Part::Control {
                hook.pass_over(&database, script, text);
            }
            return Slot::Nothing;
        }
        let rehearsing = self.rehearsing(hook);
        if let Part::LeftOut(why) = part {
            rehearsing.leave_out(why);
        }
        if values.is_none() && part != Part::Control {
            rehearsing.leave_out(LeftOut::NotUnderstood);
        }
        let bind = Bytes::copy_from_slice(values.unwrap_or_default());
        rehearsing.bytes += text.len() + bind.len();
        if rehearsing.transaction.steps.len() >= STEPS_MAX || rehearsing.bytes > BYTES_MAX {
            rehearsing.leave_out(LeftOut::TooLong);
            if rehearsing.transaction.steps.len() >= STEPS_MAX * 4 {
                return Slot::Nothing;
            }
        }
        let kept = rehearsing.transaction.left_out.is_none();
        rehearsing.transaction.steps.push(Step {
            // Only the fingerprint of what is left out is needed.
            text: Bytes::copy_from_slice(text),
            script: script.clone(),
            types: portal.map_or(&[][..], |portal| &portal.statement.types).to_vec().into(),
            bind: if kept { bind } else { Bytes::new() },
            part,
            said: None,
            took: std::time::Duration::ZERO,
        });
        rehearsing.sent.push(Instant::now());
        match part {
            Part::LeftOut(_) => Slot::Nothing,
            _ => Slot::Step(rehearsing.transaction.steps.len() - 1),
        }
    }

    /// Of the open transaction.
    fn rehearsing(&mut self, hook: &dyn Rehearse) -> &mut Rehearsing {
        let round = self.begun_at_round;
        let (control, login, lex) = (self.control, &self.login, self.lex);
        let (shadowing, database) = (&self.shadowing, &self.pair.name);
        self.rehearsing.get_or_insert_with(|| {
            Box::new(Rehearsing {
                transaction: Transaction {
                    control,
                    login: login.clone(),
                    settings: shadowing.settings.clone(),
                    lex,
                    temporary: shadowing.temporary.clone(),
                    round: round.unwrap_or_else(|| hook.applied_round(database)),
                    steps: Vec::new(),
                    committed: false,
                    refused_at_end: false,
                    left_out: None,
                },
                bytes: 0,
                sampled: None,
                awaited: VecDeque::new(),
                sent: Vec::new(),
                answered: None,
                erred: false,
                ended: None,
            })
        })
    }

    /// A frame that answers what was marked.
    pub(super) fn rehearsal_frame(&mut self, kind: u8, body: &[u8]) {
        if let Some(rehearsing) = &mut self.rehearsing {
            rehearsing.answer(kind, body);
        }
    }

    /// The server gave an error, whatever to.
    pub(super) fn rehearsal_failed(&mut self) {
        if let Some(rehearsing) = &mut self.rehearsing {
            rehearsing.erred = true;
        }
    }

    /// A ReadyForQuery has passed.
    pub(super) fn rehearsal_ready(&mut self) {
        let idle = self.tracker.status() == Status::Idle;
        if let Some(rehearsing) = &mut self.rehearsing {
            rehearsing.outstanding(self.tracker.awaited_with(Mark::Rehearsed));
            if idle {
                let over = rehearsing.finish();
                if rehearsing.transaction.steps.is_empty() && rehearsing.awaited.is_empty() {
                    self.rehearsing = None;
                }
                if let (Some(transaction), Some(hook)) = (over, &self.context.hooks.rehearse) {
                    hook.offer(&self.pair.name, transaction);
                }
            }
        }
        if idle {
            self.begun_at_round = None;
            if std::mem::take(&mut self.changes_schema)
                && let Some(hook) = &self.context.hooks.rehearse
            {
                hook.schema_changed(&self.pair.name);
            }
        }
    }
}

fn begins(script: &Script) -> bool {
    matches!(
        script.single().map(|statement| &statement.class),
        Some(Class::Transaction(TransactionControl::Begin { .. }))
    )
}
