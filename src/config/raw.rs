//! proxy.yaml as written: one struct a section, unknown keys refused, `${NAME}` replaced inside
//! the values, and every value parsed where it stands, so that an error carries its line.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, de};

use super::gates::RawGates;
use super::mismatch_log::RawMismatchLog;
use super::reads::{RawReads, RawShadowRule};
use super::rehearse::RawRehearse;
use super::transform::RawTransform;
use super::{
    Acknowledge, Admin, Auth, AuthMethod, Backfill, ClientTls, Config, Credential, DatabaseConfig, Journal, Limits,
    MaxRate, Rehearse, Secret, Stragglers, StrayWriters, Switchover, Target, Verify, WhenFull, WhenLate, Writes,
};
use crate::control::{Phase, Side};

/// What is wrong with proxy.yaml: file, line and key where they are known, and what would be
/// right. Never a value, since a value may be a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{path}: cannot be read: {cause}")]
    Unreadable { path: String, cause: String },
    #[error("{path}:{line}:{column}: {key}{message}")]
    Invalid {
        path: String,
        line: u64,
        column: u64,
        /// `key: `, or empty where the line has none.
        key: String,
        message: String,
    },
    /// The parts contradict each other, so no single line is to blame.
    #[error("{path}: {message}")]
    Contradiction { path: String, message: String },
}

pub(super) fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
        path: path.display().to_string(),
        cause: error.to_string(),
    })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let raw: RawConfig =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| located(path, text, &error))?;
    raw.check(path).map_err(|message| ConfigError::Contradiction {
        path: path.display().to_string(),
        message,
    })
}

fn located(path: &Path, text: &str, error: &serde_saphyr::Error) -> ConfigError {
    let (line, column) = error
        .location()
        .map_or((1, 1), |location| (location.line(), location.column()));
    let key = usize::try_from(line)
        .ok()
        .and_then(|line| text.lines().nth(line.saturating_sub(1)))
        .and_then(|source| source.split_once(':'))
        .map(|(key, _)| key.trim().trim_start_matches("- ").to_owned())
        .filter(|key| key.chars().all(|c| c.is_alphanumeric() || "_*\"'".contains(c)))
        .map_or_else(String::new, |key| format!("{key}: "));
    // The library appends the position once more; ours stands in front.
    let message = error.without_snippet().to_string();
    let message = match message.rfind(" at line ") {
        Some(end) => message[..end].trim_end_matches([':', ',']).to_owned(),
        None => message,
    };
    ConfigError::Invalid {
        path: path.display().to_string(),
        line,
        column,
        key,
        message,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default = "default_listen")]
    listen: OneOrMany<Address>,
    #[serde(default = "default_admin")]
    admin: Address,
    #[serde(default)]
    admin_token: Option<Text>,
    phase: Phase,
    databases: BTreeMap<String, RawDatabase>,
    #[serde(default)]
    auth: RawAuth,
    #[serde(default)]
    tls: Option<RawTls>,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    writes: RawWrites,
    #[serde(default)]
    journal: RawJournal,
    #[serde(default)]
    reads: RawReads,
    #[serde(default)]
    mismatch_log: RawMismatchLog,
    #[serde(default)]
    switchover: RawSwitchover,
    #[serde(default)]
    verify: RawVerify,
    #[serde(default = "default_stray_writers")]
    stray_writers: RawStrayWriters,
    #[serde(default)]
    backfill: RawBackfill,
}

impl RawConfig {
    fn check(mut self, path: &Path) -> Result<Config, String> {
        let listen: Vec<SocketAddr> = self.listen.into_vec().into_iter().map(|address| address.0).collect();
        if listen.is_empty() {
            return Err("listen: names no address".into());
        }
        if self.databases.is_empty() {
            return Err("databases: names no database; an entry has two connection strings, legacy and new".into());
        }
        if self.auth.method == RawAuthMethod::Trust && !listen.iter().all(|address| address.ip().is_loopback()) {
            return Err("auth: method trust is accepted only when every listen address is loopback; use scram".into());
        }
        if !self.admin.0.ip().is_loopback() && self.admin_token.is_none() {
            return Err("admin: an address that is not loopback needs admin_token".into());
        }
        let mut databases = BTreeMap::new();
        for (name, urls) in self.databases {
            databases.insert(name.clone(), urls.check(&name)?);
        }
        Ok(Config {
            path: path.to_owned(),
            listen,
            admin: Admin {
                address: self.admin.0,
                token: self.admin_token.map(|token| Secret::new(token.0)),
            },
            phase: self.phase,
            databases,
            auth: self.auth.into(),
            tls: self.tls.map(|tls| tls.resolve(path)),
            limits: self.limits.into(),
            rehearse: self.writes.rehearse()?,
            writes: Writes {
                acknowledge: match self.writes.acknowledge {
                    RawAcknowledge::Primary => Acknowledge::Primary,
                    RawAcknowledge::Both => Acknowledge::Both,
                },
                both_timeout: self.writes.both_timeout.0,
                when_late: match self.writes.when_late {
                    RawWhenLate::Degrade => WhenLate::Degrade,
                    RawWhenLate::Error => WhenLate::Error,
                },
                retry_attempts: self.writes.retry_attempts,
                error_threshold: self.writes.error_threshold.0,
                error_window: self.writes.error_window.0,
            },
            journal: Journal {
                max_bytes: self.journal.max_bytes.0,
                when_full: match self.journal.when_full {
                    RawWhenFull::Block => WhenFull::Block,
                    RawWhenFull::StopMirroring => WhenFull::StopMirroring,
                },
            },
            reads: self.reads.check()?,
            mismatch_log: self.mismatch_log.check(path)?,
            switchover: Switchover {
                drain_timeout: self.switchover.drain_timeout.0,
                stragglers: match self.switchover.stragglers {
                    RawStragglers::Wait => Stragglers::Wait,
                    RawStragglers::End => Stragglers::End,
                },
                gates: self.switchover.gates.into(),
            },
            verify: Verify {
                continuous: self.verify.continuous,
                rate: self.verify.rate.get(),
                pause: self.verify.pause.0,
            },
            stray_writers: match self.stray_writers {
                RawStrayWriters::Refuse => StrayWriters::Refuse,
                RawStrayWriters::Report => StrayWriters::Report,
            },
            backfill: self.backfill.check()?,
        })
    }
}

/// A relative path stands beside proxy.yaml, not beside whoever started the proxy.
pub(super) fn beside(config: &Path, path: &str) -> PathBuf {
    config.parent().unwrap_or_else(|| Path::new("")).join(path)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDatabase {
    legacy: Url,
    new: Url,
    #[serde(default)]
    transform: RawTransform,
}

impl RawDatabase {
    fn check(self, name: &str) -> Result<DatabaseConfig, String> {
        let target = |side: Side, url: &Url| {
            let target = Target::parse(side, &url.0).map_err(|error| format!("databases: {name}: {side}: {error}"))?;
            match (name, &target.dbname) {
                (super::EVERY_OTHER_DATABASE, Some(_)) => Err(format!(
                    "databases: \"*\": {side}: names a database; the entry \"*\" stands for every other one, so its connection strings end after the port"
                )),
                (super::EVERY_OTHER_DATABASE, None) | (_, Some(_)) => Ok(target),
                (_, None) => Err(format!("databases: {name}: {side}: names no database (…:5432/NAME)")),
            }
        };
        let (legacy, new) = (target(Side::Legacy, &self.legacy)?, target(Side::New, &self.new)?);
        if (&legacy.host, legacy.port, legacy.dbname()) == (&new.host, new.port, new.dbname()) {
            return Err(format!("databases: {name}: legacy and new are the same database"));
        }
        let transform = self.transform.check();
        let transform = transform.map_err(|error| format!("databases: {name}: transform: {error}"))?;
        if name == super::EVERY_OTHER_DATABASE && !transform.is_empty() {
            return Err("databases: \"*\": transform: belongs to a database with a name".into());
        }
        Ok(DatabaseConfig {
            legacy,
            new,
            transform: Arc::new(transform),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAuth {
    #[serde(default)]
    method: RawAuthMethod,
    #[serde(default)]
    users: BTreeMap<String, Text>,
}

impl Default for RawAuth {
    fn default() -> Self {
        Self {
            method: RawAuthMethod::Scram,
            users: BTreeMap::new(),
        }
    }
}

impl From<RawAuth> for Auth {
    fn from(raw: RawAuth) -> Self {
        Self {
            method: match raw.method {
                RawAuthMethod::Scram => AuthMethod::Scram,
                RawAuthMethod::Trust => AuthMethod::Trust,
            },
            users: raw
                .users
                .into_iter()
                .map(|(user, Text(value))| {
                    let credential = if value.starts_with("SCRAM-SHA-256$") {
                        Credential::Verifier(Secret::new(value))
                    } else {
                        Credential::Password(Secret::new(value))
                    };
                    (user, credential)
                })
                .collect(),
        }
    }
}

#[derive(Deserialize, Default, PartialEq)]
#[serde(rename_all = "snake_case")]
enum RawAuthMethod {
    #[default]
    Scram,
    Trust,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    certificate: Text,
    key: Text,
    #[serde(default)]
    required: bool,
}

impl RawTls {
    fn resolve(self, config: &Path) -> ClientTls {
        ClientTls {
            certificate: beside(config, &self.certificate.0),
            key: beside(config, &self.key.0),
            required: self.required,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    max_connections: usize,
    handshake_timeout: Seconds,
    connect_timeout: Seconds,
    worker_threads: usize,
}

impl Default for RawLimits {
    fn default() -> Self {
        Self {
            max_connections: 1000,
            handshake_timeout: Seconds(Duration::from_secs(10)),
            connect_timeout: Seconds(Duration::from_secs(10)),
            worker_threads: 0,
        }
    }
}

impl From<RawLimits> for Limits {
    fn from(raw: RawLimits) -> Self {
        Self {
            max_connections: raw.max_connections,
            handshake_timeout: raw.handshake_timeout.0,
            connect_timeout: raw.connect_timeout.0,
            worker_threads: raw.worker_threads,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawWrites {
    acknowledge: RawAcknowledge,
    both_timeout: Seconds,
    when_late: RawWhenLate,
    retry_attempts: u32,
    error_threshold: Percent,
    error_window: Seconds,
    rehearse_percent: Percent,
    rehearse_key: Text,
    rehearse_rules: Vec<RawShadowRule>,
    rehearse_max_concurrency: usize,
    rehearse_queue: usize,
    rehearse_timeout: Seconds,
}

impl RawWrites {
    fn rehearse(&mut self) -> Result<Rehearse, String> {
        let raw = RawRehearse {
            percent: Percent(self.rehearse_percent.0),
            key: Text(std::mem::take(&mut self.rehearse_key.0)),
            rules: std::mem::take(&mut self.rehearse_rules),
            max_concurrency: self.rehearse_max_concurrency,
            queue: self.rehearse_queue,
            timeout: Seconds(self.rehearse_timeout.0),
        };
        raw.check()
    }
}

impl Default for RawWrites {
    fn default() -> Self {
        let usual = Writes::default();
        let rehearse = Rehearse::default();
        Self {
            acknowledge: RawAcknowledge::Primary,
            both_timeout: Seconds(usual.both_timeout),
            when_late: RawWhenLate::Degrade,
            retry_attempts: usual.retry_attempts,
            error_threshold: Percent(usual.error_threshold),
            error_window: Seconds(usual.error_window),
            rehearse_percent: Percent(rehearse.percent),
            rehearse_key: Text("statement".into()),
            rehearse_rules: Vec::new(),
            rehearse_max_concurrency: rehearse.max_concurrency,
            rehearse_queue: rehearse.queue,
            rehearse_timeout: Seconds(rehearse.timeout),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawWhenLate {
    Degrade,
    Error,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum RawAcknowledge {
    #[default]
    Primary,
    Both,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawBackfill {
    workers: usize,
    max_rate: Option<Text>,
    hold_max: Seconds,
    max_lag: Seconds,
    max_primary_latency: Seconds,
    error_threshold: Percent,
    retry_attempts: u32,
}

impl Default for RawBackfill {
    fn default() -> Self {
        let usual = Backfill::default();
        Self {
            workers: usual.workers,
            max_rate: None,
            hold_max: Seconds(usual.hold_max),
            max_lag: Seconds(usual.max_lag),
            max_primary_latency: Seconds(usual.max_primary_latency),
            error_threshold: Percent(usual.error_threshold),
            retry_attempts: usual.retry_attempts,
        }
    }
}

impl RawBackfill {
    fn check(self) -> Result<Backfill, String> {
        if self.workers == 0 {
            return Err("backfill: workers: at least 1".into());
        }
        let max_rate: Option<MaxRate> = match self.max_rate {
            Some(text) => Some(text.0.parse().map_err(|why| format!("backfill: max_rate: {why}"))?),
            None => None,
        };
        Ok(Backfill {
            workers: self.workers,
            max_rate,
            hold_max: self.hold_max.0,
            max_lag: self.max_lag.0,
            max_primary_latency: self.max_primary_latency.0,
            error_threshold: self.error_threshold.0,
            retry_attempts: self.retry_attempts,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawJournal {
    max_bytes: Bytes,
    when_full: RawWhenFull,
}

impl Default for RawJournal {
    fn default() -> Self {
        Self {
            max_bytes: Bytes(10 << 30),
            when_full: RawWhenFull::Block,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawWhenFull {
    Block,
    StopMirroring,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawSwitchover {
    drain_timeout: Seconds,
    stragglers: RawStragglers,
    gates: RawGates,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawStragglers {
    Wait,
    End,
}

impl Default for RawSwitchover {
    fn default() -> Self {
        Self {
            drain_timeout: Seconds(Duration::from_secs(5)),
            stragglers: RawStragglers::Wait,
            gates: RawGates::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawVerify {
    continuous: bool,
    rate: NonZeroU64,
    pause: Seconds,
}

impl Default for RawVerify {
    fn default() -> Self {
        let usual = Verify::default();
        Self {
            continuous: usual.continuous,
            rate: NonZeroU64::new(usual.rate).unwrap_or(NonZeroU64::MIN),
            pause: Seconds(usual.pause),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawStrayWriters {
    Refuse,
    Report,
}

fn default_listen() -> OneOrMany<Address> {
    OneOrMany::One(Address(SocketAddr::from(([127, 0, 0, 1], 6432))))
}

fn default_admin() -> Address {
    Address(SocketAddr::from(([127, 0, 0, 1], 6433)))
}

fn default_stray_writers() -> RawStrayWriters {
    RawStrayWriters::Refuse
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Text in which `${NAME}` has been replaced from the environment.
pub(super) struct Text(pub(super) String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = String::deserialize(deserializer)?;
        substitute(&written, |name| std::env::var(name).ok())
            .map(Self)
            .map_err(D::Error::custom)
    }
}

fn substitute(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let Some(length) = rest[start..].find('}') else {
            return Err("\"${\" is not closed by \"}\"".into());
        };
        let name = &rest[start + 2..start + length];
        let value = variable(name).ok_or_else(|| format!("the environment variable {name} is not set"))?;
        result.push_str(&rest[..start]);
        result.push_str(&value);
        rest = &rest[start + length + 1..];
    }
    result.push_str(rest);
    Ok(result)
}

/// A value written as text and parsed where it stands.
fn parsed<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    parse(&Text::deserialize(deserializer)?.0).map_err(D::Error::custom)
}

struct Address(SocketAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            let text = text.replacen("localhost:", "127.0.0.1:", 1);
            SocketAddr::from_str(&text)
                .map(Self)
                .map_err(|_| "expected an address and a port, such as 127.0.0.1:6432".into())
        })
    }
}

/// A connection string; which side it is for is known one level up.
struct Url(String);

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            Target::parse(Side::Legacy, text).map(|_| Self(text.to_owned()))
        })
    }
}

/// `500ms`, `5s`, `2min`, `1h`.
pub(super) struct Seconds(pub(super) Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| super::parse_duration(text).map(Self))
    }
}

/// `1024`, `64kB`, `16MiB`, `10GiB`; kB, MB and GB count in 1024s as Postgres' own settings do.
pub(super) struct Bytes(pub(super) u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            let (number, unit) = text.split_at(digits);
            let shift = match unit.trim() {
                "" | "B" => 0,
                "kB" | "KB" | "KiB" => 10,
                "MB" | "MiB" => 20,
                "GB" | "GiB" => 30,
                "TB" | "TiB" => 40,
                _ => return Err("expected a size such as 64MiB or 10GiB".into()),
            };
            let number: u64 = number.parse().map_err(|_| "expected a size such as 10GiB".to_owned())?;
            number
                .checked_mul(1 << shift)
                .map(Self)
                .ok_or_else(|| "is too large".into())
        })
    }
}

pub(super) struct Percent(pub(super) f64);

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        if (0.0..=100.0).contains(&value) {
            Ok(Self(value))
        } else {
            Err(D::Error::invalid_value(
                de::Unexpected::Float(value),
                &"a percentage from 0 to 100",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Fsync;
    use crate::config::{Capacity, Gates};

    const MINIMAL: &str = "
phase: dual_write
databases:
  shop:
    legacy: postgresql://pgtandem@legacy.internal:5432/shop
    new: postgresql://pgtandem@new.internal:5432/shop
";

    fn check(text: &str) -> Result<Config, String> {
        parse(Path::new("/etc/proxy.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_minimal_file_gets_the_documented_defaults() {
        let config = check(MINIMAL).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:6432".parse().unwrap()]);
        assert_eq!(config.admin.address, "127.0.0.1:6433".parse().unwrap());
        assert_eq!(config.phase, Phase::DualWrite);
        assert_eq!(config.journal.max_bytes, 10 << 30);
        assert_eq!(config.reads.shadow_percent, 10.0);
        assert_eq!(config.mismatch_log.path, Path::new("/etc/mismatches.jsonl"));
        assert_eq!(config.mismatch_log.key_file, Path::new("/etc/mismatches.key"));
        assert_eq!(config.mismatch_log.fsync, Fsync::Every(Duration::from_secs(1)));
        assert_eq!(config.switchover.drain_timeout, Duration::from_secs(5));
        assert_eq!(config.switchover.stragglers, Stragglers::Wait);
        assert_eq!(config.switchover.gates, Gates::default());
        assert_eq!(config.auth.method, AuthMethod::Scram);
        assert_eq!(config.writes, Writes::default());
        assert_eq!(config.verify, Verify::default());
    }

    #[test]
    fn thresholds_of_the_gates() {
        let gates = "{ lag: 500ms, verified_within: 24h, shadow_match_rate: 99.9, no_strays_for: 1h, \
                     spare_connections: 5, direct_sessions: 0, disk: { new: 200GiB } }";
        let config = check(&format!("{MINIMAL}switchover: {{ gates: {gates} }}\n")).unwrap();
        let expected = Gates {
            lag: Duration::from_millis(500),
            verified_within: Some(Duration::from_secs(86_400)),
            shadow_match_rate: Some(99.9),
            no_strays_for: Some(Duration::from_secs(3600)),
            spare_connections: 5,
            direct_sessions: Some(0),
            disk: Capacity {
                new: Some(200 << 30),
                ..Capacity::default()
            },
            ..Gates::default()
        };
        assert_eq!(config.switchover.gates, expected);
    }

    #[test]
    fn which_writes_are_rehearsed() {
        assert_eq!(check(MINIMAL).unwrap().rehearse, Rehearse::default());
        assert!(!Rehearse::default().any());
        let text = format!(
            "{MINIMAL}writes: {{ rehearse_percent: 5, rehearse_key: user, rehearse_rules: [{{ table: orders, percent: 100 }}], \
             rehearse_max_concurrency: 3, rehearse_queue: 7, rehearse_timeout: 2s }}\n"
        );
        let found = check(&text).unwrap().rehearse;
        assert!(found.any());
        assert_eq!((found.percent, found.rules.len()), (5.0, 1));
        assert_eq!((found.max_concurrency, found.queue), (3, 7));
        assert_eq!(found.timeout, Duration::from_secs(2));
        assert_eq!(found.rules[0].which.table.as_deref(), Some("orders"));
        assert_eq!(found.rules[0].key, found.key);
    }

    #[test]
    fn the_file_in_the_repository_is_right() {
        let text = include_str!("../../proxy.yaml").replace("${APP_PASSWORD}", "x");
        check(&text).unwrap();
    }

    #[test]
    fn errors_say_file_line_key_and_what_would_be_right() {
        for (text, says) in [
            (MINIMAL.replace("dual_write", "dual"), "/etc/proxy.yaml:2:8: phase: "),
            (MINIMAL.replace("dual_write", "dual"), "dual_read"),
            (format!("{MINIMAL}lissten: 1\n"), "/etc/proxy.yaml:7:1: lissten: "),
            (format!("{MINIMAL}lissten: 1\n"), "expected one of listen, admin"),
            (format!("{MINIMAL}listen: here\n"), ":7:9: listen: "),
            (format!("{MINIMAL}journal: {{ max_bytes: lots }}\n"), "10GiB"),
            (format!("{MINIMAL}reads: {{ shadow_percent: 101 }}\n"), "0 to 100"),
            (format!("{MINIMAL}writes: {{ error_threshold: 101 }}\n"), "0 to 100"),
            (format!("{MINIMAL}writes: {{ retry_attempts: -1 }}\n"), ":7:27: "),
            (format!("{MINIMAL}writes: {{ rehearse_percent: 101 }}\n"), "0 to 100"),
            (format!("{MINIMAL}writes: {{ rehearse: 1 }}\n"), "unknown field"),
            (
                format!("{MINIMAL}writes: {{ rehearse_max_concurrency: 0 }}\n"),
                "at least 1",
            ),
            (
                format!("{MINIMAL}writes: {{ rehearse_rules: [{{ percent: 5 }}] }}\n"),
                "writes: rehearse_rules: entry 1: names no",
            ),
            (
                format!("{MINIMAL}writes: {{ rehearse_key: tenant }}\n"),
                "writes: rehearse_key: ",
            ),
            (format!("{MINIMAL}switchover: {{ drain_timeout: 5 }}\n"), "500ms"),
            (format!("{MINIMAL}switchover: {{ gates: {{ lag: 2 }} }}\n"), "500ms"),
            (
                format!("{MINIMAL}switchover: {{ gates: {{ disk: {{ old: 1GiB }} }} }}\n"),
                "expected one of legacy, new",
            ),
            (
                format!("{MINIMAL}switchover: {{ gates: {{ shadow_coverage: 101 }} }}\n"),
                "0 to 100",
            ),
            (
                format!("{MINIMAL}switchover: {{ gates: {{ canaries: 1 }} }}\n"),
                "unknown field",
            ),
            (
                format!("{MINIMAL}switchover: {{ stragglers: kill }}\n"),
                "unknown variant",
            ),
            (
                MINIMAL.replace("postgresql://pgtandem@new", "mysql://pgtandem@new"),
                ":6:10: new: ",
            ),
            (
                MINIMAL.replace("new.internal:5432/shop", "new.internal"),
                "databases: shop: new: names no database",
            ),
            (MINIMAL.replace("new.internal", "legacy.internal"), "the same database"),
            (
                format!("{MINIMAL}listen: 0.0.0.0:6432\nauth: {{ method: trust }}\n"),
                "loopback",
            ),
            (
                format!("{MINIMAL}writes: {{ acknowledge: both, when_late: shrug }}\n"),
                "shrug",
            ),
            (format!("{MINIMAL}reads: {{ canary_percent: 500 }}\n"), "0 to 100"),
            (
                format!("{MINIMAL}mismatch_log: {{ rotate: 1 }}\n"),
                "expected one of path, values",
            ),
            (format!("{MINIMAL}mismatch_log: {{ values: some }}\n"), "hashed"),
            (
                format!("{MINIMAL}mismatch_log: {{ columns: {{ email: secret }} }}\n"),
                "hashed",
            ),
            (
                format!("{MINIMAL}mismatch_log: {{ max_size: 1kB }}\n"),
                "at least 64KiB",
            ),
            (format!("{MINIMAL}mismatch_log: {{ max_age: 0s }}\n"), "more than 0s"),
            (format!("{MINIMAL}mismatch_log: {{ mac_key: short }}\n"), "at least 16"),
            (format!("{MINIMAL}mismatch_log: {{ fsync: often }}\n"), "always, never"),
            (
                format!("{MINIMAL}mismatch_log: {{ path: a, key_file: a }}\n"),
                "the log itself",
            ),
            (format!("{MINIMAL}admin: 0.0.0.0:6433\n"), "admin_token"),
            (
                format!("{MINIMAL}admin_token: \"${{PGTANDEM_NOT_SET}}\"\n"),
                "PGTANDEM_NOT_SET is not set",
            ),
        ] {
            let error = check(&text).unwrap_err();
            assert!(error.contains(says), "{error}\n  does not say {says}");
        }
    }

    #[test]
    fn an_error_beside_a_password_does_not_show_it() {
        let error = check(&format!(
            "{MINIMAL}auth:\n  users: {{ app: hunter2, wrong: [hunter2] }}\n"
        ))
        .unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
        let error = check(&MINIMAL.replace("pgtandem@new.internal:5432", "p:hunter2@new.internal:x")).unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn variables_are_replaced_inside_values() {
        let variable = |name: &str| (name == "A").then(|| "x${B}".to_owned());
        assert_eq!(substitute("1${A}2${A}", variable).unwrap(), "1x${B}2x${B}");
        assert!(substitute("${B}", variable).unwrap_err().contains('B'));
        assert!(substitute("${A", variable).is_err());
    }

    #[test]
    fn a_verifier_is_told_from_a_password() {
        let config = check(&format!(
            "{MINIMAL}auth: {{ users: {{ a: pw, b: \"SCRAM-SHA-256$4096:c2FsdA==$aGFzaA==:aGFzaA==\" }} }}\n"
        ))
        .unwrap();
        assert!(matches!(config.auth.users["a"], Credential::Password(_)));
        assert!(matches!(config.auth.users["b"], Credential::Verifier(_)));
    }
}
