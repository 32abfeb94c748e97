//! What the two databases of a pair record of the migration.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_postgres::{Client, Row};

use crate::apply::Entry;
use crate::config::Target;
use crate::journal::{self, SideRole};
use crate::upstream::control::{connect, error_chain};

/// What one side records. Its keys are the report's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SideHistory {
    /// Why it could not be asked, where it could not.
    pub error: Option<String>,
    pub server_version: Option<String>,
    /// `primary`, `secondary`, `fenced`, `off`; absent where pgtandem is not installed.
    pub role: Option<String>,
    pub epoch: Option<u64>,
    /// Rows that were not as a round expected them, by table and kind.
    pub divergences: Vec<Divergence>,
    /// What is in quarantine now.
    pub quarantine: Vec<Entry>,
    pub quarantine_history: Vec<QuarantineEvent>,
    /// Why mirroring stands still, and since when.
    pub halted: Option<(String, String)>,
    /// When and at which cut each table was last found equal.
    pub verified: Vec<VerifiedTable>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divergence {
    pub table: String,
    pub kind: String,
    pub count: u64,
    pub first: String,
    pub last: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineEvent {
    pub at: String,
    pub action: String,
    pub id: i64,
    pub tables: Vec<String>,
    pub changes: u64,
    pub error: Option<String>,
    pub actor: Option<String>,
    pub reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedTable {
    pub table: String,
    pub at: String,
    pub epoch: u64,
    pub round: u64,
    pub position: String,
    pub rows: u64,
    pub digest: String,
}

/// Events of the quarantine shown, the newest.
const EVENTS_MAX: i64 = 500;

/// As RFC 3339.
macro_rules! utc {
    ($column:literal) => {
        concat!(
            "to_char(",
            $column,
            r#" AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"#
        )
    };
}

/// Asks one side, also where nothing is installed. A side that cannot be asked says why.
pub(super) async fn of_side(target: &Target, since: Option<OffsetDateTime>) -> SideHistory {
    let failed = |error: String| SideHistory {
        error: Some(error),
        ..SideHistory::default()
    };
    let client = match connect(target, "report").await {
        Ok(client) => client,
        Err(error) => return failed(error.to_string()),
    };
    // Long ago, where no time is given.
    let since = since.unwrap_or(OffsetDateTime::UNIX_EPOCH).unix_timestamp() as f64;
    read(&client, since)
        .await
        .unwrap_or_else(|error| failed(error_chain(&error)))
}

async fn read(client: &Client, since: f64) -> Result<SideHistory, tokio_postgres::Error> {
    let version = client.query_one("SHOW server_version", &[]).await?.get(0);
    let mut history = SideHistory {
        server_version: Some(version),
        ..SideHistory::default()
    };
    let installed = client
        .query_one(
            "SELECT to_regclass('pgtandem.divergence') IS NOT NULL AND to_regclass('pgtandem.quarantine_history') IS NOT NULL
                AND to_regclass('pgtandem.verified') IS NOT NULL",
            &[],
        )
        .await?;
    if !installed.get::<_, bool>(0) {
        return Ok(history);
    }
    if let Ok(Some(state)) = journal::read_state(client).await {
        history.role = Some(role(state.role).into());
        history.epoch = Some(state.epoch.0);
    }
    history.quarantine = crate::apply::list_quarantine(client).await?;
    // Whatever was said of them may hold values.
    for entry in &mut history.quarantine {
        entry.detail = None;
        entry.keys.clear();
        entry.statements.clear();
    }
    history.divergences = client
        .query(
            concat!(
                "SELECT schema || '.' || name, kind, count(*), ",
                utc!("min(at)"),
                ", ",
                utc!("max(at)"),
                " FROM pgtandem.divergence WHERE at >= to_timestamp($1) GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
            ),
            &[&since],
        )
        .await?
        .iter()
        .map(divergence)
        .collect();
    history.quarantine_history = client
        .query(
            concat!(
                "SELECT ",
                utc!("at"),
                ", action, id, tables, changes, error, actor, reason
                   FROM (SELECT * FROM pgtandem.quarantine_history WHERE at >= to_timestamp($1) ORDER BY at DESC LIMIT $2) h ORDER BY at"
            ),
            &[&since, &EVENTS_MAX],
        )
        .await?
        .iter()
        .map(quarantine_event)
        .collect();
    history.halted = client
        .query_opt(concat!("SELECT ", utc!("at"), ", reason FROM pgtandem.halted"), &[])
        .await?
        .map(|row| (row.get(0), row.get(1)));
    history.verified = client
        .query(
            concat!(
                "SELECT schema || '.' || name, ",
                utc!("at"),
                ", epoch, round, position::text, rows, digest FROM pgtandem.verified ORDER BY 1"
            ),
            &[],
        )
        .await?
        .iter()
        .map(verified)
        .collect();
    Ok(history)
}

const fn role(role: SideRole) -> &'static str {
    match role {
        SideRole::Primary => "primary",
        SideRole::Secondary { .. } => "secondary",
        SideRole::Fenced => "fenced",
        SideRole::Off => "off",
    }
}

fn number(row: &Row, column: usize) -> u64 {
    u64::try_from(row.get::<_, i64>(column)).unwrap_or(0)
}

fn divergence(row: &Row) -> Divergence {
    Divergence {
        table: row.get(0),
        kind: row.get(1),
        count: number(row, 2),
        first: row.get(3),
        last: row.get(4),
    }
}

fn quarantine_event(row: &Row) -> QuarantineEvent {
    QuarantineEvent {
        at: row.get(0),
        action: row.get(1),
        id: row.get(2),
        tables: row.get(3),
        changes: number(row, 4),
        error: row.get(5),
        actor: row.get(6),
        reason: row.get(7),
    }
}

fn verified(row: &Row) -> VerifiedTable {
    VerifiedTable {
        table: row.get(0),
        at: row.get(1),
        epoch: number(row, 2),
        round: number(row, 3),
        position: row.get(4),
        rows: number(row, 5),
        digest: row.get(6),
    }
}
