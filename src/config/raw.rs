//! proxy.yaml as written: one struct a section, unknown keys refused, `${NAME}` replaced inside
//! the values, and every value parsed where it stands, so that an error carries its line.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::backfill::RawBackfill;
use super::database::RawDatabase;
use super::error::{ConfigError, located};
use super::gates::RawGates;
use super::mismatch_log::RawMismatchLog;
use super::reads::RawReads;
use super::value::{Address, Bytes, OneOrMany, Seconds, Text};
use super::writes::RawWrites;
use super::{
    Admin, Auth, AuthMethod, ClientTls, Config, Credential, Journal, Limits, Secret, Stragglers, StrayWriters,
    Switchover, Verify, WhenFull,
};
use crate::control::Phase;

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
            writes: self.writes.into(),
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
