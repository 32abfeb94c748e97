//! What a session does while replies must be looked at one by one: DDL in mirroring phases, and
//! (in `observe`) reads that are shown to the shadow.
//!
//! DDL is followed, in its own transaction, by the hook that records it; the client hears that the
//! statement succeeded only when the hook has, and hears the hook's error instead if it has not.
//!
//! - By Execute: the hook's frames go right behind it, before the client's Sync.
//! - By a Query: its statements are run one by one as extended messages with one Sync at the end,
//!   so that they stay one implicit transaction; replies are translated back to what a Query gives.
//! - Outside transactions (CREATE INDEX CONCURRENTLY): it runs as it came; after its ReadyForQuery
//!   the hook runs by itself, and its ReadyForQuery is the one that the client gets.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::observe::Observation;
use super::outbox::Gather;
use super::relay::Session;
use crate::sql::{Class, DdlKind, Script};
use crate::wire::backend::{self, shift_position};
use crate::wire::tracker::{Mark, Owner, Request, Tracker};
use crate::wire::{frontend, put_frame};

/// The hook's own statement and portal.
const HOOK_NAME: &[u8] = b"pgtandem_ddl";
/// in_failed_sql_transaction
const FAILED_TRANSACTION: &[u8] = b"25P02";

#[derive(Default)]
pub(super) struct Attention {
    /// The CommandComplete of DDL whose hook has not run yet.
    held: Vec<u8>,
    pub steps: Option<Box<Steps>>,
    pub outside: Option<Outside>,
    pub observation: Option<Observation>,
    /// Of portals of which a part was fetched, by their names.
    pub suspended: HashMap<Box<[u8]>, Observation>,
}

/// A Query that is run statement by statement.
pub(super) struct Steps {
    text: Box<[u8]>,
    script: Arc<Script>,
    next: usize,
    /// The Sync has been sent.
    synced: bool,
    utf8: bool,
}

impl Steps {
    pub(super) fn new(text: &[u8], script: Arc<Script>, utf8: bool) -> Self {
        Self {
            text: text.into(),
            script,
            next: 0,
            synced: false,
            utf8,
        }
    }

    /// What is sent of the text for a statement: with all that stands behind it up to the next one,
    /// and before the first. So the server has the words around it that it would have had (a syntax
    /// error `at or near ";"`), and a single statement is, to its very `current_query()`, as the
    /// client sent it.
    fn part(&self, at: usize) -> Range<usize> {
        let begins = |at: usize| self.script.statements.get(at).map(|statement| statement.span.start);
        let start = if at == 0 { Some(0) } else { begins(at) };
        start.unwrap_or(self.text.len())..begins(at + 1).unwrap_or(self.text.len())
    }

    /// Characters of the text before the part that runs now, as error positions count them.
    fn characters_before(&self) -> usize {
        let before = self.next.checked_sub(1).map_or(0, |running| self.part(running).start);
        let before = &self.text[..before];
        if self.utf8 {
            // Continuation bytes begin no character.
            before.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
        } else {
            before.len()
        }
    }
}

/// DDL that cannot run in a transaction.
#[derive(Debug)]
pub(super) struct Outside {
    text: Box<[u8]>,
    stage: Stage,
    succeeded: bool,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Stage {
    /// Came by Execute, and the client's Sync has not gone by yet.
    BeforeSync,
    /// The statement is running, or done.
    Running,
    /// The hook is running.
    Recording,
}

impl Outside {
    pub(super) const fn after_query(text: Box<[u8]>) -> Self {
        Self {
            text,
            stage: Stage::Running,
            succeeded: false,
        }
    }

    pub(super) const fn after_execute(text: Box<[u8]>) -> Self {
        Self {
            text,
            stage: Stage::BeforeSync,
            succeeded: false,
        }
    }
}

impl Attention {
    /// Something of this is not over yet.
    pub(super) const fn busy(&self) -> bool {
        self.steps.is_some() || self.outside.is_some()
    }

    /// Whether the client's frames have to wait.
    pub(super) fn holds_client(&self, tracker: &Tracker) -> bool {
        self.steps.is_some()
            || self.outside.as_ref().is_some_and(|outside| match outside.stage {
                // Up to its Sync the client's frames belong to the same batch.
                Stage::BeforeSync => false,
                Stage::Running | Stage::Recording => !tracker.answered(),
            })
    }

    /// The client's Sync has gone by.
    pub(super) fn synced(&mut self) {
        if let Some(outside) = &mut self.outside
            && outside.stage == Stage::BeforeSync
        {
            outside.stage = Stage::Running;
        }
    }

    /// More of the frame that is passing.
    pub(super) fn piece(&mut self, bytes: &[u8], last: bool) {
        if let Some(observation) = &mut self.observation {
            observation.piece(bytes, last);
        }
    }
}

impl Session {
    /// Looks at a server's frame; returns whether the client gets it.
    pub(super) fn attend(&mut self, kind: u8, body: &[u8], whole: bool, gather: &mut Gather<'_>) -> bool {
        let reply = self.tracker.received(kind, body);
        let Some(awaited) = reply.to else {
            if kind == b'N' && self.says_of_us(body) {
                return false;
            }
            if kind == b'N' && self.tracker.front().is_some_and(|front| front.mark == Mark::Observed) {
                self.observe_frame(kind, body, whole, false);
            }
            return true;
        };
        match awaited.mark {
            Mark::Observed => self.observe_frame(kind, body, whole, reply.terminal),
            Mark::Rehearsed => self.rehearsal_frame(kind, body),
            Mark::None | Mark::Withheld => {}
        }
        match awaited.owner {
            Owner::Client => self.attend_client(kind, body, awaited.mark, gather),
            Owner::Step => self.attend_step(kind, body, awaited.mark, gather),
            Owner::Hook => self.attend_hook(kind, body, awaited.request, gather),
        }
    }

    /// Whether a notice tells of the proxy's own work around DDL, which the client did not ask for:
    /// what a hook says, short of a warning, and at `client_min_messages = debug1` that the event
    /// triggers are called.
    fn says_of_us(&self, notice: &[u8]) -> bool {
        let field = |code| backend::error_field(notice, code);
        match self.tracker.front() {
            Some(front) if front.owner == Owner::Hook => backend::severity(notice) != Some(b"WARNING"),
            Some(_) => self.context.hooks.ddl.is_some() && field(b'R') == Some(b"EventTriggerInvoke"),
            None => false,
        }
    }

    fn attend_client(&mut self, kind: u8, body: &[u8], mark: Mark, gather: &mut Gather<'_>) -> bool {
        let attention = self.attention.get_or_insert_default();
        match (kind, mark, &mut attention.outside) {
            (b'C', Mark::Withheld, Some(outside)) => {
                outside.succeeded = true;
                // A client that has not sent its Sync may wait for this first.
                if outside.stage == Stage::BeforeSync {
                    return true;
                }
                put_frame(&mut attention.held, kind, |out| out.extend_from_slice(body));
                return false;
            }
            (b'C', Mark::Withheld, None) => {
                put_frame(&mut attention.held, kind, |out| out.extend_from_slice(body));
                return false;
            }
            // The ReadyForQuery of the statement's own batch.
            (b'Z', _, Some(_)) if !self.tracker.awaits_withheld() => {
                if let Some(outside) = attention.outside.take()
                    && outside.succeeded
                {
                    self.record_outside(outside);
                    return false;
                }
            }
            // More of the same batch: what was held back goes before it.
            (_, _, Some(_)) if !attention.held.is_empty() => gather.insert().append(&mut attention.held),
            _ => {}
        }
        true
    }

    /// The statement has succeeded; its hook runs before the client hears of it.
    fn record_outside(&mut self, outside: Outside) {
        let Some(hooks) = self.context.hooks.ddl.clone() else {
            return;
        };
        let mut out = std::mem::take(self.up.outbox.bytes());
        self.put_hook_call(&hooks.outside, &outside.text, &mut out);
        out.extend_from_slice(frontend::SYNC);
        self.tracker.note(b'S', Owner::Hook, Mark::None);
        *self.up.outbox.bytes() = out;
        self.attention().outside = Some(Outside {
            stage: Stage::Recording,
            ..outside
        });
    }

    fn attend_hook(&mut self, kind: u8, body: &[u8], request: Request, gather: &mut Gather<'_>) -> bool {
        let attention = self.attention.get_or_insert_default();
        match (kind, request) {
            (b'C', Request::Execute) => gather.insert().append(&mut attention.held),
            (b'E', _) => {
                attention.held.clear();
                // A transaction that has failed already refuses the client's statement likewise.
                if backend::error_field(body, b'C') != Some(FAILED_TRANSACTION) {
                    tracing::warn!(
                        session = self.registered.shared.id.0,
                        error = backend::error_text(body),
                        "record a DDL statement"
                    );
                }
                self.advance_if_answered();
                return true;
            }
            (b'Z', _) => {
                // In place of the ReadyForQuery that was kept from the client.
                attention.outside = None;
                return true;
            }
            _ => {}
        }
        self.advance_if_answered();
        false
    }

    fn attend_step(&mut self, kind: u8, body: &[u8], mark: Mark, gather: &mut Gather<'_>) -> bool {
        let attention = self.attention.get_or_insert_default();
        let keep = match kind {
            // A Query has none of these.
            b'1' | b'2' | b'3' | b'n' | b't' => false,
            b'C' if mark == Mark::Withheld => {
                put_frame(&mut attention.held, kind, |out| out.extend_from_slice(body));
                false
            }
            b'E' => {
                attention.held.clear();
                let characters = attention.steps.as_ref().map_or(0, |steps| steps.characters_before());
                let shifted = shift_position(body, characters);
                put_frame(gather.insert(), kind, |out| out.extend_from_slice(&shifted));
                false
            }
            b'Z' => {
                attention.steps = None;
                return true;
            }
            _ => true,
        };
        self.advance_if_answered();
        keep
    }

    fn advance_if_answered(&mut self) {
        let stepping = self
            .attention
            .as_ref()
            .is_some_and(|attention| attention.steps.is_some());
        if stepping && self.tracker.answered() {
            let mut out = std::mem::take(self.up.outbox.bytes());
            self.advance_steps(&mut out);
            *self.up.outbox.bytes() = out;
        }
    }

    /// Sends the next statement of a Query that is run in steps, or the Sync that ends it.
    pub(super) fn advance_steps(&mut self, out: &mut Vec<u8>) {
        let Some(mut steps) = self.attention.as_mut().and_then(|attention| attention.steps.take()) else {
            return;
        };
        let statement = steps.script.statements.get(steps.next);
        match statement {
            Some(statement) if !self.tracker.skipping() => {
                let is_ddl = matches!(&statement.class, Class::Ddl(ddl) if ddl.kind == DdlKind::Transactional);
                self.put_hook_before(&statement.class, out);
                frontend::put_parse(out, b"", &steps.text[steps.part(steps.next)], &[]);
                frontend::put_bind(out, b"", b"", &[]);
                frontend::put_describe_portal(out, b"");
                frontend::put_execute(out, b"");
                for kind in *b"PBD" {
                    self.tracker.note(kind, Owner::Step, Mark::None);
                }
                let mark = if is_ddl { Mark::Withheld } else { Mark::None };
                self.tracker.note(b'E', Owner::Step, mark);
                if is_ddl {
                    self.put_hook(statement.of(&steps.text), out);
                }
                out.extend_from_slice(frontend::FLUSH);
                steps.next += 1;
            }
            _ if !steps.synced => {
                // A Query leaves no unnamed statement behind.
                if !self.tracker.skipping() {
                    frontend::put_close_statement(out, b"");
                    self.tracker.note(b'C', Owner::Step, Mark::None);
                }
                out.extend_from_slice(frontend::SYNC);
                self.tracker.note(b'S', Owner::Step, Mark::None);
                steps.synced = true;
            }
            _ => {}
        }
        self.attention().steps = Some(steps);
    }

    /// The hook for DDL that has just been sent, in the same transaction.
    pub(super) fn put_hook(&mut self, text: &[u8], out: &mut Vec<u8>) {
        if let Some(hooks) = self.context.hooks.ddl.clone() {
            self.put_hook_call(&hooks.in_transaction, text, out);
        }
    }

    /// The hook for DDL that is about to be sent.
    pub(super) fn put_hook_before(&mut self, class: &Class, out: &mut Vec<u8>) {
        let before = self.context.hooks.ddl.as_ref().and_then(|hooks| hooks.before.clone());
        if let (Some(hook), Class::Ddl(ddl)) = (before, class)
            && ddl.kind == DdlKind::Transactional
        {
            self.put_hook_call(&hook, ddl.facts().as_bytes(), out);
        }
    }

    fn put_hook_call(&mut self, hook: &str, text: &[u8], out: &mut Vec<u8>) {
        // A hook that failed has left its statement behind: prepared statements are not undone.
        frontend::put_close_statement(out, HOOK_NAME);
        frontend::put_parse(out, HOOK_NAME, hook.as_bytes(), &[]);
        frontend::put_bind(out, HOOK_NAME, HOOK_NAME, &[Some(text)]);
        frontend::put_execute(out, HOOK_NAME);
        frontend::put_close_portal(out, HOOK_NAME);
        frontend::put_close_statement(out, HOOK_NAME);
        for kind in *b"CPBECC" {
            self.tracker.note(kind, Owner::Hook, Mark::None);
        }
    }
}
