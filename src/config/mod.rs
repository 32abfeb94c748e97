//! proxy.yaml, in two stages: as written ([`raw`], every key optional or checked by serde, with
//! file, line and key in the error) and as used ([`Config`], parsed types only).
//!
//! Each part of the proxy is handed the piece it needs and keeps no reference to the rest.

mod backfill;
mod canary;
mod database;
mod error;
mod gates;
mod mismatch_log;
mod raw;
mod reads;
mod rehearse;
mod target;
mod transform;
mod value;
mod writes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use backfill::{Backfill, MaxRate};
pub use canary::{Budget, Canary};
pub use database::{DatabaseConfig, EVERY_OTHER_DATABASE};
pub use error::ConfigError;
pub use gates::{Capacity, Gates};
pub use mismatch_log::{LoggedValues, MismatchLog};
pub use reads::{ColumnRule, How, Ignore, Reads, SampleKey, ShadowRule, Which};
pub use rehearse::Rehearse;
pub use target::{Secret, SslMode, Target};
pub use transform::{Missing, Name, Origin, Part, TableMap, Transform};
pub use writes::{Acknowledge, WhenLate, Writes};

use crate::control::Phase;

/// The configuration as used.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file it was read from, for messages and reloads.
    pub path: PathBuf,
    pub listen: Vec<SocketAddr>,
    pub admin: Admin,
    pub phase: Phase,
    pub databases: BTreeMap<String, DatabaseConfig>,
    pub auth: Auth,
    pub tls: Option<ClientTls>,
    pub limits: Limits,
    pub writes: Writes,
    pub rehearse: Rehearse,
    pub journal: Journal,
    pub reads: Reads,
    pub mismatch_log: MismatchLog,
    pub switchover: Switchover,
    pub verify: Verify,
    pub stray_writers: StrayWriters,
    pub backfill: Backfill,
}

impl Config {
    /// Reads, substitutes `${NAME}`, parses and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        raw::load(path)
    }

    /// How a database's schema differs between the two sides.
    pub fn transform_of(&self, database: &str) -> Arc<Transform> {
        let named = self.databases.get(database);
        named.map(|entry| entry.transform.clone()).unwrap_or_default()
    }
}

/// Comparing all tables over and over while the proxy runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    pub continuous: bool,
    /// Rows per second on each side.
    pub rate: u64,
    /// Between the end of one pass and the beginning of the next.
    pub pause: Duration,
}

impl Default for Verify {
    fn default() -> Self {
        Self {
            continuous: false,
            rate: 20_000,
            pause: Duration::from_secs(60),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    pub address: SocketAddr,
    /// Asked for as `Authorization: Bearer …`; required where `address` is not loopback.
    pub token: Option<Secret>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    pub method: AuthMethod,
    /// Client roles that proxy.yaml knows; others are looked up on the primary.
    pub users: BTreeMap<String, Credential>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMethod {
    Scram,
    /// Accepted only when every listen address is loopback.
    Trust,
}

/// What proxy.yaml holds of a client role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    Password(Secret),
    /// `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`, as `pg_authid.rolpassword` has it.
    Verifier(Secret),
}

/// TLS towards clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Refuse clients that do not ask for TLS.
    pub required: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Client sessions at once, over all databases; one more gets 53300.
    pub max_connections: usize,
    /// From accept to the end of authentication.
    pub handshake_timeout: Duration,
    /// From connect to the end of the server's authentication.
    pub connect_timeout: Duration,
    /// Threads that relay sessions; 0 means half the cores.
    pub worker_threads: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Journal {
    /// Bytes of journal tables on the primary before `when_full` acts.
    pub max_bytes: u64,
    pub when_full: WhenFull,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    Block,
    StopMirroring,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Switchover {
    pub drain_timeout: Duration,
    pub stragglers: Stragglers,
    pub gates: Gates,
}

/// What becomes of sessions that are in a flip's way: with a transaction open beyond
/// `drain_timeout`, or with what cannot be carried over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stragglers {
    /// They are waited for; the flip is given up.
    Wait,
    /// They are ended, with 57P01.
    End,
}

/// What happens to a write on the side that is not the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StrayWriters {
    Refuse,
    Report,
}

/// Parses `500ms`, `5s`, `2min` or `1h`; the unit is always written.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let expected = || "expected a number and a unit, such as 500ms, 5s, 2min or 1h".to_owned();
    let number: u64 = number.parse().map_err(|_| expected())?;
    match unit.trim() {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "min" => Ok(Duration::from_secs(number.saturating_mul(60))),
        "h" => Ok(Duration::from_secs(number.saturating_mul(3600))),
        _ => Err(expected()),
    }
}
