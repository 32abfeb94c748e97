//! proxy.yaml, in two stages: as written ([`raw`], every key optional or checked by serde, with
//! file, line and key in the error) and as used ([`Config`], parsed types only).
//!
//! Each part of the proxy is handed the piece it needs and keeps no reference to the rest.

mod canary;
mod gates;
mod mismatch_log;
mod raw;
mod reads;
mod rehearse;
mod target;
mod transform;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use canary::{Budget, Canary};
pub use gates::{Capacity, Gates};
pub use mismatch_log::{LoggedValues, MismatchLog};
pub use raw::ConfigError;
pub use reads::{ColumnRule, How, Ignore, Reads, SampleKey, ShadowRule, Which};
pub use rehearse::Rehearse;
pub use target::{Secret, SslMode, Target};
pub use transform::{Missing, Name, Origin, Part, TableMap, Transform};

use crate::control::{Phase, Side};

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

/// The name of the entry that stands for every database not named.
pub const EVERY_OTHER_DATABASE: &str = "*";

/// One entry of `databases:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseConfig {
    pub legacy: Target,
    pub new: Target,
    /// How legacy's rows look on new.
    pub transform: Arc<Transform>,
}

impl DatabaseConfig {
    pub const fn target(&self, side: Side) -> &Target {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
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

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Writes {
    pub acknowledge: Acknowledge,
    /// How long a commit waits for the secondary, where both sides acknowledge it.
    pub both_timeout: Duration,
    pub when_late: WhenLate,
    /// How often a round is tried again after an error of the secondary that is neither clearly
    /// transient nor clearly permanent, before it is taken as permanent.
    pub retry_attempts: u32,
    /// Per cent of the transactions of `error_window`, above which mirroring stops rather than
    /// fill the quarantine; 100 never stops.
    pub error_threshold: f64,
    pub error_window: Duration,
}

impl Default for Writes {
    fn default() -> Self {
        Self {
            acknowledge: Acknowledge::Primary,
            both_timeout: Duration::from_secs(5),
            when_late: WhenLate::Degrade,
            retry_attempts: 5,
            error_threshold: 5.0,
            error_window: Duration::from_secs(300),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledge {
    Primary,
    Both,
}

/// What becomes of a commit that has waited for [`Writes::both_timeout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenLate {
    /// It is acknowledged by the primary, and so are others until the secondary has caught up.
    Degrade,
    /// The client gets an error that says that the primary has committed.
    Error,
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

/// How existing rows are copied; all of it can be changed while they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backfill {
    /// Ranges that are copied at once, each over a connection to either side.
    pub workers: usize,
    pub max_rate: Option<MaxRate>,
    /// How long mirroring may stand still for one round of copying: ranges are sized by it.
    pub hold_max: Duration,
    /// Copying pauses while the secondary is further behind than this.
    pub max_lag: Duration,
    /// Copying slows down while the primary takes longer than this to answer a small query.
    pub max_primary_latency: Duration,
    /// Per cent of a table's rows that the secondary may refuse (ten are always set aside)
    /// before the backfill stops.
    pub error_threshold: f64,
    /// How often a failure that may pass (a lost connection) is tried again before it stops.
    pub retry_attempts: u32,
}

impl Default for Backfill {
    fn default() -> Self {
        Self {
            workers: 2,
            max_rate: None,
            hold_max: Duration::from_millis(250),
            max_lag: Duration::from_secs(2),
            max_primary_latency: Duration::from_millis(100),
            error_threshold: 0.1,
            retry_attempts: 5,
        }
    }
}

/// At most so much is copied in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxRate {
    Rows(u64),
    /// As COPY writes them.
    Bytes(u64),
}

impl std::fmt::Display for MaxRate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows(rows) => write!(f, "{rows} rows/s"),
            Self::Bytes(bytes) => write!(f, "{bytes} B/s"),
        }
    }
}

/// Parses `50000` or `50000 rows/s`, and `20MiB/s`, `500 kB/s` or `1000 B/s`.
impl std::str::FromStr for MaxRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected rows or bytes a second, such as 50000, 50000rows/s or 20MiB/s".to_owned();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| expected())?;
        if number == 0 {
            return Err("a rate of 0 would never end; cancel the backfill instead".into());
        }
        let unit = unit.trim();
        let factor = match unit.strip_suffix("/s").unwrap_or(unit) {
            "" | "rows" => return Ok(Self::Rows(number)),
            "B" => 1,
            "kB" => 1000,
            "KiB" => 1 << 10,
            "MB" => 1_000_000,
            "MiB" => 1 << 20,
            "GB" => 1_000_000_000,
            "GiB" => 1 << 30,
            _ => return Err(expected()),
        };
        Ok(Self::Bytes(number.saturating_mul(factor)))
    }
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

#[cfg(test)]
mod tests {
    use super::MaxRate;

    #[test]
    fn rates() {
        for (text, rate) in [
            ("50000", Some(MaxRate::Rows(50_000))),
            ("7 rows/s", Some(MaxRate::Rows(7))),
            ("20MiB/s", Some(MaxRate::Bytes(20 << 20))),
            ("5 kB", Some(MaxRate::Bytes(5000))),
            ("0", None),
            ("fast", None),
            ("5 parsecs", None),
        ] {
            assert_eq!(text.parse().ok(), rate, "{text}");
        }
    }

    #[test]
    fn a_rate_is_read_as_it_is_written() {
        for rate in [MaxRate::Rows(3), MaxRate::Bytes(4096)] {
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
    }
}
