//! What becomes of each frame of the client's, decided as it passes.

use std::rc::Rc;

use super::attention::{Attention, Outside, Steps};
use super::canary::Look;
use super::known::Known;
use super::outbox::Gather;
use super::relay::{End, Session};
use super::sniff::{Sniff, sniff};
use crate::sql::{Class, DdlKind};
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::frontend::{self, Bind, Named};
use crate::wire::tracker::{Mark, Owner};

/// A Query or Parse larger than this passes without being understood. DDL of this size is found by
/// the catalog's watch.
const UNDERSTOOD_MAX: usize = 16 << 20;

/// What is done with a frame that was understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Pass(Mark),
    /// DDL by Execute: it passes, and the hook goes right behind it.
    HookBehind,
    /// A Query that is run statement by statement instead.
    Steps,
}

/// A message of the client's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    pub kind: u8,
    pub body: &'a [u8],
}

impl Session {
    /// Goes through a chunk; returns how much of it was used. What is not used is presented again,
    /// with more behind it or when what it waits for has happened.
    pub(super) fn client_frames(&mut self, gather: &mut Gather<'_>) -> Result<usize, End> {
        let chunk = gather.chunk();
        let mut at = 0;
        self.up.blocked = false;
        while at < chunk.len() {
            let rest = &chunk[at..];
            if !self.up.framer.at_boundary() {
                let taken = self.up.framer.rest(rest.len());
                gather.keep(at..at + taken);
                at += taken;
                continue;
            }
            let header = match Header::frontend(rest) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(error) => return Err(End::Violation(error)),
            };
            if self.looks_for_canary() {
                match self.look(rest)? {
                    Look::Pass => {}
                    Look::More => break,
                    Look::Wait | Look::Turn => {
                        self.up.blocked = true;
                        break;
                    }
                }
            }
            let understand = self.understands(header);
            if understand && rest.len() < header.total {
                break;
            }
            let whole = understand.then(|| Frame {
                kind: header.kind,
                body: &rest[HEADER_LEN..header.total],
            });
            if !self.may_pass(header.kind, whole)? {
                self.up.blocked = true;
                break;
            }
            if header.kind == b'F' || !understand && matches!(header.kind, b'Q' | b'E') {
                self.note_write(None);
                self.note_unknown();
            }
            let plan = if understand {
                self.understand(header.kind, &rest[HEADER_LEN..header.total])
            } else {
                Plan::Pass(Mark::None)
            };
            if plan == Plan::HookBehind {
                self.hook_before(&rest[HEADER_LEN..header.total], gather.insert());
            }
            match plan {
                Plan::Steps => {
                    // The Query itself stays here; its statements go instead of it.
                    at += header.total;
                    self.advance_steps(gather.insert());
                    continue;
                }
                Plan::Pass(mark) => self.tracker.note(header.kind, Owner::Client, mark),
                Plan::HookBehind => self.tracker.note(header.kind, Owner::Client, Mark::Withheld),
            }
            let taken = self.up.framer.pass(header, rest.len());
            gather.keep(at..at + taken);
            at += taken;
            self.note_passed(taken);
            if plan == Plan::HookBehind {
                self.hook_behind(&rest[HEADER_LEN..header.total], gather.insert());
            }
            if let Some(attention) = &mut self.attention {
                match header.kind {
                    b'S' => attention.synced(),
                    // The server flushes the answer to a COPY only when it is told to.
                    b'c' | b'f' if attention.steps.is_some() => {
                        gather.insert().extend_from_slice(frontend::FLUSH);
                    }
                    _ => {}
                }
            }
        }
        Ok(at)
    }

    /// Whether the whole frame must lie here before it passes.
    fn understands(&self, header: Header) -> bool {
        match header.kind {
            // For DDL and settings, and because a Query drops the unnamed statement.
            b'Q' | b'P' => header.total <= UNDERSTOOD_MAX,
            b'B' | b'E' => {
                header.total <= UNDERSTOOD_MAX
                    && (self.statements.are_telling()
                        || self.shadow_wanted()
                        || self.acknowledges_both().is_some()
                        || self.rehearsal_wanted())
            }
            b'C' => self.statements.any() || self.has_suspended(),
            // Something is put behind them.
            b'c' | b'f' => self.attention.is_some(),
            _ => false,
        }
    }

    /// Whether a frame, of which `whole` is there, may go now. Frames that wait stay unread, so the
    /// client waits too.
    fn may_pass(&mut self, kind: u8, whole: Option<Frame<'_>>) -> Result<bool, End> {
        if kind == b'X' {
            self.terminated = true;
        }
        if let Some(attention) = &self.attention
            && attention.holds_client(&self.tracker)
        {
            // A COPY of a Query that is run in steps takes its data from the client.
            return Ok(self.tracker.copy_in() && matches!(kind, b'd' | b'c' | b'f'));
        }
        if !self.active {
            return if kind == b'X' { Ok(true) } else { self.begin(whole) };
        }
        // Pipelined transactions: during a hold, one that has not begun waits for the end of those
        // before it.
        if self.tracker.at_sync() && !self.tracker.answered() && (self.reading || self.registered.registry.held()) {
            return Ok(kind == b'X');
        }
        Ok(true)
    }

    fn understand(&mut self, kind: u8, body: &[u8]) -> Plan {
        match kind {
            b'Q' => match frontend::query_text(body) {
                Some(text) => {
                    self.note_write(Some(text));
                    self.plan_query(text)
                }
                None => Plan::Pass(Mark::None),
            },
            b'E' => {
                self.note_execute(body);
                self.plan_execute(body)
            }
            b'P' => {
                // Named ones are used for long: a later phase may want to know them.
                let (shadow, both) = (self.context.hooks.shadow.is_some(), self.acknowledges_both().is_some());
                let unnamed = shadow && self.control.phase.shadows() || both || self.rehearsal_wanted();
                self.statements.parsed(body, shadow || both, unnamed);
                self.note_statement(kind, body);
                Plan::Pass(Mark::None)
            }
            b'B' => {
                self.finish_portal(Bind::read(body).map(|bind| bind.portal));
                self.note_bind(body);
                Plan::Pass(Mark::None)
            }
            b'C' => {
                if let Some(Named::Portal(name)) = Named::read(body) {
                    self.finish_portal(Some(name));
                }
                self.statements.closed(body);
                self.note_statement(kind, body);
                Plan::Pass(Mark::None)
            }
            _ => Plan::Pass(Mark::None),
        }
    }

    fn mirrors_ddl(&self, sniff: Sniff) -> bool {
        sniff.ddl && self.context.hooks.ddl.is_some() && self.control.phase.mirrors()
    }

    fn plan_query(&mut self, text: &[u8]) -> Plan {
        let sniff = sniff(text);
        self.note_access(sniff);
        self.statements.queried(text, sniff);
        let rehearsed = self.note_rehearsal(text, None, sniff);
        if !self.mirrors_ddl(sniff) {
            return Plan::Pass(self.observe_query(text, sniff).or(rehearsed));
        }
        self.note_unknown();
        let script = self.context.hooks.statements.get_as(text, self.lex);
        let is = |wanted: DdlKind| move |class: &Class| matches!(class, Class::Ddl(ddl) if ddl.kind == wanted);
        if let Some(single) = script.single()
            && matches!(&single.class, Class::Ddl(ddl) if ddl.is_recorded_afterwards())
        {
            self.make_way(&single.class);
            let text = single.of(text).into();
            self.attention().outside = Some(Outside::after_query(text));
            return Plan::Pass(Mark::Withheld);
        }
        self.note_temporary(&script);
        let mut classes = script.statements.iter().map(|statement| &statement.class);
        if classes.clone().any(is(DdlKind::Outside)) {
            // Among other statements the server refuses it by itself.
            return Plan::Pass(Mark::None);
        }
        if classes.any(is(DdlKind::Transactional)) {
            let steps = Steps::new(text, script, self.reported.is_utf8());
            self.attention().steps = Some(Box::new(steps));
            return Plan::Steps;
        }
        Plan::Pass(self.observe_query(text, sniff).or(rehearsed))
    }

    /// For `writes.acknowledge: both`.
    fn note_execute(&mut self, body: &[u8]) {
        if self.acknowledges_both().is_some() {
            let portal = frontend::execute_portal(body).and_then(|name| self.statements.portal(name));
            let known = portal.map(|portal| portal.statement.clone());
            self.note_write(known.as_ref().map(|known| &*known.text));
        }
    }

    fn plan_execute(&mut self, body: &[u8]) -> Plan {
        let portal = frontend::execute_portal(body).and_then(|name| self.statements.portal(name));
        let Some(portal) = portal.cloned() else {
            self.note_unknown();
            return Plan::Pass(Mark::None);
        };
        let known = &portal.statement;
        self.note_access(known.sniff);
        let rehearsed = self.note_rehearsal(&known.text, Some(&portal), known.sniff);
        if self.mirrors_ddl(known.sniff) {
            self.note_unknown();
            let script = self.context.hooks.statements.get_as(&known.text, self.lex);
            self.note_temporary(&script);
            if let Some(statement) = script.single()
                && let Class::Ddl(ddl) = &statement.class
            {
                if ddl.kind == DdlKind::Transactional {
                    return Plan::HookBehind;
                }
                if ddl.is_recorded_afterwards() {
                    self.make_way(&statement.class);
                    let text = statement.of(&known.text).into();
                    self.attention().outside = Some(Outside::after_execute(text));
                    return Plan::Pass(Mark::Withheld);
                }
            }
        }
        let name = frontend::execute_portal(body).unwrap_or_default();
        Plan::Pass(self.observe_execute(&portal, name).or(rehearsed))
    }

    /// A database that the proxy itself is connected to could not be dropped.
    fn make_way(&self, class: &Class) {
        if let Class::Ddl(ddl) = class
            && ddl.tag == "DROP DATABASE"
            && let (Some(name), Some(connections)) = (&ddl.name, &self.context.hooks.connections)
        {
            connections.leave(&name.name);
        }
    }

    /// Puts the hook before an Execute that is about to pass.
    fn hook_before(&mut self, execute: &[u8], out: &mut Vec<u8>) {
        let Some(known) = self.executed(execute) else { return };
        let script = self.context.hooks.statements.get_as(&known.text, self.lex);
        let Some(statement) = script.single() else { return };
        self.attention();
        self.put_hook_before(&statement.class, out);
    }

    /// Puts the hook behind an Execute that has just passed.
    fn hook_behind(&mut self, execute: &[u8], out: &mut Vec<u8>) {
        let Some(known) = self.executed(execute) else { return };
        let script = self.context.hooks.statements.get_as(&known.text, self.lex);
        let Some(statement) = script.single() else { return };
        self.attention();
        self.put_hook(statement.of(&known.text), out);
    }

    /// The statement of the portal that an Execute names.
    fn executed(&self, execute: &[u8]) -> Option<Rc<Known>> {
        let portal = frontend::execute_portal(execute).and_then(|name| self.statements.portal(name));
        portal.map(|portal| portal.statement.clone())
    }

    /// From here on replies are looked at one by one.
    pub(super) fn attention(&mut self) -> &mut Attention {
        self.attention.get_or_insert_default()
    }
}
