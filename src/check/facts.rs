//! What is read of both sides. Only this file asks the servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use tokio_postgres::Client;

use crate::catalog::definitions::DefinitionDifference;
use crate::catalog::privileges;
use crate::config::Config;
use crate::control::Side;
use crate::reconcile::schema::Script;
use crate::transform::{Plan as Mapping, Transform};

/// Everything that findings are made of.
#[derive(Debug, Clone)]
pub struct Facts {
    pub primary: Side,
    /// proxy.yaml's, and what it comes to.
    pub transform: Arc<Transform>,
    pub mapping: Mapping,
    pub legacy: SideFacts,
    pub new: SideFacts,
    /// `first` is the primary's.
    pub differences: Vec<DefinitionDifference>,
    /// What brings the secondary's definitions in line.
    pub script: Script,
    pub limits: Limits,
    /// Clients' roles that proxy.yaml names.
    pub users: Vec<String>,
}

impl Facts {
    pub const fn side(&self, side: Side) -> &SideFacts {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }

    /// Whether the primary's table has another shape on the secondary.
    pub fn is_transformed(&self, table: &TableFacts) -> bool {
        self.transform.concerns(self.primary, &table.schema, &table.name)
    }

    /// Whether the secondary has none of the primary's tables.
    pub fn has_no_table(&self) -> bool {
        let here = &self.primary().tables;
        let there = &self.secondary().tables;
        let has = |table: &TableFacts| {
            there
                .iter()
                .any(|other| (&other.schema, &other.name) == (&table.schema, &table.name))
        };
        !here.is_empty() && !here.iter().any(has)
    }

    pub const fn primary(&self) -> &SideFacts {
        self.side(self.primary)
    }

    pub const fn secondary(&self) -> &SideFacts {
        self.side(self.primary.other())
    }
}

/// What proxy.yaml asks of the servers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    pub max_connections: usize,
    pub journal_bytes: u64,
    pub backfill_workers: usize,
}

impl Limits {
    pub(super) const fn of(config: &Config) -> Self {
        Self {
            max_connections: config.limits.max_connections,
            journal_bytes: config.journal.max_bytes,
            backfill_workers: config.backfill.workers,
        }
    }
}

/// One side, as `facts.sql` gives it, and what needs a query of its own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SideFacts {
    /// `server_version_num`.
    pub version: i32,
    pub database: String,
    pub recovering: bool,
    pub encoding: String,
    pub locale: Locale,
    /// That came with the server and can be used in this database.
    pub collations: BTreeSet<String>,
    /// What a session begins with.
    pub settings: BTreeMap<String, Option<String>>,
    /// Name and version.
    pub extensions: BTreeMap<String, String>,
    pub available: BTreeMap<String, Option<String>>,
    /// The proxy's own.
    pub role: Role,
    /// All of the server, and whether they may log in.
    pub roles: BTreeMap<String, bool>,
    /// Roles that own something in the database, or are granted something.
    pub concerned: BTreeSet<String>,
    pub tables: Vec<TableFacts>,
    pub sequences: Vec<SequenceFacts>,
    pub large_objects: i64,
    pub event_triggers: Vec<String>,
    /// Transactions of PREPARE TRANSACTION on the whole server.
    pub prepared: Vec<String>,
    pub oldest_transaction_seconds: i64,
    pub connections: Connections,
    pub bytes: i64,
    /// Statements by which a DBA gives the proxy's role what it lacks to install, and to apply.
    #[serde(skip)]
    pub missing_to_install: Vec<String>,
    #[serde(skip)]
    pub missing_to_apply: Option<String>,
    #[serde(skip)]
    pub writes: Option<Writes>,
}

/// How the database sorts text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Locale {
    /// `c` libc, `i` ICU, `b` built in.
    pub provider: String,
    pub name: String,
    pub ctype: String,
    /// The library's version when the database was made, and now; none: it has none, or the
    /// server (before 15) does not tell.
    pub recorded: Option<String>,
    pub actual: Option<String>,
}

impl Locale {
    pub fn sorts_by_bytes(&self) -> bool {
        self.provider == "b" || (self.provider == "c" && matches!(self.name.as_str(), "C" | "POSIX"))
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Role {
    pub name: String,
    pub superuser: bool,
    pub bypasses_row_security: bool,
    /// At most so many; -1 is no limit.
    pub connections: i64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Connections {
    pub max: i64,
    pub reserved: i64,
    pub used: i64,
    /// The database's own limit; -1 is none.
    pub of_database: i64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct TableFacts {
    pub schema: String,
    pub name: String,
    /// `pg_class.relkind`: r, p, f.
    pub kind: String,
    /// `pg_class.relpersistence`: p, u.
    pub persistence: String,
    pub owner: String,
    /// By the proxy's role, directly or as a member.
    pub owned: bool,
    pub readable: bool,
    pub partition: bool,
    pub row_security: bool,
    pub forced: bool,
    pub bytes: i64,
    /// The extension that brought it along.
    pub extension: Option<String>,
    /// `primary` or `unique`.
    pub key: Option<String>,
    pub columns: Vec<ColumnFacts>,
    /// Names with `pg_trigger.tgenabled`, `pg_rewrite.ev_enabled`.
    pub triggers: Vec<(String, String)>,
    pub rules: Vec<(String, String)>,
}

impl TableFacts {
    pub fn qualified(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ColumnFacts {
    pub name: String,
    #[serde(rename = "type")]
    pub type_name: String,
    /// As in `pg_attribute`: empty, s, v.
    pub generated: String,
    /// Empty, a, d.
    pub identity: String,
    /// One that came with the server, other than the database's.
    pub collation: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SequenceFacts {
    pub name: String,
    /// None: not used yet, or not readable.
    pub last: Option<i64>,
    pub min: i64,
    pub max: i64,
    pub increment: i64,
    pub cycles: bool,
    pub owned_by: Option<String>,
}

/// Per second, on the primary.
#[derive(Debug, Clone, Copy, Default)]
pub struct Writes {
    pub wal_bytes: f64,
    pub rows: f64,
}

impl SideFacts {
    pub const fn major(&self) -> i32 {
        self.version / 10_000
    }

    /// Reads one side; pins the session's settings.
    pub async fn read(client: &Client) -> anyhow::Result<Self> {
        client.batch_execute("SET search_path = pg_catalog").await?;
        let text: String = client.query_one(include_str!("facts.sql"), &[]).await?.get(0);
        let mut facts: Self = serde_json::from_str(&text).context("an answer of facts.sql")?;
        if facts.version >= 150_000 {
            facts.locale.actual = client
                .query_one(
                    "SELECT pg_database_collation_actual_version(d.oid) FROM pg_database d WHERE d.datname = current_database()",
                    &[],
                )
                .await?
                .get(0);
        }
        facts.missing_to_install = privileges::missing_to_install(client).await?;
        facts.missing_to_apply = privileges::missing_replication_role(client).await?;
        Ok(facts)
    }
}

/// Watches the primary for a moment.
pub(super) async fn measure_writes(client: &Client, during: Duration) -> anyhow::Result<Writes> {
    let before = written(client).await?;
    tokio::time::sleep(during).await;
    let after = written(client).await?;
    let rate = |before: f64, after: f64| (after - before).max(0.0) / during.as_secs_f64();
    Ok(Writes {
        wal_bytes: rate(before.0, after.0),
        rows: rate(before.1, after.1),
    })
}

async fn written(client: &Client) -> anyhow::Result<(f64, f64)> {
    // Nothing is written where it recovers, and the function is refused.
    let row = client
        .query_one(
            "SELECT CASE WHEN pg_is_in_recovery() THEN 0 ELSE (pg_current_wal_lsn() - '0/0')::float8 END,
                    (tup_inserted + tup_updated + tup_deleted)::float8
               FROM pg_stat_database WHERE datname = current_database()",
            &[],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}
