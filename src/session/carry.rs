//! Moving an idle session to the other side: its state is read from the server it is on, and
//! brought about on a connection to the other one. That is done before a switchover holds
//! anybody; what a session has run since is followed by one short question to its server
//! ([`super::footprint`]), and only where that finds a change is its state copied once more. The
//! move itself asks nobody: the two connections change places.
//!
//! Everything is asked by extended messages under names of our own: a simple Query would drop the
//! client's unnamed statement. What comes unasked meanwhile (notifications, notices) goes to the
//! client.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::footprint::{self, Digest, Footprint};
use super::registry::BackendKey;
use super::relay::{Direction, End, Session};
use super::reported::Reported;
use crate::control::Side;
use crate::sql::{Class, LexSettings};
use crate::upstream::{Backend, Stream};
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::frontend::{self, Parse};
use crate::wire::{backend, put_frame};

/// A server that answers these questions at all does so in milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// User-defined types have OIDs of their own on each server.
const FIRST_CUSTOM_OID: u32 = 16_384;
const CARRY_NAME: &[u8] = b"pgtandem_carry";

/// A connection to the other side, opened beforehand; or the one that was left behind.
pub(super) struct Standby {
    pub side: Side,
    pub stream: Stream,
    pub pid: i32,
    pub key: Box<[u8]>,
    reported: Reported,
    pub pending: Vec<u8>,
    copied: Option<Copied>,
    /// Holds state that a new copy has to clear first.
    used: bool,
}

impl Standby {
    pub(super) fn new(side: Side, backend: Backend) -> Self {
        let reported = Reported::new(backend.parameters());
        Self {
            side,
            pid: backend.pid,
            key: backend.key,
            reported,
            stream: backend.stream,
            pending: backend.leftover,
            copied: None,
            used: false,
        }
    }

    /// Whether the server has not closed it meanwhile. What it said unasked is forgotten.
    pub(super) async fn is_alive(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let read = poll_fn(|cx| Poll::Ready(self.stream.poll_read(cx, &mut buffer))).await;
        match read {
            Poll::Pending => {}
            Poll::Ready(Ok(read)) if read > 0 => self.pending.extend_from_slice(&buffer[..read]),
            Poll::Ready(_) => return false,
        }
        let mut passed = 0;
        while let Ok(Some(header)) = Header::backend(&self.pending[passed..])
            && self.pending.len() >= passed + header.total
        {
            if header.kind == b'E' {
                return false;
            }
            passed += header.total;
        }
        self.pending.drain(..passed);
        true
    }

    /// Has the server answer frames with so many ReadyForQuery at their end.
    pub(super) async fn ask(&mut self, frames: &[u8], ready: usize) -> Result<Asked, String> {
        ask(self.wire(), frames, ready, &mut Vec::new()).await
    }

    pub(super) async fn close(mut self) {
        let goodbye = async {
            self.stream.write_all(frontend::TERMINATE).await?;
            self.stream.shutdown().await
        };
        // It is being dropped either way.
        tokio::time::timeout(Duration::from_secs(1), goodbye).await.ok();
    }
}

/// What a session has made of its server connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    settings: Vec<(Vec<u8>, Vec<u8>)>,
    session_user: Vec<u8>,
    role: Vec<u8>,
    prepared: Vec<Prepared>,
    listens: Vec<Vec<u8>>,
    /// Names of all settings that it may change, with commas.
    settable: Vec<u8>,
    footprint: Option<Digest>,
}

#[derive(Debug, PartialEq, Eq)]
struct Prepared {
    name: Vec<u8>,
    text: Vec<u8>,
    from_sql: bool,
    /// OID on the old side, and name.
    types: Vec<(u32, Vec<u8>)>,
}

/// As of when a session's state lies on its standby.
struct Copied {
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

    /// Moves to the primary, which is on the other side.
    ///
    /// # Errors
    /// The session cannot move: its statements must not reach the side that is not the primary.
    pub(super) fn move_to_primary(&mut self) -> Result<(), End> {
        if self.is_ready(self.control.primary) {
            self.swap();
            return Ok(());
        }
        Err(End::Ordered(format!(
            "terminating connection: the primary is now {}, and this session could not be moved there",
            self.control.primary
        )))
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
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, async {
            let mut wire = Wire {
                stream: &mut self.server,
                pending: &mut self.down.pending,
                reported: &mut self.reported,
            };
            wire.send(&footprint::question()).await?;
            wire.answer(self.down.outbox.bytes()).await
        });
        match answered.await {
            // Its statement has gone with a DISCARD, say.
            Ok(Ok(answer)) => Ok(answer.error.is_none().then(|| footprint::digest(&answer.rows))),
            Ok(Err(Trouble::Refused(_))) => Ok(None),
            Ok(Err(Trouble::Gone(cause))) => Err(End::ServerGone(cause)),
            Err(_) => Err(End::ServerGone("no answer to a question about the session".into())),
        }
    }

    /// Leaves nothing of ours on the client's server connection.
    pub(super) async fn forget_footprint(&mut self) -> Result<(), End> {
        if !std::mem::take(&mut self.footprinted) {
            return Ok(());
        }
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, async {
            let mut wire = Wire {
                stream: &mut self.server,
                pending: &mut self.down.pending,
                reported: &mut self.reported,
            };
            wire.send(&footprint::goodbye()).await?;
            wire.answer(self.down.outbox.bytes()).await
        });
        match answered.await {
            Ok(Err(Trouble::Gone(cause))) => Err(End::ServerGone(cause)),
            Ok(_) => Ok(()),
            Err(_) => Err(End::ServerGone("no answer to a question about the session".into())),
        }
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
        let inspected = tokio::time::timeout(ANSWER_TIMEOUT, self.inspect()).await;
        let state = match inspected {
            Ok(Ok(state)) => state,
            Ok(Err(Trouble::Gone(cause))) => return Err(End::ServerGone(cause)),
            Ok(Err(Trouble::Refused(reason))) => return Ok(Err(reason)),
            Err(_) => return Err(End::ServerGone("no answer to a question about the session".into())),
        };
        let unnamed = self.statements.unnamed();
        let Some(standby) = &mut self.standby else {
            return Ok(Err("no connection to the other side".into()));
        };
        let replayed = tokio::time::timeout(ANSWER_TIMEOUT, standby.replay(&state, unnamed, &self.login.user));
        let result = match replayed.await {
            Ok(Ok(())) => {
                let footprint = state.footprint.map(|digest| Footprint::new(digest, &self.statements));
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

    /// Has the server that is in use answer frames with so many ReadyForQuery at their end.
    pub(super) async fn ask_server(&mut self, frames: &[u8], ready: usize) -> Result<Asked, String> {
        let (mut unheard, mut aside) = (Vec::new(), self.reported.clone());
        let secondary = self.on_secondary();
        let wire = Wire {
            stream: &mut self.server,
            pending: &mut self.down.pending,
            reported: if secondary { &mut aside } else { &mut self.reported },
        };
        let unasked = if secondary {
            &mut unheard
        } else {
            self.down.outbox.bytes()
        };
        ask(wire, frames, ready, unasked).await
    }

    pub(super) async fn inspect(&mut self) -> Result<State, Trouble> {
        let custom = format!("{{{}}}", self.statements.custom().join(","));
        let mut state = State::read(self.ask(INSPECT, &[Some(custom.as_bytes())]).await?)?;
        // One more round trip now, for a short one when clients wait.
        let introduction = footprint::introduction(&state.settable, self.statements.custom());
        let answer = self.exchange(&introduction).await?;
        if answer.error.is_none() {
            self.footprinted = true;
            state.footprint = Some(footprint::digest(&answer.rows));
        }
        Ok(state)
    }

    /// What keeps the session where it is, as it stands now.
    pub(super) async fn uncarriable(&mut self) -> Result<Option<String>, End> {
        match tokio::time::timeout(ANSWER_TIMEOUT, self.ask(UNCARRIABLE, &[])).await {
            Ok(Ok(rows)) => {
                let reasons = rows.iter().filter_map(|row| row.get(1));
                let reasons: Vec<_> = reasons.map(|reason| String::from_utf8_lossy(reason)).collect();
                Ok((!reasons.is_empty()).then(|| reasons.join("; ")))
            }
            Ok(Err(Trouble::Refused(reason))) => Ok(Some(reason)),
            Ok(Err(Trouble::Gone(cause))) => Err(End::ServerGone(cause)),
            Err(_) => Err(End::ServerGone("no answer to a question about the session".into())),
        }
    }

    /// Asks the server that the session is on, over its own connection.
    async fn ask(&mut self, question: &str, parameters: &[Option<&[u8]>]) -> Result<Vec<Vec<Vec<u8>>>, Trouble> {
        let mut out = Vec::new();
        frontend::put_parse(&mut out, CARRY_NAME, question.as_bytes(), &[]);
        frontend::put_bind(&mut out, CARRY_NAME, CARRY_NAME, parameters);
        frontend::put_execute(&mut out, CARRY_NAME);
        frontend::put_close_portal(&mut out, CARRY_NAME);
        frontend::put_close_statement(&mut out, CARRY_NAME);
        out.extend_from_slice(frontend::SYNC);
        let answer = self.exchange(&out).await?;
        match answer.error {
            Some(error) => Err(Trouble::Refused(format!("read the session's state: {error}"))),
            None => Ok(answer.rows),
        }
    }

    async fn exchange(&mut self, bytes: &[u8]) -> Result<Answer, Trouble> {
        let mut wire = Wire {
            stream: &mut self.server,
            pending: &mut self.down.pending,
            reported: &mut self.reported,
        };
        wire.send(bytes).await?;
        wire.answer(self.down.outbox.bytes()).await
    }
}

/// What a session has that no other connection can be given.
macro_rules! uncarriable {
    () => {
        "select 'uncarriable', 'it has temporary tables', null, null, null, null \
 where exists (select from pg_catalog.pg_class where relnamespace = pg_catalog.pg_my_temp_schema()) \
union all select 'uncarriable', 'it holds session advisory locks', null, null, null, null \
 where exists (select from pg_catalog.pg_locks where locktype = 'advisory' and pid = pg_catalog.pg_backend_pid()) \
union all select 'uncarriable', 'it has a cursor WITH HOLD: ' || name, null, null, null, null \
 from pg_catalog.pg_cursors where is_holdable"
    };
}

const UNCARRIABLE: &str = uncarriable!();

/// One row for each thing that a session can have, and the names of all settings that it may
/// change. `$1`: names of custom settings.
const INSPECT: &str = concat!(
    "\
select 'settable', pg_catalog.string_agg(name, ','), null, null, null, null from pg_catalog.pg_settings \
 where context in ('user', 'superuser') and name not in \
 ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable') \
union all \
select 'setting', name, setting, null, null, null from pg_catalog.pg_settings \
 where source = 'session' and name not in \
 ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'session_authorization', 'role') \
union all select 'setting', name, pg_catalog.current_setting(name, true), null, null, null \
 from pg_catalog.unnest($1::pg_catalog.text[]) name where pg_catalog.current_setting(name, true) is not null \
union all select 'user', session_user::pg_catalog.text, pg_catalog.current_setting('role'), null, null, null \
union all select 'prepared', name, statement, from_sql::pg_catalog.text, \
 pg_catalog.array_to_string(parameter_types::pg_catalog.oid[], ','), \
 pg_catalog.array_to_string(parameter_types::pg_catalog.text[], pg_catalog.chr(31)) \
 from pg_catalog.pg_prepared_statements where name not like 'pgtandem\\_%' \
union all select 'listen', channel, null, null, null, null from pg_catalog.pg_listening_channels() channel \
union all ",
    uncarriable!()
);

impl State {
    /// What is left is what a connection needs to read as the session does.
    pub(super) fn leave_statements(&mut self) {
        self.prepared.clear();
        self.listens.clear();
        self.footprint = None;
    }

    fn read(rows: Vec<Vec<Vec<u8>>>) -> Result<Self, Trouble> {
        let mut state = Self::default();
        for row in rows {
            let [kind, first, second, third, fourth, fifth]: [Vec<u8>; 6] = row
                .try_into()
                .map_err(|_| Trouble::Refused("unreadable answer about the session's state".into()))?;
            match &kind[..] {
                b"settable" => state.settable = first,
                b"setting" => state.settings.push((first, second)),
                b"user" => (state.session_user, state.role) = (first, second),
                b"prepared" => state.prepared.push(Prepared {
                    name: first,
                    text: second,
                    from_sql: third == b"true" || third == b"t",
                    types: pair_types(&fourth, &fifth),
                }),
                b"listen" => state.listens.push(first),
                b"uncarriable" => return Err(Trouble::Refused(String::from_utf8_lossy(&first).into_owned())),
                _ => {}
            }
        }
        // What follows may hold text in the session's encoding.
        state.settings.sort_by_key(|(name, _)| name != b"client_encoding");
        Ok(state)
    }
}

fn pair_types(oids: &[u8], names: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let oids = oids.split(|&byte| byte == b',').filter_map(|oid| {
        let text = std::str::from_utf8(oid).ok()?;
        text.parse().ok()
    });
    oids.zip(names.split(|&byte| byte == 31).map(<[u8]>::to_vec)).collect()
}

/// Why a question was not answered.
pub(super) enum Trouble {
    Gone(String),
    Refused(String),
}

/// What was learned by asking something whose answer is for nobody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// Some described column is of a user-defined type.
    pub custom_types: bool,
}

/// Whether a RowDescription tells of types that the other side calls otherwise.
pub(super) fn has_custom_types(description: &[u8]) -> bool {
    backend::column_types(description).any(|oid| oid >= FIRST_CUSTOM_OID)
}

async fn ask(mut wire: Wire<'_>, frames: &[u8], ready: usize, unasked: &mut Vec<u8>) -> Result<Asked, String> {
    let gone = |trouble| match trouble {
        Trouble::Gone(cause) | Trouble::Refused(cause) => cause,
    };
    wire.send(frames).await.map_err(gone)?;
    let mut asked = Asked { custom_types: false };
    for _ in 0..ready {
        // An error comes up again where it matters.
        asked.custom_types |= wire.answer(unasked).await.map_err(gone)?.custom_types;
    }
    Ok(asked)
}

/// An answer up to its ReadyForQuery.
#[derive(Default)]
struct Answer {
    /// Nulls are empty.
    rows: Vec<Vec<Vec<u8>>>,
    error: Option<String>,
    custom_types: bool,
}

/// A connection that is asked something by the proxy.
struct Wire<'a> {
    stream: &'a mut Stream,
    pending: &'a mut Vec<u8>,
    reported: &'a mut Reported,
}

impl Wire<'_> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|error| Trouble::Gone(error.to_string()))
    }

    /// Reads one answer; what is for the client goes to `unasked`.
    async fn answer(&mut self, unasked: &mut Vec<u8>) -> Result<Answer, Trouble> {
        let mut answer = Answer::default();
        loop {
            let (kind, body) = self.frame().await?;
            match kind {
                b'D' => {
                    let row = backend::columns(&body).map(|column| column.unwrap_or_default().to_vec());
                    answer.rows.push(row.collect());
                }
                b'E' if backend::is_fatal(&body) => return Err(Trouble::Gone(backend::error_text(&body))),
                b'T' => answer.custom_types |= has_custom_types(&body),
                b'E' => answer.error = Some(backend::error_text(&body)),
                b'N' | b'A' => put_frame(unasked, kind, |out| out.extend_from_slice(&body)),
                b'S' => {
                    if let Some((name, value)) = backend::parameter(&body) {
                        self.reported.set(name, value);
                    }
                    put_frame(unasked, kind, |out| out.extend_from_slice(&body));
                }
                b'Z' => return Ok(answer),
                _ => {}
            }
        }
    }

    async fn frame(&mut self) -> Result<(u8, Vec<u8>), Trouble> {
        loop {
            let header = Header::backend(self.pending).map_err(|error| Trouble::Gone(error.to_string()))?;
            if let Some(header) = header
                && self.pending.len() >= header.total
            {
                let body = self.pending[HEADER_LEN..header.total].to_vec();
                self.pending.drain(..header.total);
                if self.pending.is_empty() {
                    *self.pending = Vec::new();
                }
                return Ok((header.kind, body));
            }
            let mut buffer = [0; 4096];
            match poll_fn(|cx| self.stream.poll_read(cx, &mut buffer)).await {
                Ok(0) => return Err(Trouble::Gone("the server closed the connection".into())),
                Ok(read) => self.pending.extend_from_slice(&buffer[..read]),
                Err(error) => return Err(Trouble::Gone(error.to_string())),
            }
        }
    }
}

impl Standby {
    /// Brings about `state`. Each item has its own Sync, so that an error names what it concerns.
    pub(super) async fn replay(
        &mut self,
        state: &State,
        unnamed: Option<Parse<'_>>,
        user: &str,
    ) -> Result<(), Trouble> {
        let lex = self.reported.lex();
        let mut items: Vec<(String, Vec<u8>)> = Vec::new();
        let name_of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if self.used {
            let mut out = Vec::new();
            frontend::put_query(&mut out, b"discard all");
            items.push(("clear the connection".into(), out));
        }
        self.used = true;
        let mut out = Vec::new();
        frontend::put_parse(
            &mut out,
            CARRY_NAME,
            b"select pg_catalog.set_config($1, $2, false)",
            &[0, 0, 0, 25, 0, 0, 0, 25],
        );
        out.extend_from_slice(frontend::SYNC);
        items.push(("set settings".into(), out));
        let set = |name: &[u8], value: &[u8]| {
            let mut out = Vec::new();
            frontend::put_bind(&mut out, b"", CARRY_NAME, &[Some(name), Some(value)]);
            frontend::put_execute(&mut out, b"");
            out.extend_from_slice(frontend::SYNC);
            (format!("setting \"{}\"", name_of(name)), out)
        };
        items.extend(state.settings.iter().map(|(name, value)| set(name, value)));
        if state.session_user != user.as_bytes() {
            items.push(set(b"session_authorization", &state.session_user));
        }
        if state.role != b"none" {
            items.push(set(b"role", &state.role));
        }
        self.run(items).await?;

        let types = self.map_types(&state.prepared).await?;
        let mut items: Vec<(String, Vec<u8>)> = Vec::new();
        for prepared in &state.prepared {
            let mut out = Vec::new();
            if prepared.from_sql {
                let Some(text) = prepare_statement(prepared, lex) else {
                    let name = name_of(&prepared.name);
                    return Err(Trouble::Refused(format!("prepared statement \"{name}\": unreadable")));
                };
                frontend::put_query(&mut out, text);
            } else {
                let oids: Vec<u8> = prepared
                    .types
                    .iter()
                    .flat_map(|(oid, name)| types_on_this_side(&types, *oid, name).to_be_bytes())
                    .collect();
                frontend::put_parse(&mut out, &prepared.name, &prepared.text, &oids);
                out.extend_from_slice(frontend::SYNC);
            }
            items.push((format!("prepared statement \"{}\"", name_of(&prepared.name)), out));
        }
        for channel in &state.listens {
            let mut out = Vec::new();
            frontend::put_query(&mut out, &[b"listen ", &quoted(channel)[..]].concat());
            items.push((format!("LISTEN on \"{}\"", name_of(channel)), out));
        }
        let mut out = Vec::new();
        frontend::put_close_statement(&mut out, CARRY_NAME);
        out.extend_from_slice(frontend::SYNC);
        items.push(("close".into(), out));
        self.run(items).await?;

        // Last, since a simple Query would drop it.
        self.prepare_unnamed(unnamed).await
    }

    /// It may be one that never worked: then the client finds no unnamed statement, as before.
    async fn prepare_unnamed(&mut self, unnamed: Option<Parse<'_>>) -> Result<(), Trouble> {
        let mut out = Vec::new();
        match unnamed {
            Some(parse) => {
                let mut oids = parse.types.to_vec();
                for oid in oids.chunks_exact_mut(4) {
                    // The type's OID here is not known: the server infers it again.
                    if u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]) >= FIRST_CUSTOM_OID {
                        oid.fill(0);
                    }
                }
                frontend::put_parse(&mut out, b"", parse.text, &oids);
            }
            None => frontend::put_close_statement(&mut out, b""),
        }
        out.extend_from_slice(frontend::SYNC);
        let mut wire = self.wire();
        wire.send(&out).await?;
        wire.answer(&mut Vec::new()).await?;
        Ok(())
    }

    /// The OIDs that user-defined parameter types have here, by name.
    async fn map_types(&mut self, prepared: &[Prepared]) -> Result<Vec<(Vec<u8>, u32)>, Trouble> {
        let mut mapped: Vec<(Vec<u8>, u32)> = Vec::new();
        for (oid, name) in prepared.iter().flat_map(|prepared| &prepared.types) {
            if *oid < FIRST_CUSTOM_OID || mapped.iter().any(|(known, _)| known == name) {
                continue;
            }
            let mut out = Vec::new();
            let question = b"select pg_catalog.to_regtype($1)::pg_catalog.oid";
            frontend::put_parse(&mut out, b"", question, &[0, 0, 0, 25]);
            frontend::put_bind(&mut out, b"", b"", &[Some(name)]);
            frontend::put_execute(&mut out, b"");
            out.extend_from_slice(frontend::SYNC);
            let mut wire = self.wire();
            wire.send(&out).await?;
            let answer = wire.answer(&mut Vec::new()).await?;
            let found = answer
                .rows
                .first()
                .and_then(|row| std::str::from_utf8(row.first()?).ok()?.parse().ok());
            let Some(found) = found else {
                let name = String::from_utf8_lossy(name).into_owned();
                return Err(Trouble::Refused(format!("there is no type {name} on the other side")));
            };
            mapped.push((name.clone(), found));
        }
        Ok(mapped)
    }

    async fn run(&mut self, items: Vec<(String, Vec<u8>)>) -> Result<(), Trouble> {
        // All at once, one round trip; the server's answers are short, and a client that prepared
        // megabytes of statements is sent in pieces.
        for batch in items.chunks(64) {
            let mut wire = self.wire();
            let bytes: Vec<u8> = batch.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
            wire.send(&bytes).await?;
            for (what, _) in batch {
                // A notice about a setting was told to the client when it was set.
                let answer = wire.answer(&mut Vec::new()).await?;
                if let Some(error) = answer.error {
                    return Err(Trouble::Refused(format!("{what}: {error}")));
                }
            }
        }
        Ok(())
    }

    const fn wire(&mut self) -> Wire<'_> {
        Wire {
            stream: &mut self.stream,
            pending: &mut self.pending,
            reported: &mut self.reported,
        }
    }
}

fn types_on_this_side(mapped: &[(Vec<u8>, u32)], oid: u32, name: &[u8]) -> u32 {
    mapped
        .iter()
        .find(|(known, _)| oid >= FIRST_CUSTOM_OID && known == name)
        .map_or(oid, |(_, here)| *here)
}

/// The PREPARE itself: the server remembers the whole Query that it came in, other statements
/// included, and those must not run again.
fn prepare_statement(prepared: &Prepared, lex: LexSettings) -> Option<&[u8]> {
    let name = String::from_utf8_lossy(&prepared.name);
    let script = crate::sql::analyze_as(&prepared.text, lex);
    let statement = script
        .statements
        .iter()
        .rfind(|statement| matches!(&statement.class, Class::Prepare(prepares) if prepares.name == name))?;
    Some(&prepared.text[statement.span.clone()])
}

/// A name as an identifier.
fn quoted(name: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for &byte in name {
        if byte == b'"' {
            out.push(byte);
        }
        out.push(byte);
    }
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_prepare_is_run_again() {
        let prepared = |text: &str| Prepared {
            name: b"p".to_vec(),
            text: text.as_bytes().to_vec(),
            from_sql: true,
            types: Vec::new(),
        };
        let check = |text: &str, expected: Option<&str>| {
            let prepared = prepared(text);
            let found = prepare_statement(&prepared, LexSettings::default());
            assert_eq!(found, expected.map(str::as_bytes), "{text}");
        };
        check("prepare p as select 1", Some("prepare p as select 1"));
        check(
            "drop table t; PREPARE p (int) as select $1; prepare q as select 2",
            Some("PREPARE p (int) as select $1"),
        );
        check("select 1", None);
    }

    #[test]
    fn types_keep_their_names() {
        assert_eq!(
            pair_types(b"23,16400", b"integer\x1fapp.\"My Type\""),
            [(23, b"integer".to_vec()), (16400, b"app.\"My Type\"".to_vec())]
        );
        assert_eq!(pair_types(b"", b""), []);
        assert_eq!(quoted(b"a\"b"), b"\"a\"\"b\"");
    }
}
