//! A connection as the client's user on which reads are repeated, frame by frame.
//!
//! It cannot write: its transactions are read-only by default, set after the session's own
//! settings. Dropped after any failure; only an idle, healthy connection goes back to the pool.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::{Duration, Instant};
use xxhash_rust::xxh3::Xxh3;

use super::answer::{Answer, KEPT_BYTES_MAX};
use super::digest::{Digest, DigestBuilder, FIRST_CUSTOM_OID, described_columns};
use super::read::{BindValues, Call};
use super::stats::Timing;
use crate::config::Target;
use crate::upstream::{self, Login, LoginError, Stream};
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::startup::Parameters;
use crate::wire::{backend, frontend, put_frame};

/// Why a shadow could not be run. What the server answers to the read itself is no error.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("open a shadow connection: {0}")]
    Login(#[from] LoginError),
    #[error("shadow connection: {0}")]
    Broken(#[from] std::io::Error),
    #[error("shadow connection: {what}: {error}")]
    Refused { what: &'static str, error: String },
    #[error("no answer within the deadline")]
    Deadline,
}

pub(super) struct Connection {
    /// For a request to cancel what it runs.
    pub(super) pid: i32,
    pub(super) secret: Box<[u8]>,
    stream: Stream,
    /// Read from the stream; consumed up to `at`.
    buffer: Vec<u8>,
    at: usize,
    spent: bool,
}

/// Room for each read; an idle connection keeps no more.
const READ_BYTES: usize = 16 * 1024;

impl Connection {
    /// Logs in, brings the connection to the session's settings and makes it read-only.
    pub(super) async fn open(
        target: &Target,
        login: &Login,
        settings: &[Bytes],
        deadline: Duration,
    ) -> Result<Self, ConnectionError> {
        let name = (&b"application_name"[..], &b"pgtandem shadow"[..]);
        let own = login
            .parameters
            .iter()
            .filter(|(key, _)| *key != b"application_name")
            .chain(std::iter::once(name));
        let login = Login {
            parameters: Parameters::new(own),
            ..login.clone()
        };
        let backend = upstream::login(target, &login).await?;
        let mut connection = Self {
            pid: backend.pid,
            secret: backend.key,
            stream: backend.stream,
            buffer: backend.leftover,
            at: 0,
            spent: false,
        };
        for setting in settings {
            connection.command("apply the session's settings", setting).await?;
        }
        // Last, so that no setting of the session undoes it.
        let own = format!(
            "set default_transaction_read_only = on; set statement_timeout = {}; set lock_timeout = 0; \
             set idle_in_transaction_session_timeout = 0",
            deadline.as_millis()
        );
        connection.command("make it read-only", own.as_bytes()).await?;
        Ok(connection)
    }

    /// Runs the proxy's own words; an error of the server is an error here.
    pub(super) async fn command(&mut self, what: &'static str, text: &[u8]) -> Result<(), ConnectionError> {
        let mut frames = Vec::new();
        frontend::put_query(&mut frames, text);
        let mut refused = RefusalOnly::default();
        self.exchange(&frames, &mut refused).await?;
        match refused.0 {
            None => Ok(()),
            Some(error) => Err(ConnectionError::Refused { what, error }),
        }
    }

    /// Runs one statement, by Parse, Bind and Execute, so that it can be no more than one.
    pub(super) async fn perform(
        &mut self,
        text: &[u8],
        types: &[u8],
        bind: &[u8],
    ) -> Result<(Heard, Duration), ConnectionError> {
        let call = Call::Extended {
            parameter_types: Bytes::copy_from_slice(types),
            bind: Bytes::copy_from_slice(bind),
        };
        let begun = Instant::now();
        let mut heard = Heard::default();
        self.exchange(&request(text, &call, 0, true), &mut heard).await?;
        Ok((heard, begun.elapsed()))
    }

    /// The columns that a statement would give, as far as both servers tell them alike: no OIDs of the
    /// user's own types. Nothing is run. `None` where it cannot be told.
    pub(super) async fn describe(&mut self, text: &[u8], types: &[u8]) -> Result<Option<Columns>, ConnectionError> {
        let mut frames = Vec::new();
        frontend::put_parse(&mut frames, b"", text, types);
        frontend::put_describe_statement(&mut frames, b"");
        frames.extend_from_slice(frontend::SYNC);
        let mut heard = Heard::default();
        self.exchange(&frames, &mut heard).await?;
        Ok(heard.refused.is_none().then_some(heard.columns))
    }

    /// Repeats a read as the client asked it and digests the answer: of its first `rows`, or of all
    /// (0).
    pub(super) async fn digest(
        &mut self,
        text: &[u8],
        call: &Call,
        rows: u64,
    ) -> Result<(Digest, Timing), ConnectionError> {
        let mut builder = Timed::new(DigestBuilder::default());
        self.ask(text, call, rows, false, &mut builder).await?;
        let timing = builder.timing();
        Ok((builder.inner.finish(), timing))
    }

    /// Repeats a read with all results as text and gathers the answer.
    pub(super) async fn answer(&mut self, text: &[u8], call: &Call, rows: u64) -> Result<Answer, ConnectionError> {
        let mut gather = Gather::default();
        self.ask(text, call, rows, true, &mut gather).await?;
        Ok(gather.answer())
    }

    async fn ask(
        &mut self,
        text: &[u8],
        call: &Call,
        rows: u64,
        as_text: bool,
        seen: &mut impl Sees,
    ) -> Result<(), ConnectionError> {
        let Call::Prepared { name, prepare, execute } = call else {
            return self.exchange(&request(text, call, rows, as_text), seen).await;
        };
        let mut frames = Vec::new();
        frontend::put_query(&mut frames, prepare);
        let mut refused = RefusalOnly::default();
        self.exchange(&frames, &mut refused).await?;
        frames.clear();
        frontend::put_query(&mut frames, execute);
        self.exchange(&frames, seen).await?;
        // PREPARE is not undone with its transaction: what cannot be taken back ends the connection.
        let name = crate::sql::QualifiedName::new(None, name).quoted();
        let forgotten = self
            .command("forget the statement", format!("deallocate {name}").as_bytes())
            .await;
        self.spent |= forgotten.is_err();
        Ok(())
    }

    /// Of no use for another read.
    pub(super) const fn is_spent(&self) -> bool {
        self.spent
    }

    /// Sends frames and shows the answers to `seen`, up to the ReadyForQuery.
    ///
    /// Not cancel safe: a connection whose exchange was dropped is of no use.
    async fn exchange(&mut self, frames: &[u8], seen: &mut impl Sees) -> Result<(), ConnectionError> {
        self.stream.write_all(frames).await?;
        let malformed = |error| std::io::Error::other(format!("malformed frame: {error}"));
        loop {
            // A whole frame, or of a long one what is there.
            let Some(header) = Header::backend(&self.buffer[self.at..]).map_err(malformed)? else {
                self.fill().await?;
                continue;
            };
            seen.begin(header.kind);
            self.at += HEADER_LEN;
            let mut remaining = header.total - HEADER_LEN;
            while remaining > 0 {
                if self.at == self.buffer.len() {
                    self.fill().await?;
                }
                let there = &self.buffer[self.at..];
                let taken = remaining.min(there.len());
                seen.piece(&there[..taken]);
                self.at += taken;
                remaining -= taken;
            }
            seen.end();
            if header.kind == b'Z' {
                return Ok(());
            }
        }
    }

    async fn fill(&mut self) -> Result<(), ConnectionError> {
        self.buffer.drain(..self.at);
        self.at = 0;
        self.buffer.reserve(READ_BYTES);
        if self.stream.read_some(&mut self.buffer).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }
}

/// The frames that ask for a read.
fn request(text: &[u8], call: &Call, rows: u64, as_text: bool) -> Vec<u8> {
    let mut frames = Vec::new();
    match call {
        Call::Simple | Call::Prepared { .. } => frontend::put_query(&mut frames, text),
        Call::Extended { parameter_types, bind } => {
            frontend::put_parse(&mut frames, b"", text, parameter_types);
            put_frame(&mut frames, b'B', |out| {
                out.extend_from_slice(&[0, 0]);
                match BindValues::read(bind) {
                    Some(values) if as_text => {
                        out.extend_from_slice(values.without_results);
                        out.extend_from_slice(&[0, 0]);
                    }
                    _ => out.extend_from_slice(bind),
                }
            });
            frontend::put_describe_portal(&mut frames, b"");
            // More rows than fit are as good as all.
            let rows = u32::try_from(rows).ok().filter(|rows| *rows <= i32::MAX.unsigned_abs());
            frontend::put_execute_rows(&mut frames, b"", rows.unwrap_or(0));
            frames.extend_from_slice(frontend::SYNC);
        }
    }
    frames
}

/// Looks at frames while they pass, in pieces.
trait Sees {
    fn begin(&mut self, kind: u8);
    fn piece(&mut self, body: &[u8]);
    fn end(&mut self);
}

/// Takes the time of what it passes on.
struct Timed<T> {
    inner: T,
    begun: Instant,
    first_row: Option<Duration>,
}

impl<T> Timed<T> {
    fn new(inner: T) -> Self {
        Self {
            inner,
            begun: Instant::now(),
            first_row: None,
        }
    }

    fn timing(&self) -> Timing {
        Timing {
            first_row: self.first_row,
            total: self.begun.elapsed(),
        }
    }
}

impl<T: Sees> Sees for Timed<T> {
    fn begin(&mut self, kind: u8) {
        if matches!(kind, b'D' | b'd') && self.first_row.is_none() {
            self.first_row = Some(self.begun.elapsed());
        }
        self.inner.begin(kind);
    }
    fn piece(&mut self, body: &[u8]) {
        self.inner.piece(body);
    }
    fn end(&mut self) {
        self.inner.end();
    }
}

impl Sees for DigestBuilder {
    fn begin(&mut self, kind: u8) {
        Self::begin(self, kind);
    }
    fn piece(&mut self, body: &[u8]) {
        Self::piece(self, body);
    }
    fn end(&mut self) {
        Self::end(self);
    }
}

/// Gathers an [`Answer`]. Rows are hashed as they pass; of one frame no more is held than
/// would be kept.
#[derive(Default)]
struct Gather {
    answer: Answer,
    /// Of all but rows.
    others: DigestBuilder,
    kind: u8,
    body: Vec<u8>,
    hash: Option<Box<Xxh3>>,
    whole: bool,
}

impl Gather {
    fn answer(mut self) -> Answer {
        let others = self.others.finish();
        let rows = &mut self.answer.digest;
        rows.tag = others.tag;
        rows.sqlstate = others.sqlstate;
        rows.notices = others.notices;
        rows.suspended = others.suspended;
        rows.in_parts = others.in_parts;
        rows.partial = others.partial;
        self.answer
    }
}

impl Sees for Gather {
    fn begin(&mut self, kind: u8) {
        self.kind = kind;
        self.body.clear();
        self.whole = true;
        self.hash.get_or_insert_with(|| Box::new(Xxh3::new())).reset();
    }

    fn piece(&mut self, body: &[u8]) {
        if let Some(hash) = &mut self.hash {
            hash.update(body);
        }
        self.whole &= self.body.len() + body.len() <= KEPT_BYTES_MAX;
        if self.whole {
            self.body.extend_from_slice(body);
        }
    }

    fn end(&mut self) {
        match (self.kind, &self.hash) {
            (b'D' | b'd', Some(hash)) => {
                let body = self.whole.then_some(&self.body[..]);
                self.answer.add_row(hash.digest128(), body);
            }
            (b'T', _) => self.answer.columns = described_columns(&self.body),
            _ => self.others.frame(self.kind, &self.body),
        }
    }
}

/// What came of a statement, without its rows.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) tag: String,
    pub(super) refused: Option<Refused>,
    /// The first column of the last row.
    pub(super) value: Option<String>,
    /// Those of its rows.
    columns: Columns,
    kind: u8,
    body: Vec<u8>,
}

pub(super) struct Refused {
    pub(super) sqlstate: String,
    pub(super) text: String,
}

/// Names, and types of Postgres' own.
pub(super) type Columns = Vec<(String, Option<u32>)>;

fn columns(description: &[u8]) -> Columns {
    described_columns(description)
        .iter()
        .map(|column| {
            (
                lossy(&column.name),
                (column.type_oid < FIRST_CUSTOM_OID).then_some(column.type_oid),
            )
        })
        .collect()
}

/// Of a row no more is looked at.
const VALUE_BYTES_MAX: usize = 256;

impl Sees for Heard {
    fn begin(&mut self, kind: u8) {
        self.kind = kind;
        self.body.clear();
    }

    fn piece(&mut self, body: &[u8]) {
        let room = match self.kind {
            b'C' | b'E' | b'T' => body.len(),
            b'D' => VALUE_BYTES_MAX.saturating_sub(self.body.len()).min(body.len()),
            _ => 0,
        };
        self.body.extend_from_slice(&body[..room]);
    }

    fn end(&mut self) {
        match self.kind {
            b'C' => self.tag = backend::tag(&self.body),
            b'T' => self.columns = columns(&self.body),
            b'D' => self.value = backend::columns(&self.body).next().flatten().map(lossy),
            b'E' if self.refused.is_none() => {
                self.refused = Some(Refused {
                    sqlstate: backend::error_field(&self.body, b'C').map(lossy).unwrap_or_default(),
                    text: backend::error_text(&self.body),
                });
            }
            _ => {}
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[derive(Default)]
struct RefusalOnly(Option<String>, bool, Vec<u8>);

impl Sees for RefusalOnly {
    fn begin(&mut self, kind: u8) {
        self.1 = kind == b'E';
        self.2.clear();
    }

    fn piece(&mut self, body: &[u8]) {
        if self.1 {
            self.2.extend_from_slice(body);
        }
    }

    fn end(&mut self) {
        if self.1 {
            self.0 = Some(backend::error_text(&self.2));
        }
    }
}

/// What a connection must have been opened with to serve a read.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct PoolKey {
    pub(super) target: Target,
    pub(super) login: Arc<Login>,
    pub(super) settings: Arc<[Bytes]>,
}

/// Idle connections, the one used last first. Few: as many as shadows run at once, and those of
/// the users of the last minutes.
pub(super) struct Pool {
    idle: std::sync::Mutex<Vec<Idle>>,
}

struct Idle {
    key: PoolKey,
    connection: Connection,
    since: Instant,
}

/// Kept for the next read of the same user and settings.
const IDLE_MAX: usize = 16;
const IDLE_TIME_MAX: Duration = Duration::from_secs(60);

impl Pool {
    pub(super) const fn new() -> Self {
        Self {
            idle: std::sync::Mutex::new(Vec::new()),
        }
    }

    /// An idle connection or a new one.
    pub(super) async fn take(&self, key: &PoolKey, deadline: Duration) -> Result<Connection, ConnectionError> {
        if let Some(connection) = self.take_idle(key) {
            return Ok(connection);
        }
        let open = Connection::open(&key.target, &key.login, &key.settings, deadline);
        tokio::time::timeout(deadline, open)
            .await
            .unwrap_or(Err(ConnectionError::Deadline))
    }

    fn take_idle(&self, key: &PoolKey) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let at = idle.iter().position(|idle| idle.key == *key)?;
        Some(idle.remove(at).connection)
    }

    /// Gives a healthy connection back.
    pub(super) fn give(&self, key: PoolKey, connection: Connection) {
        if connection.is_spent() {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let since = Instant::now();
        idle.insert(0, Idle { key, connection, since });
        idle.truncate(IDLE_MAX);
    }

    /// Closes connections that nobody used for a while: they stand in the way of DROP DATABASE.
    pub(super) fn close_idle(&self) {
        let mut idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        idle.retain(|idle| idle.since.elapsed() < IDLE_TIME_MAX);
    }
}
