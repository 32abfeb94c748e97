//! The mismatch log: one JSON line for each confirmed mismatch, and for whatever else an auditor
//! must know, in a [chain](crate::chain). `docs/mismatch-log.md` has the schema.
//!
//! One thread owns the files; whoever found a mismatch hands it over and goes on. What cannot be
//! written is counted and alarmed, and reads go on; the next line that can be written says how
//! many were lost.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::compare::Kind;
use super::stats::Counters;
use super::values::ValueWriter;
use crate::chain::{self, Chain, Fsync, Head, Options};
use crate::control::{Epoch, Side};

/// Names of the events, beside [`chain::events`].
pub mod events {
    pub const MISMATCH: &str = "mismatch";
    /// A statement that takes clearly longer on new.
    pub const SLOWER: &str = "slower";
    pub const ACKNOWLEDGED: &str = "acknowledged";
    pub const STATISTICS: &str = "statistics";
    pub const PHASE: &str = "phase";
    pub const SWITCHOVER: &str = "switchover";
    pub const STRAYS_ACKNOWLEDGED: &str = "strays_acknowledged";
    pub const CANARY: &str = "canary";
    /// What share of the traffic is compared from now on.
    pub const SAMPLING: &str = "sampling";
    /// The proxy stopped in order; without it, it was killed.
    pub const CLOSED: &str = "closed";
}

/// A confirmed mismatch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The line's number and time, RFC 3339 in UTC; the log gives them.
    #[serde(default)]
    pub seq: u64,
    #[serde(default)]
    pub time: String,
    pub database: String,
    pub user: String,
    /// The statement with its constants removed: its id and its text.
    pub fingerprint: String,
    pub statement: String,
    /// The statement as it was, where values are written plainly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sql: Option<String>,
    /// Keyed hash of the text and its parameters: the same read has the same key.
    pub key: String,
    pub kind: Kind,
    /// Which database was the primary.
    pub primary: Side,
    pub rows: BothSides<u64>,
    /// Keyed hashes of the two whole answers: equal answers are recognisable.
    #[serde(default)]
    pub digest: BothSides<String>,
    /// SQLSTATEs, where a side failed.
    #[serde(default, skip_serializing_if = "BothSides::is_empty")]
    pub error: BothSides<Option<String>>,
    /// The answer's columns, and those in which the rows shown below differ.
    #[serde(default)]
    pub columns: Vec<String>,
    #[serde(default)]
    pub differing_columns: Vec<String>,
    /// Of the rows shown: the values of the columns in which they agree.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<Map<String, Value>>,
    /// The first differing rows, a list of values each.
    #[serde(default, skip_serializing_if = "BothSides::is_empty")]
    pub first_rows: BothSides<Vec<Vec<Option<String>>>>,
    /// Of the client's own read, and of its first repetition on the other side.
    pub latency_ms: BothSides<f64>,
    /// The secondary's answer is what the client got.
    #[serde(default, skip_serializing_if = "is_false")]
    pub canary: bool,
    /// The cut that both sides were asked at: a round of an epoch.
    pub epoch: Epoch,
    pub round: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde asks")]
const fn is_false(value: &bool) -> bool {
    !*value
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BothSides<T> {
    pub primary: T,
    pub secondary: T,
}

impl<T: Default + PartialEq> BothSides<T> {
    fn is_empty(&self) -> bool {
        self.primary == T::default() && self.secondary == T::default()
    }
}

/// Somebody looked at mismatches and says why they may stand: those of one fingerprint (and kind)
/// up to this line, or one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    #[serde(default)]
    pub seq: u64,
    #[serde(default)]
    pub time: String,
    pub by: String,
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// The number of one mismatch's line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
}

impl Acknowledgement {
    /// Whether it accepts what line `seq` tells of a fingerprint.
    pub fn covers(&self, seq: u64, fingerprint: &str, kind: Kind) -> bool {
        // That a statement may be slow says nothing of its answers, and the other way round: it is
        // accepted by its kind, or by its line.
        let meant = match self.kind {
            Some(wanted) => wanted == kind,
            None => kind != Kind::Slower || self.line.is_some(),
        };
        seq < self.seq
            && meant
            && self.line.is_none_or(|line| line == seq)
            && self.fingerprint.as_ref().is_none_or(|id| id == fingerprint)
            && (self.line.is_some() || self.fingerprint.is_some())
    }
}

/// What the status tells of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStatus {
    pub path: String,
    pub head: Head,
    /// The line that tells of this process's first opening; absent until there is one.
    #[serde(default)]
    pub opened: Option<u64>,
    /// Of the current file.
    pub bytes: u64,
    /// Why it cannot be written, while it cannot.
    pub failing: Option<String>,
    /// Lines that were lost since the proxy started.
    pub lost: u64,
}

impl From<PathBuf> for Options {
    /// As where proxy.yaml says nothing else.
    fn from(path: PathBuf) -> Self {
        Self {
            path,
            max_bytes: 64 << 20,
            max_age: Duration::from_secs(24 * 3600),
            fsync: Fsync::Every(Duration::from_secs(1)),
            mac_key: None,
        }
    }
}

/// Lines on their way to the file; one is a few kB. More than this many at once only come when
/// the disk hangs, and then memory must not fill up.
const QUEUE: usize = 1024;
/// Between two tries to open a log that cannot be written.
const AGAIN: Duration = Duration::from_secs(5);

enum Message {
    Mismatch(Box<Mismatch>, Arc<Counters>),
    Event(&'static str, Map<String, Value>, oneshot::Sender<Result<Head, String>>),
    Flushed(oneshot::Sender<()>),
}

/// Writes to the mismatch log; cheap to clone, shared by all databases.
#[derive(Clone)]
pub struct MismatchLog {
    queue: mpsc::Sender<Message>,
    status: Arc<Mutex<LogStatus>>,
    pub(super) values: ValueWriter,
}

impl MismatchLog {
    /// Starts the writer. It ends when the last clone of the log is gone.
    pub fn open(options: impl Into<Options>, values: ValueWriter) -> (Self, JoinHandle<()>) {
        let options = options.into();
        let (queue, messages) = mpsc::channel(QUEUE);
        let status = Arc::new(Mutex::new(LogStatus {
            path: options.path.display().to_string(),
            head: Head {
                seq: 0,
                hash: chain::GENESIS.into(),
            },
            opened: None,
            bytes: 0,
            failing: None,
            lost: 0,
        }));
        let writer = Writer {
            opened: json!({
                "pgtandem": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "started": super::now(),
                "values": values.mode(),
                "values_key": values.key_id(),
            }),
            options,
            chain: None,
            status: status.clone(),
            lost: 0,
        };
        let handle = Handle::current();
        let writing = tokio::task::spawn_blocking(move || writer.run(messages, &handle));
        (Self { queue, status, values }, writing)
    }

    /// How it writes values.
    pub const fn values(&self) -> &ValueWriter {
        &self.values
    }

    pub fn status(&self) -> LogStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn write(&self, mismatch: Mismatch, counters: &Arc<Counters>) {
        tracing::warn!(
            database = mismatch.database,
            fingerprint = mismatch.fingerprint,
            statement = mismatch.statement,
            kind = mismatch.kind.as_str(),
            canary = mismatch.canary,
            round = mismatch.round,
            "{}: mismatch",
            if mismatch.kind.is_write() {
                "rehearsed write"
            } else {
                "shadow read"
            }
        );
        let message = Message::Mismatch(Box::new(mismatch), counters.clone());
        if self.queue.try_send(message).is_err() {
            counters.count_log_lost();
            self.status.lock().unwrap_or_else(PoisonError::into_inner).lost += 1;
        }
    }

    /// Writes another event and returns the head with it.
    ///
    /// # Errors
    /// The log cannot be written now.
    pub async fn record(&self, event: &'static str, body: Map<String, Value>) -> Result<Head, String> {
        let (done, written) = oneshot::channel();
        let gone = || "the mismatch log's writer has ended".to_owned();
        self.queue
            .send(Message::Event(event, body, done))
            .await
            .map_err(|_| gone())?;
        written.await.map_err(|_| gone())?
    }

    /// Returns when everything handed over before has been written, or counted as lost.
    pub async fn flushed(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Message::Flushed(done)).await.is_ok() {
            flushed.await.ok();
        }
    }
}

struct Writer {
    options: Options,
    /// Keys of the line that tells of an opening.
    opened: Value,
    /// Absent while the log cannot be written.
    chain: Option<Chain>,
    status: Arc<Mutex<LogStatus>>,
    /// Since the log could last be written.
    lost: u64,
}

impl Writer {
    fn run(mut self, mut messages: mpsc::Receiver<Message>, runtime: &Handle) {
        self.try_open();
        loop {
            let due = match &self.chain {
                Some(chain) => chain.sync_due(),
                None => Some(Instant::now() + AGAIN),
            };
            let message = match due {
                Some(due) => runtime.block_on(timeout_at(due, messages.recv())),
                None => Ok(runtime.block_on(messages.recv())),
            };
            match message {
                Ok(Some(message)) => self.attend(message),
                Ok(None) => break,
                Err(_) => self.idle(),
            }
        }
    }

    fn attend(&mut self, message: Message) {
        match message {
            Message::Flushed(done) => {
                done.send(()).ok();
            }
            Message::Mismatch(mismatch, counters) => {
                if self.write(events::MISMATCH, chain::body(&mismatch)).is_err() {
                    counters.count_log_lost();
                    self.lost();
                }
            }
            Message::Event(event, body, done) => {
                let written = self.write(event, Ok(body));
                if written.is_err() {
                    self.lost();
                }
                done.send(written).ok();
            }
        }
    }

    /// Nothing to write: what waits for the disk goes there; what failed is tried again.
    fn idle(&mut self) {
        match &mut self.chain {
            None => {
                self.try_open();
            }
            Some(chain) => {
                if let Err(error) = chain.sync() {
                    self.failed(&error);
                }
            }
        }
    }

    fn write(&mut self, event: &str, body: serde_json::Result<Map<String, Value>>) -> Result<Head, String> {
        let body = body.map_err(|error| error.to_string())?;
        if self.chain.is_none() {
            self.try_open();
        }
        let Some(chain) = &mut self.chain else {
            let why = self
                .status
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .failing
                .clone();
            return Err(why.unwrap_or_default());
        };
        match chain.append(event, body) {
            Ok(head) => {
                let head = head.clone();
                self.written();
                Ok(head)
            }
            Err(error) => {
                self.failed(&error);
                Err(error.to_string())
            }
        }
    }

    fn try_open(&mut self) {
        let mut opened = match &self.opened {
            Value::Object(map) => map.clone(),
            _ => Map::new(),
        };
        if self.lost > 0 {
            opened.insert("lost_before".into(), self.lost.into());
        }
        match Chain::open(self.options.clone(), opened) {
            Ok(chain) => {
                let opened = chain.head().seq;
                self.told(|status| {
                    status.opened.get_or_insert(opened);
                });
                self.chain = Some(chain);
                self.lost = 0;
                self.written();
            }
            Err(error) => self.failed(&error),
        }
    }

    fn written(&self) {
        let Some(chain) = &self.chain else { return };
        let (head, bytes) = (chain.head().clone(), chain.bytes());
        self.told(|status| {
            status.head = head;
            status.bytes = bytes;
            status.failing = None;
        });
    }

    /// What is in the file is found out when it is opened again.
    fn failed(&mut self, error: &std::io::Error) {
        self.chain = None;
        let path = self.options.path.display();
        self.told(|status| {
            // Said once, not with every line.
            if status.failing.is_none() {
                tracing::error!(%path, %error, "cannot write the mismatch log");
            }
            status.failing = Some(error.to_string());
        });
    }

    fn lost(&mut self) {
        self.lost += 1;
        self.told(|status| status.lost += 1);
    }

    fn told(&self, change: impl FnOnce(&mut LogStatus)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
