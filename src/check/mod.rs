//! Whether a pair of databases can be mirrored exactly, before anything is installed: facts are
//! read from both sides, and pure functions make findings of them.
//!
//! | file | holds |
//! | --- | --- |
//! | `facts.rs`, `facts.sql` | what is read of a side, in one query and a few small ones |
//! | `finding.rs` | what is said |
//! | `servers.rs` | findings about servers: versions, collations, settings, extensions, room |
//! | `roles.rs` | findings about roles and privileges |
//! | `tables.rs` | findings about tables and sequences, and each table's verdict |
//! | `definitions.rs` | findings about definitions that differ |
//! | `mapping.rs` | findings about `transform:` |

mod definitions;
pub mod facts;
pub mod finding;
mod mapping;
mod roles;
mod servers;
mod tables;

use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use tokio_postgres::Client;

use self::facts::{Facts, Limits, SideFacts};
pub use self::finding::{Finding, Level};
pub use self::roles::create_role;
pub use self::tables::TableVerdict;
use crate::catalog::PINNED_SETTINGS;
use crate::catalog::definitions::definitions_different;
use crate::catalog::objects::Objects;
use crate::config::{Config, Target};
use crate::control::Side;
use crate::journal::{self, SideRole};
use crate::reconcile::schema::statements;
use crate::transform::check::examine;
use crate::transform::hidden::Hidden;
use crate::transform::{Plan as Mapping, Transform};
use crate::upstream::control::connect;

/// How long the primary's writes are measured.
const MEASURED: Duration = Duration::from_secs(1);

/// What is said of one pair of databases.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub database: String,
    pub primary: Side,
    /// Blocks first, then warnings, then what is fine.
    pub findings: Vec<Finding>,
    pub tables: Vec<TableVerdict>,
}

impl Report {
    pub fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }
}

/// Reads both sides of a pair and judges them. Changes nothing on either.
///
/// # Errors
/// Where a side cannot be reached or read.
pub async fn check(config: &Config, database: String, [legacy, new]: &[Target; 2]) -> anyhow::Result<Report> {
    let legacy = connect(legacy, "check").await?;
    let new = connect(new, "check").await?;
    let transform = config.transform_of(&database);
    // Before the sessions become read-only: it makes temporary tables, and takes them back.
    let mapping = examine_mapping(&transform, &legacy, &new)
        .await
        .context("examine transform")?;
    let primary = primary_of(config, &legacy, &new).await?;
    for client in [&legacy, &new] {
        client
            .batch_execute("SET default_transaction_read_only = on; SET jit = off")
            .await?;
    }
    let mut sides = [
        SideFacts::read(&legacy).await.context("read legacy")?,
        SideFacts::read(&new).await.context("read new")?,
    ];
    let (first, second) = match primary {
        Side::Legacy => (&legacy, &new),
        Side::New => (&new, &legacy),
    };
    sides[primary as usize].writes = Some(facts::measure_writes(first, MEASURED).await?);
    let mut differences = definitions_different(first, second)
        .await
        .context("compare definitions")?;
    differences.retain(|found| !found.is_about_order());
    for client in [first, second] {
        client.batch_execute(PINNED_SETTINGS).await?;
    }
    let (mut here, mut there) =
        tokio::try_join!(Objects::read(first), Objects::read(second)).context("read definitions")?;
    let hidden = Hidden::read(&transform, &legacy, &new).await?;
    hidden.leave_out_of(&mut differences);
    hidden.leave_out_of_objects(&mut here);
    hidden.leave_out_of_objects(&mut there);
    let [legacy, new] = sides;
    let facts = Facts {
        primary,
        transform,
        mapping,
        legacy,
        new,
        differences,
        script: statements(&here, &there, None),
        limits: Limits::of(config),
        users: config.auth.users.keys().cloned().collect(),
    };
    Ok(judge(database, &facts))
}

async fn examine_mapping(
    transform: &Transform,
    legacy: &Client,
    new: &Client,
) -> Result<Mapping, tokio_postgres::Error> {
    for client in [legacy, new] {
        client.batch_execute(PINNED_SETTINGS).await?;
    }
    examine(transform, legacy, new).await
}

/// Which side is primary: what is recorded there, else what proxy.yaml's phase says.
pub async fn primary_of(config: &Config, legacy: &Client, new: &Client) -> anyhow::Result<Side> {
    Ok(
        match (journal::read_state(legacy).await?, journal::read_state(new).await?) {
            (Some(state), _) if state.role == SideRole::Primary => Side::Legacy,
            (_, Some(state)) if state.role == SideRole::Primary => Side::New,
            _ => config.phase.primary(),
        },
    )
}

/// The findings that facts give. Pure.
pub fn judge(database: String, facts: &Facts) -> Report {
    let tables = tables::verdicts(facts);
    let mut findings = servers::findings(facts);
    findings.extend(roles::findings(facts));
    findings.extend(tables::findings(facts, &tables));
    findings.extend(definitions::findings(facts));
    findings.extend(mapping::findings(facts));
    findings.sort_by_key(|finding| finding.level);
    Report {
        database,
        primary: facts.primary,
        findings,
        tables,
    }
}
