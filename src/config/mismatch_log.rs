//! `mismatch_log:` of proxy.yaml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Secret;
use super::raw::beside;
use super::value::{Bytes, Seconds, Text};
use crate::chain::{Fsync, MacKey, Options};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MismatchLog {
    pub path: PathBuf,
    pub values: LoggedValues,
    /// By the name of a result's column.
    pub columns: BTreeMap<String, LoggedValues>,
    /// Of the keyed hashes; made where it is not there.
    pub key_file: PathBuf,
    /// Signs the lines.
    pub mac_key: Option<Secret>,
    pub max_bytes: u64,
    pub max_age: Duration,
    pub fsync: Fsync,
    /// Between two lines of statistics.
    pub statistics_every: Duration,
    /// How far back a proxy that starts goes on counting from those lines; zero: not at all.
    pub count_back: Duration,
}

impl MismatchLog {
    pub fn chain(&self) -> Options {
        Options {
            path: self.path.clone(),
            max_bytes: self.max_bytes,
            max_age: self.max_age,
            fsync: self.fsync,
            mac_key: self.signing_key(),
        }
    }

    pub fn signing_key(&self) -> Option<MacKey> {
        self.mac_key.as_ref().map(|key| MacKey::new(key.expose().as_bytes()))
    }
}

/// How values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedValues {
    Hashed,
    Plain,
    None,
}

/// A rotated file should be a file, and not a line.
const MIN_BYTES: u64 = 64 * 1024;
/// Shorter keys can be tried.
const MAC_KEY_MIN: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawMismatchLog {
    path: Text,
    values: LoggedValues,
    columns: BTreeMap<String, LoggedValues>,
    key_file: Option<Text>,
    mac_key: Option<Text>,
    max_size: Bytes,
    max_age: Seconds,
    fsync: Text,
    statistics_every: Seconds,
    count_back: Seconds,
}

impl Default for RawMismatchLog {
    fn default() -> Self {
        Self {
            path: Text("mismatches.jsonl".into()),
            values: LoggedValues::Hashed,
            columns: BTreeMap::new(),
            key_file: None,
            mac_key: None,
            max_size: Bytes(64 << 20),
            max_age: Seconds(Duration::from_secs(24 * 3600)),
            fsync: Text("1s".into()),
            statistics_every: Seconds(Duration::from_secs(300)),
            count_back: Seconds(Duration::from_secs(24 * 3600)),
        }
    }
}

impl RawMismatchLog {
    pub(super) fn check(self, config: &Path) -> Result<MismatchLog, String> {
        let path = beside(config, &self.path.0);
        let key_file = match &self.key_file {
            Some(file) => beside(config, &file.0),
            None => path.with_extension("key"),
        };
        if key_file == path {
            return Err("mismatch_log: key_file: is the log itself".into());
        }
        if self.max_size.0 < MIN_BYTES {
            return Err("mismatch_log: max_size: at least 64KiB".into());
        }
        if self.max_age.0.is_zero() || self.statistics_every.0.is_zero() {
            return Err("mismatch_log: max_age, statistics_every: more than 0s".into());
        }
        if self.mac_key.as_ref().is_some_and(|key| key.0.len() < MAC_KEY_MIN) {
            return Err(format!("mismatch_log: mac_key: at least {MAC_KEY_MIN} characters"));
        }
        Ok(MismatchLog {
            path,
            values: self.values,
            columns: self.columns,
            key_file,
            mac_key: self.mac_key.map(|key| Secret::new(key.0)),
            max_bytes: self.max_size.0,
            max_age: self.max_age.0,
            fsync: fsync(&self.fsync.0)?,
            statistics_every: self.statistics_every.0,
            count_back: self.count_back.0,
        })
    }
}

fn fsync(text: &str) -> Result<Fsync, String> {
    match text {
        "always" => Ok(Fsync::Always),
        "never" => Ok(Fsync::Never),
        interval => super::parse_duration(interval)
            .map(Fsync::Every)
            .map_err(|_| "mismatch_log: fsync: always, never, or how long a line may wait, such as 1s".into()),
    }
}
