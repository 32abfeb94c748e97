//! A chained log: JSON lines, of which each carries the hash of the one before, in a file that is
//! rotated. The mismatch log is one.
//!
//! ```text
//! {"version":2,"seq":1,"time":…,"event":…,…,"prev":"0000…"}
//! {"version":2,"seq":2,"time":…,"event":…,…,"prev":<SHA-256 of line 1's bytes>}
//! ```
//! The hash is of the line's bytes as they stand in the file, without the newline: `sha256sum`
//! gives the same. The newest line's number and hash are the *head*. Beside the log stands
//! `<log>.head` with the head; it is also the lock of the one process that may write.
//!
//! What this proves: whoever knows a head (from a report that was kept elsewhere) can tell whether
//! any line up to it was changed, removed, inserted or put elsewhere. It does not stop somebody
//! who may write the files from writing a whole new chain; such a chain has another head, and with
//! a MAC key that this somebody does not know, it cannot be made to look right at all.

mod reader;
mod verify;
mod writer;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

pub use reader::{Follower, Line, Lines, files, lines};
pub use verify::{Broken, FileVerified, HeadFile, Incident, Kept, Verification, verify, verify_against};
pub use writer::{Chain, Fsync, MacKey, Options};

/// The schema of the lines; grows when a key changes its meaning. Version 1 was not chained.
pub const VERSION: u32 = 2;

/// What the first line has for a hash of the line before.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Events that the chain itself writes.
pub mod events {
    /// A writer opened the log.
    pub const OPENED: &str = "opened";
    /// The bytes of an unfinished line at the end, left by a writer that was killed, were set aside.
    pub const TORN: &str = "torn_line";
    /// `<log>.head` knows of lines that the log does not have.
    pub const LINES_MISSING: &str = "lines_missing";
    /// The end of the file could not be read as lines of a chain; the file was set aside whole.
    pub const SET_ASIDE: &str = "set_aside";
}

/// The end of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Of the newest line; 0 where there is none.
    pub seq: u64,
    /// SHA-256 of the newest line, in hex.
    pub hash: String,
}

impl Head {
    fn genesis() -> Self {
        Self {
            seq: 0,
            hash: GENESIS.into(),
        }
    }
}

/// What every line has beside its event's own keys.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Envelope {
    pub version: u32,
    pub seq: u64,
    /// RFC 3339, UTC.
    pub time: String,
    pub event: String,
    pub prev: String,
    #[serde(default)]
    pub mac: Option<String>,
}

/// SHA-256, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hash(bytes)
}

fn hash(line: &[u8]) -> String {
    hex(&Sha256::digest(line))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").ok();
        text
    })
}

fn beside(log: &Path, suffix: &str) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn head_path(log: &Path) -> PathBuf {
    beside(log, ".head")
}

/// The head as it was last written beside the log, whoever writes now. `None` where there is none.
pub fn read_head(log: &Path) -> std::io::Result<Option<Head>> {
    match std::fs::read(head_path(log)) {
        // Padded with blanks, which JSON allows. Empty: created and not yet written.
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The keys of an event as a map.
///
/// # Errors
/// It does not become a JSON object.
pub fn body(of: &impl Serialize) -> Result<Map<String, Value>, serde_json::Error> {
    match serde_json::to_value(of)? {
        Value::Object(map) => Ok(map),
        _ => Err(serde::ser::Error::custom("an event is an object")),
    }
}

fn now() -> String {
    time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}
