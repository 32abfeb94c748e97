//! The mismatch log: one JSON line for each confirmed mismatch.
//!
//! One task owns the file; whoever found a mismatch hands it over and goes on. What cannot be
//! written is counted and logged, and reads go on. Values are written as a keyed hash (equal
//! values are recognisable, none can be found by trying, for the key is drawn at start and never
//! leaves the process unless the configuration gives one), plainly, or not at all.

use std::path::PathBuf;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::compare::Kind;
use super::stats::Counters;
use crate::config::LoggedValues;
use crate::control::Side;
use crate::wire::backend;

/// The schema of a line; grows when a key changes its meaning.
pub(super) const VERSION: u32 = 1;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mismatch {
    pub version: u32,
    /// RFC 3339, UTC.
    pub time: String,
    pub database: String,
    pub user: String,
    /// The statement with its constants removed: its id and its text.
    pub fingerprint: String,
    pub statement: String,
    /// Keyed hash of the text and its parameters: the same read has the same key.
    pub key: String,
    pub kind: Kind,
    /// Which database was the primary.
    pub primary: Side,
    pub rows: BothSides<u64>,
    /// SQLSTATEs, where a side failed.
    #[serde(default, skip_serializing_if = "BothSides::is_empty")]
    pub error: BothSides<Option<String>>,
    /// The first differing rows, a list of values each.
    #[serde(default, skip_serializing_if = "BothSides::is_empty")]
    pub first_rows: BothSides<Vec<Vec<Option<String>>>>,
    /// Of the client's own read, and of its first shadow.
    pub latency_ms: BothSides<f64>,
    /// The round whose cut both sides were asked at.
    pub round: u64,
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

/// How values are written.
#[derive(Clone)]
pub struct ValueWriter {
    values: LoggedValues,
    key: [u8; 32],
}

impl ValueWriter {
    /// With a key of its own.
    pub fn new(values: LoggedValues) -> Self {
        Self::with_key(values, rand::random())
    }

    /// With a given key, so that equal values are recognisable across restarts.
    pub const fn with_key(values: LoggedValues, key: [u8; 32]) -> Self {
        Self { values, key }
    }

    /// 64 bits of HMAC-SHA-256, in hex.
    pub(super) fn hash(&self, parts: &[&[u8]]) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else {
            return String::new();
        };
        for part in parts {
            mac.update(part);
        }
        let bytes = mac.finalize().into_bytes();
        bytes[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether values may be seen.
    pub fn shows_values(&self) -> bool {
        self.values == LoggedValues::Plain
    }

    /// A value from elsewhere, as this log would write it; `None` where it writes none.
    pub fn text(&self, value: &str) -> Option<String> {
        match self.values {
            LoggedValues::Plain => Some(value.to_owned()),
            LoggedValues::Hashed => Some(self.hash(&[value.as_bytes()])),
            LoggedValues::None => None,
        }
    }

    /// The values of DataRow bodies.
    pub(super) fn rows(&self, rows: &[Vec<u8>]) -> Vec<Vec<Option<String>>> {
        if self.values == LoggedValues::None {
            return Vec::new();
        }
        let value = |value: &[u8]| match self.values {
            LoggedValues::Plain => String::from_utf8_lossy(value).into_owned(),
            LoggedValues::Hashed | LoggedValues::None => self.hash(&[value]),
        };
        rows.iter()
            .map(|row| backend::columns(row).map(|column| column.map(value)).collect())
            .collect()
    }
}

/// Mismatches on their way to the file; a line is a few kB. More than this many at once only
/// come when the disk hangs, and then memory must not fill up.
const QUEUE: usize = 1024;

enum Message {
    Line(Box<Mismatch>, Arc<Counters>),
    Flushed(oneshot::Sender<()>),
}

/// Writes to the mismatch log; cheap to clone, shared by all databases.
#[derive(Clone)]
pub struct MismatchLog {
    queue: mpsc::Sender<Message>,
    pub(super) values: ValueWriter,
}

impl MismatchLog {
    /// Starts the writer. It ends when the last clone of the log is gone.
    pub fn open(path: PathBuf, values: ValueWriter) -> (Self, JoinHandle<()>) {
        let (queue, messages) = mpsc::channel(QUEUE);
        let writer = tokio::spawn(
            Writer {
                path,
                file: None,
                failing: false,
            }
            .run(messages),
        );
        (Self { queue, values }, writer)
    }

    /// How it writes values.
    pub const fn values(&self) -> &ValueWriter {
        &self.values
    }

    pub(super) fn write(&self, mismatch: Mismatch, counters: &Arc<Counters>) {
        let message = Message::Line(Box::new(mismatch), counters.clone());
        if self.queue.try_send(message).is_err() {
            counters.count_log_lost();
        }
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
    path: PathBuf,
    file: Option<File>,
    /// Said once, not with every line.
    failing: bool,
}

impl Writer {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while let Some(message) = messages.recv().await {
            match message {
                Message::Flushed(done) => {
                    done.send(()).ok();
                }
                Message::Line(mismatch, counters) => match self.write(&mismatch).await {
                    Ok(()) => self.failing = false,
                    Err(error) => {
                        counters.count_log_lost();
                        self.file = None;
                        if !self.failing {
                            tracing::error!(path = %self.path.display(), %error, "cannot write the mismatch log");
                        }
                        self.failing = true;
                    }
                },
            }
        }
    }

    async fn write(&mut self, mismatch: &Mismatch) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(mismatch)?;
        line.push(b'\n');
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().append(true).create(true).open(&self.path).await?;
                self.file.insert(file)
            }
        };
        // One write a line: a line is whole or, after a crash, the torn last one.
        file.write_all(&line).await?;
        file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_as_configured() {
        let row = b"\0\x02\0\0\0\x05alice\xff\xff\xff\xff".to_vec();
        let of = |values, key| ValueWriter::with_key(values, [key; 32]).rows(std::slice::from_ref(&row));
        assert_eq!(of(LoggedValues::Plain, 1), [[Some("alice".to_owned()), None]]);
        assert!(of(LoggedValues::None, 1).is_empty());
        let hashed = of(LoggedValues::Hashed, 1);
        assert_eq!(hashed[0][0].as_ref().map(String::len), Some(16));
        assert_eq!(hashed[0][1], None);
        assert_eq!(hashed, of(LoggedValues::Hashed, 1));
        assert_ne!(hashed, of(LoggedValues::Hashed, 2));
    }
}
