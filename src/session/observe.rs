//! Reads on their way, shown to the shadow: by simple queries, by Execute (whole or part by part),
//! by SQL-level cursors and EXECUTE, and by COPY TO.
//!
//! ```text
//! a read ── sampled? ── comparable? ──▶ Observation ── frames of the answer ──▶ complete
//!                                          ▲   │
//!                              next part ──┘   └── PortalSuspended, FETCH that did not reach the end:
//!                                                  laid aside until the portal or cursor is over
//! ```
//! One answer is observed at a time: of a pipeline's reads those that are sent behind it are passed
//! over, and counted as such.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::cursors::{Cursor, SqlStatements, State};
use super::hooks::{Asked, Call, Observer, Read};
use super::known::Portal;
use super::relay::Session;
use super::sniff::{Sniff, Word};
use crate::shadow::{BindValues, Outcome, Skipped, Timing};
use crate::sql::{
    Class, DdlKind, Declare, Discard, Execute, Fetch, FetchRows, LexSettings, NotComparable, ReadFacts, Reset, Script,
    single_read,
};
use crate::wire::backend::Status;
use crate::wire::tracker::Mark;

/// An answer that is shown to the shadow.
pub(super) struct Observation {
    observer: Box<dyn Observer>,
    /// Of the part that is passing.
    begun: Instant,
    /// Of the parts before it.
    spent: Duration,
    first_row: Option<Duration>,
    /// The frame that is passing is one of the answer's.
    in_frame: bool,
    /// Rows of the part that is passing.
    rows: u64,
    failed: bool,
    suspended: bool,
    source: Source,
}

/// Where the next part would come from.
enum Source {
    /// A query, or the portal of this name.
    Portal(Box<[u8]>),
    /// A cursor, of which so many rows are fetched now.
    Cursor(String, FetchRows),
}

impl Observation {
    fn new(observer: Box<dyn Observer>, source: Source) -> Self {
        Self {
            observer,
            begun: Instant::now(),
            spent: Duration::ZERO,
            first_row: None,
            in_frame: false,
            rows: 0,
            failed: false,
            suspended: false,
            source,
        }
    }

    /// The next part is asked for.
    fn resume(&mut self) {
        self.begun = Instant::now();
        self.rows = 0;
        self.suspended = false;
    }

    fn frame(&mut self, kind: u8, body: &[u8], whole: bool) {
        if matches!(kind, b'D' | b'd') {
            self.rows += 1;
            self.first_row.get_or_insert_with(|| self.spent + self.begun.elapsed());
        }
        self.failed |= kind == b'E';
        self.suspended = kind == b's';
        if whole {
            self.observer.frame(kind, body);
        } else {
            self.observer.begin(kind);
            self.observer.piece(body);
            self.in_frame = true;
        }
    }

    /// More of the frame that is passing.
    pub(super) fn piece(&mut self, bytes: &[u8], last: bool) {
        if self.in_frame {
            self.observer.piece(bytes);
            if last {
                self.observer.end();
                self.in_frame = false;
            }
        }
    }

    /// What has been fetched is not all there is.
    fn note_part(&mut self) {
        self.observer.begin(b's');
        self.observer.end();
    }

    /// Hands over what has been fetched.
    pub(super) fn complete(self) {
        self.observer.complete(Timing {
            first_row: self.first_row,
            total: self.spent,
        });
    }

    pub(super) fn give_up(self, why: Outcome) {
        self.observer.give_up(why);
    }

    /// The client gets another answer.
    pub(super) fn forget(self) {
        self.observer.forget();
    }
}

const PIPELINED: Outcome = Outcome::Skipped(Skipped::Pipelined);
const CURSOR_MOVEMENT: Outcome = Outcome::NotComparable(NotComparable::CursorMovement);
const UNKNOWN_STATEMENT: Outcome = Outcome::NotComparable(NotComparable::UnknownStatement);
/// Bind's body behind the names of a statement without parameters, up to the results' formats.
const NO_PARAMETERS: &[u8] = b"\0\0\0\0";
/// Results as text.
const TEXT_RESULTS: &[u8] = b"\0\0";

impl Session {
    /// Whether reads are shown to the shadow now.
    pub(super) fn shadow_wanted(&self) -> bool {
        self.control.phase.shadows() && self.context.hooks.shadow.as_ref().is_some_and(|shadow| shadow.wanted())
    }

    /// Takes note of a Bind: of which values are kept.
    pub(super) fn note_bind(&mut self, body: &[u8]) {
        let shadow = self.context.hooks.shadow.as_ref().filter(|_| self.shadow_wanted());
        let rehearsed = self.rehearsal_wanted();
        let all = shadow.is_some() || rehearsed || self.acknowledges_both().is_some();
        let canary = self.on_secondary();
        let (database, user, application) = (&self.pair.name, &self.login.user, &self.registered.shared.application);
        self.statements
            .bound(body, all, |known, values| match known.sniff.word {
                _ if rehearsed && (known.sniff.write || known.sniff.setting) => true,
                Word::Read | Word::Copy => shadow.is_some_and(|shadow| {
                    canary
                        || shadow.sampled(&Asked {
                            database,
                            user,
                            application,
                            text: &known.text,
                            values,
                        })
                }),
                // What they stand for decides.
                Word::Cursor | Word::Prepared => shadow.is_some(),
                Word::Other => false,
            });
    }

    /// Takes note of a Query that passes; marks it where its answer is observed.
    pub(super) fn observe_query(&mut self, text: &[u8], sniff: Sniff) -> Mark {
        if self.context.hooks.shadow.is_none() {
            return Mark::None;
        }
        if sniff.setting {
            self.note_setting(text);
        }
        // Behind other requests the answer's beginning could not be told.
        let alone = self.tracker.answered() && self.tracker.at_sync();
        self.observe(text, None, b"", sniff, alone)
    }

    pub(super) fn observe_execute(&mut self, portal: &Portal, name: &[u8]) -> Mark {
        if self.context.hooks.shadow.is_none() {
            return Mark::None;
        }
        let known = &portal.statement;
        if known.sniff.setting {
            self.note_setting(&known.text);
        }
        if let Some(attention) = &mut self.attention
            && let Some(mut observation) = attention.suspended.remove(name)
        {
            if attention.observation.is_some() {
                observation.give_up(PIPELINED);
                return Mark::None;
            }
            observation.resume();
            attention.observation = Some(observation);
            return Mark::Observed;
        }
        self.statements.observed(name);
        self.observe(&known.text, Some(portal), name, known.sniff, true)
    }

    fn observe(&mut self, text: &[u8], portal: Option<&Portal>, name: &[u8], sniff: Sniff, alone: bool) -> Mark {
        if sniff.word == Word::Prepared {
            self.note_prepared(text);
        }
        self.note_for_canary(sniff.setting);
        if !self.shadow_wanted() {
            return Mark::None;
        }
        let in_batch = std::mem::replace(&mut self.shadowing.executed, portal.is_some());
        let in_transaction = self.tracker.status() != Status::Idle || in_batch;
        let now = Now {
            portal,
            name,
            in_transaction,
            alone: alone
                && self
                    .attention
                    .as_ref()
                    .is_none_or(|attention| attention.observation.is_none()),
        };
        let mark = match sniff.word {
            Word::Read | Word::Copy => self.observe_read(text, now),
            Word::Cursor => self.observe_cursor(text, now),
            Word::Prepared => self.observe_prepared(text, now),
            Word::Other => Mark::None,
        };
        let matters = in_transaction || portal.is_some() || self.canary.is_some();
        if matters && !self.shadowing.wrote && !self.on_secondary() {
            self.shadowing.wrote = self.may_have_written(text, sniff);
        }
        mark
    }

    fn observe_read(&mut self, text: &[u8], now: Now<'_>) -> Mark {
        let values = now.portal.map_or(Some(&[][..]), |portal| portal.values.as_deref());
        let sampled = match now.portal {
            None => self.sampled(text, &[]),
            Some(_) => values.is_some(),
        };
        if !sampled {
            return Mark::None;
        }
        let source = || Source::Portal(now.name.into());
        let wrote = self.shadowing.wrote;
        // A text that comes once is not analysed here if others of its kind have been.
        if now.portal.is_none() && now.alone && self.lex == LexSettings::default() {
            let mark = self.show(text, None, Call::Simple, None, wrote, now, source());
            if mark == Mark::Observed {
                return mark;
            }
        }
        let script = self.context.hooks.statements.get_as(text, self.lex);
        let call = now.portal.map_or(Call::Simple, |portal| Call::Extended {
            types: &portal.statement.types,
            values: values.unwrap_or_default(),
        });
        self.show(text, Some(&script), call, None, wrote, now, source())
    }

    /// Shows a read of the sample; marks its request where the answer shall be observed.
    #[expect(clippy::too_many_arguments, reason = "what a read is made of")]
    fn show(
        &mut self,
        text: &[u8],
        script: Option<&Arc<Script>>,
        call: Call<'_>,
        arguments: Option<&ReadFacts>,
        after_write: bool,
        now: Now<'_>,
        source: Source,
    ) -> Mark {
        let Some(shadow) = &self.context.hooks.shadow else {
            return Mark::None;
        };
        if let Some(script) = script {
            let never = match single_read(script) {
                Ok(_) if now.alone => None,
                Ok(_) => Some(PIPELINED),
                Err(NotComparable::NotARead) => return Mark::None,
                Err(reason) => Some(Outcome::NotComparable(reason)),
            };
            if let Some(why) = never {
                shadow.passed_over(&self.pair.name, script, text, why);
                return Mark::None;
            }
        }
        let observer = shadow.observe(&Read {
            control: self.control,
            login: &self.login,
            database: &self.pair.name,
            text,
            script,
            call,
            arguments,
            temporary: &self.shadowing.temporary,
            in_transaction: now.in_transaction,
            after_write,
            settings: self.shadowing.settings.as_ref(),
            canary: self.on_secondary(),
        });
        let Some(observer) = observer else {
            return Mark::None;
        };
        let mut observation = Observation::new(observer, source);
        if matches!(observation.source, Source::Cursor(..)) {
            observation.note_part();
        }
        self.attention().observation = Some(observation);
        Mark::Observed
    }

    fn sampled(&self, text: &[u8], values: &[u8]) -> bool {
        // What the secondary answers is always compared.
        if self.on_secondary() {
            return true;
        }
        self.context.hooks.shadow.as_ref().is_some_and(|shadow| {
            shadow.sampled(&Asked {
                database: &self.pair.name,
                user: &self.login.user,
                application: &self.registered.shared.application,
                text,
                values,
            })
        })
    }

    fn pass_over(&self, script: &Script, text: &[u8], why: Outcome) {
        if let Some(shadow) = &self.context.hooks.shadow {
            shadow.passed_over(&self.pair.name, script, text, why);
        }
    }

    fn observe_cursor(&mut self, text: &[u8], now: Now<'_>) -> Mark {
        let script = self.context.hooks.statements.get_as(text, self.lex);
        match script.single().map(|statement| &statement.class) {
            Some(Class::Declare(declare)) => self.declare(declare, now.portal),
            Some(Class::Fetch(fetch)) => return self.fetch(fetch, &script, text, now),
            Some(Class::Close(name)) => self.shadowing.sql.close(name.as_deref()),
            _ => {}
        }
        Mark::None
    }

    fn declare(&mut self, declare: &Declare, portal: Option<&Portal>) {
        let values = portal.and_then(|portal| portal.values.as_deref()).unwrap_or_default();
        let script = self.context.hooks.statements.get_as(&declare.query, self.lex);
        let state = if single_read(&script) == Err(NotComparable::NotARead) || !self.sampled(&declare.query, values) {
            State::Over
        } else if declare.binary {
            self.pass_over(&script, &declare.query, CURSOR_MOVEMENT);
            State::Over
        } else {
            State::Declared
        };
        let values = BindValues::read(values).map_or(NO_PARAMETERS, |values| values.without_results);
        self.shadowing.sql.declare(
            &declare.name,
            Cursor {
                query: declare.query.clone(),
                script,
                types: portal.map_or(&[][..], |portal| &portal.statement.types).into(),
                values: values.into(),
                results: Box::default(),
                after_write: self.shadowing.wrote,
                state,
            },
        );
    }

    fn fetch(&mut self, fetch: &Fetch, script: &Script, text: &[u8], now: Now<'_>) -> Mark {
        let results = now
            .portal
            .and_then(|portal| portal.values.as_deref())
            .and_then(BindValues::read);
        let results = results.map_or(TEXT_RESULTS, |values| values.results);
        let Some(cursor) = self.shadowing.sql.cursor(&fetch.cursor) else {
            self.pass_over(script, text, UNKNOWN_STATEMENT);
            return Mark::None;
        };
        let Some(onward) = fetch.onward else {
            let state = std::mem::replace(&mut cursor.state, State::Over);
            let (script, query) = (cursor.script.clone(), cursor.query.clone());
            match state {
                State::Declared => self.pass_over(&script, &query, CURSOR_MOVEMENT),
                State::Fetched(observation) => observation.give_up(CURSOR_MOVEMENT),
                State::Over => {}
            }
            return Mark::None;
        };
        match std::mem::replace(&mut cursor.state, State::Over) {
            State::Over => Mark::None,
            State::Declared => {
                cursor.results = results.into();
                let bind = [&cursor.values, results].concat();
                let (query, script, types) = (cursor.query.clone(), cursor.script.clone(), cursor.types.clone());
                let call = Call::Extended {
                    types: &types,
                    values: &bind,
                };
                let after_write = cursor.after_write;
                let source = Source::Cursor(fetch.cursor.clone(), onward);
                self.show(&query, Some(&script), call, None, after_write, now, source)
            }
            State::Fetched(observation) if *cursor.results != *results => {
                observation.give_up(CURSOR_MOVEMENT);
                Mark::None
            }
            State::Fetched(observation) if !now.alone => {
                observation.give_up(PIPELINED);
                Mark::None
            }
            State::Fetched(mut observation) => {
                observation.resume();
                observation.source = Source::Cursor(fetch.cursor.clone(), onward);
                self.attention().observation = Some(*observation);
                Mark::Observed
            }
        }
    }

    fn observe_prepared(&mut self, text: &[u8], now: Now<'_>) -> Mark {
        let script = self.context.hooks.statements.get_as(text, self.lex);
        let Some(Class::Execute(execute)) = script.single().map(|statement| &statement.class) else {
            return Mark::None;
        };
        let results = now
            .portal
            .and_then(|portal| portal.values.as_deref())
            .and_then(BindValues::read);
        let as_text = results.is_none_or(|values| {
            values.results[2.min(values.results.len())..]
                .iter()
                .all(|&byte| byte == 0)
        });
        let Some(prepared) = self.shadowing.sql.prepared(&execute.name).filter(|_| as_text) else {
            self.pass_over(&script, text, UNKNOWN_STATEMENT);
            return Mark::None;
        };
        let inner = self.context.hooks.statements.get_as(&prepared.statement, self.lex);
        let (statement, prepare) = (prepared.statement.clone(), prepared.prepare.clone());
        let Execute { name, arguments } = execute;
        if single_read(&inner) == Err(NotComparable::NotARead) || !self.sampled(&statement, text) {
            return Mark::None;
        }
        let Some(arguments) = arguments else {
            self.pass_over(&inner, &statement, Outcome::NotComparable(NotComparable::NotUnderstood));
            return Mark::None;
        };
        let call = Call::Prepared {
            name,
            prepare: &prepare,
            execute: text,
        };
        let source = Source::Portal(now.name.into());
        self.show(
            &statement,
            Some(&inner),
            call,
            Some(arguments),
            self.shadowing.wrote,
            now,
            source,
        )
    }

    /// Remembers SQL's prepared statements, in every phase: they are used for long.
    fn note_prepared(&mut self, text: &[u8]) {
        let script = self.context.hooks.statements.get_as(text, self.lex);
        let Some(statement) = script.single() else { return };
        match &statement.class {
            Class::Prepare(prepare) => self.shadowing.sql.prepare(prepare, statement.of(text)),
            Class::Deallocate(name) => self.shadowing.sql.deallocate(name.as_deref()),
            Class::Discard(Discard::All) => self.shadowing.sql.deallocate(None),
            _ => {}
        }
    }

    /// Remembers the temporary relations that a text makes.
    pub(super) fn note_temporary(&mut self, script: &Script) {
        if self.context.hooks.shadow.is_none() {
            return;
        }
        for statement in &script.statements {
            if let Class::Ddl(ddl) = &statement.class
                && ddl.kind == DdlKind::Temporary
                && let Some(name) = &ddl.name
                && self.shadowing.temporary.len() < TEMPORARY_MAX
                && !self.shadowing.temporary.contains(&name.name)
            {
                self.shadowing.temporary.push(name.name.clone());
            }
        }
    }

    /// Whether a statement that passes may write rows, so that reads behind it in its transaction
    /// cannot be compared.
    fn may_have_written(&self, text: &[u8], sniff: Sniff) -> bool {
        let Some(shadow) = &self.context.hooks.shadow else {
            return sniff.write;
        };
        let may_write = |text: &[u8]| shadow.may_write(&self.pair.name, text);
        if sniff.setting && sniff.write {
            return true;
        }
        match sniff.word {
            Word::Read => sniff.write || may_write(text),
            Word::Copy => may_write(text),
            Word::Other => sniff.write,
            Word::Cursor | Word::Prepared => {
                let script = self.context.hooks.statements.get_as(text, self.lex);
                match script.single().map(|statement| &statement.class) {
                    Some(Class::Declare(declare)) => may_write(&declare.query),
                    Some(Class::Execute(execute)) => {
                        let prepared = self.shadowing.sql.prepared(&execute.name);
                        prepared.is_none_or(|prepared| may_write(&prepared.statement))
                    }
                    Some(
                        Class::Fetch(_)
                        | Class::Close(_)
                        | Class::Prepare(_)
                        | Class::Deallocate(_)
                        | Class::Discard(_)
                        | Class::Transaction(_),
                    ) => false,
                    _ => true,
                }
            }
        }
    }

    pub(super) fn observe_frame(&mut self, kind: u8, body: &[u8], whole: bool, terminal: bool) {
        let Some(attention) = &mut self.attention else { return };
        let Some(observation) = &mut attention.observation else {
            return;
        };
        if kind != b'Z' {
            observation.frame(kind, body, whole);
        }
        if !terminal {
            return;
        }
        let Some(mut observation) = attention.observation.take() else {
            return;
        };
        observation.spent += observation.begun.elapsed();
        match &observation.source {
            Source::Portal(name) if observation.suspended && attention.suspended.len() < SUSPENDED_MAX => {
                attention.suspended.insert(name.clone(), observation);
            }
            Source::Cursor(name, FetchRows::Count(wanted)) if observation.rows >= *wanted && !observation.failed => {
                let name = name.clone();
                observation.note_part();
                self.shadowing.sql.lay_aside(&name, observation);
            }
            Source::Portal(_) | Source::Cursor(..) => observation.complete(),
        }
    }

    /// A portal is closed, or made anew.
    pub(super) fn finish_portal(&mut self, name: Option<&[u8]>) {
        if let (Some(attention), Some(name)) = (&mut self.attention, name)
            && let Some(observation) = attention.suspended.remove(name)
        {
            observation.complete();
        }
    }

    pub(super) fn has_suspended(&self) -> bool {
        self.attention
            .as_ref()
            .is_some_and(|attention| !attention.suspended.is_empty())
    }

    /// Keeps the list of statements that bring another connection to this session's settings.
    fn note_setting(&mut self, text: &[u8]) {
        let script = self.context.hooks.statements.get_as(text, self.lex);
        let changes = crate::sql::setting_changes(text, &script);
        let in_transaction = self.tracker.status() != Status::Idle;
        let single = script.single().map(|statement| &statement.class);
        if let Some(Class::Discard(Discard::All | Discard::Temp)) = single {
            self.shadowing.temporary.clear();
        }
        match single {
            Some(Class::Reset(Reset::All) | Class::Discard(Discard::All)) if !in_transaction => {
                self.shadowing.setting = Some(Change::Reset);
            }
            Some(Class::Set(set)) if set.local => {}
            Some(Class::Set(_) | Class::Reset(_)) if !in_transaction => {
                self.shadowing.setting = Some(Change::Add(Bytes::copy_from_slice(text)));
            }
            Some(Class::Discard(_)) => {}
            _ if !changes.is_empty() && changes.iter().all(|change| change.local) => {}
            // In a transaction it may be undone; by a function, or among others, it is not known.
            Some(Class::Set(_) | Class::Reset(_)) => self.shadowing.settings = None,
            _ if changes.is_empty() && !text.to_ascii_lowercase().windows(10).any(|word| word == b"set_config") => {}
            _ => self.shadowing.settings = None,
        }
    }
}

/// Of one session; beyond them reads of such names are found out as transient.
const TEMPORARY_MAX: usize = 256;
/// Portals of one session that are observed part by part; others are taken as they are when they
/// are suspended.
const SUSPENDED_MAX: usize = 32;

/// How a read came.
#[derive(Clone, Copy)]
struct Now<'a> {
    portal: Option<&'a Portal>,
    /// The portal's name.
    name: &'a [u8],
    in_transaction: bool,
    /// No other answer is being observed, and this one's beginning can be told.
    alone: bool,
}

/// What shadow reads need to know of a session.
pub(super) struct Shadowing {
    /// `None`: not known in full.
    pub settings: Option<Arc<[Bytes]>>,
    /// What the statement that is running does to them if it succeeds.
    pub setting: Option<Change>,
    /// Something that may write ran in the open transaction.
    pub wrote: bool,
    /// A statement ran before in the same batch or transaction.
    pub executed: bool,
    /// Temporary relations that the session made; reads by these names stay on the primary.
    pub temporary: Vec<String>,
    pub sql: SqlStatements,
}

impl Default for Shadowing {
    fn default() -> Self {
        Self {
            settings: Some(Arc::new([])),
            setting: None,
            wrote: false,
            executed: false,
            temporary: Vec::new(),
            sql: SqlStatements::default(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Change {
    Add(Bytes),
    Reset,
}

/// SETs remembered of one session; more and its settings count as not known.
const SETTINGS_MAX: usize = 64;

impl Shadowing {
    /// The transaction is over.
    pub(super) fn transaction_over(&mut self) {
        self.wrote = false;
        self.executed = false;
        self.sql.transaction_over();
        match self.setting.take() {
            Some(Change::Reset) => self.settings = Some(Arc::new([])),
            Some(Change::Add(text)) => {
                self.settings = self.settings.take().and_then(|settings| {
                    let others = settings.iter().filter(|other| **other != text);
                    let list: Vec<Bytes> = others.cloned().chain([text.clone()]).collect();
                    (list.len() <= SETTINGS_MAX).then(|| list.into())
                });
            }
            None => {}
        }
    }

    /// The server gave an error: what was to be set is not.
    pub(super) fn failed(&mut self) {
        self.setting = None;
    }
}
