//! One table while it is compared: its ranges, what came of each, and the report of them all.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::Options;
use crate::apply::TableStatus;
use crate::catalog::quote::identifier;
use crate::reconcile::compare::{Outcome, Plan};
use crate::reconcile::digest::RowDigest;
use crate::reconcile::key::{self, KeyRange};
use crate::reconcile::place::Place;
use crate::reconcile::report::{Differing, DifferingRow, RangeReport, TableDigest, TableReport, TableResult};
use crate::reconcile::{VerifyError, was_interrupted};

/// A table, while it is compared.
pub(super) struct Work {
    pub status: TableStatus,
    /// Why it is not compared.
    pub not_compared: Option<String>,
    pub plan: Option<Arc<Plan>>,
    psql: String,
    bytes: u64,
    pub ranges: Vec<KeyRange>,
    pub parts: Vec<Option<RangeReport>>,
    pub done: usize,
    pub put_off: u32,
    rows: i64,
    primary: i128,
    secondary: i128,
    differing: Differing,
    pub found: Vec<DifferingRow>,
    pub began: Option<Instant>,
    pub ended: Option<Instant>,
}

impl Work {
    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.status.schema, self.status.name)
    }

    pub(super) fn add(&mut self, part: usize, round: u64, mut outcome: Outcome, keep: usize) {
        self.rows += outcome.rows;
        self.primary += outcome.primary;
        self.secondary += outcome.secondary;
        self.differing.missing += outcome.differing.missing;
        self.differing.extra += outcome.differing.extra;
        self.differing.different += outcome.differing.different;
        outcome.found.truncate(keep.saturating_sub(self.found.len()));
        self.found.append(&mut outcome.found);
        self.parts[part] = Some(RangeReport {
            range: self.ranges[part].clone(),
            round,
            rows: outcome.rows as u64,
            digest: outcome.primary.to_string(),
            equal: outcome.equal,
        });
        self.done += 1;
        self.ended = Some(Instant::now());
    }

    pub(super) fn is_done(&self) -> bool {
        self.done == self.ranges.len()
    }

    pub(super) fn result(&self) -> TableResult {
        let parts_equal = self.parts.iter().flatten().all(|part| part.equal);
        if self.not_compared.is_some() || !self.is_done() {
            TableResult::NotCompared
        } else if parts_equal && self.differing.total() == 0 {
            TableResult::Equal
        } else {
            TableResult::Different
        }
    }

    pub(super) fn rounds(&self) -> Option<(u64, u64)> {
        let rounds = || self.parts.iter().flatten().map(|part| part.round);
        rounds().min().zip(rounds().max())
    }

    pub(super) fn report(&self) -> TableReport {
        let duration = match (self.began, self.ended) {
            (Some(began), Some(ended)) => ended - began,
            _ => Duration::ZERO,
        };
        let key = self.plan.as_ref().filter(|plan| plan.ordered);
        TableReport {
            schema: self.status.schema.clone(),
            name: self.status.name.clone(),
            result: self.result(),
            note: self.not_compared.clone(),
            columns: self
                .plan
                .as_ref()
                .map_or_else(Vec::new, |plan| plan.digest.column_names()),
            key: key
                .and_then(|plan| plan.key.as_ref())
                .map_or_else(Vec::new, key::WalkKey::names),
            rows: self.rows as u64,
            bytes: self.bytes,
            ranges: self.ranges.len() as u64,
            digest: TableDigest {
                primary: self.primary.to_string(),
                secondary: self.secondary.to_string(),
            },
            differing: self.differing,
            differing_rows: self.found.clone(),
            parts: self.parts.iter().flatten().cloned().collect(),
            duration_ms: duration.as_secs_f64() * 1000.0,
            rows_per_second: self.rows as f64 / duration.as_secs_f64().max(0.001),
            rounds: self.rounds(),
            now_synced: false,
            psql: self.psql.clone(),
        }
    }
}

/// As often the reading of a table's key may be a deadlock's victim.
const PREPARE_AGAIN: usize = 20;

/// As [`prepare`], again where a wait for a lock was ended.
pub(super) async fn prepare_patiently(
    primary: &Client,
    secondary: &Client,
    status: TableStatus,
    options: &Options,
) -> Result<Work, VerifyError> {
    for _ in 0..PREPARE_AGAIN {
        match prepare(primary, secondary, status.clone(), options).await {
            Err(VerifyError::Postgres(error)) if was_interrupted(&error) => {}
            prepared => return prepared,
        }
    }
    prepare(primary, secondary, status, options).await
}

/// What is known of a table before it is read.
async fn prepare(
    primary: &Client,
    secondary: &Client,
    status: TableStatus,
    options: &Options,
) -> Result<Work, VerifyError> {
    let mut work = Work {
        not_compared: status
            .paused
            .as_ref()
            .map(|why| format!("its mirroring is paused: {why}")),
        status,
        plan: None,
        psql: String::new(),
        bytes: 0,
        ranges: Vec::new(),
        parts: Vec::new(),
        done: 0,
        put_off: 0,
        rows: 0,
        primary: 0,
        secondary: 0,
        differing: Differing::default(),
        found: Vec::new(),
        began: None,
        ended: None,
    };
    if work.not_compared.is_some() {
        return Ok(work);
    }
    let (schema, name) = (work.status.schema.clone(), work.status.name.clone());
    let (here, there) = tokio::try_join!(
        Place::on_primary(primary, &schema, &name),
        Place::table(secondary, &schema, &name)
    )?;
    let digest = RowDigest::load(primary, &here, &schema, &name).await?;
    let ordered = here
        .key
        .as_ref()
        .zip(there.key.as_ref())
        .is_some_and(|(here, there)| here.agrees(there));
    // Whatever a face is of, its rows are told apart by the secondary's key.
    let key = match here.is_face {
        true => there.key,
        false => here
            .key
            .filter(|here| there.key.is_some_and(|there| there.names() == here.names())),
    };
    work.bytes = size(primary, &here.table).await?;
    work.ranges = match &key {
        // A face cannot be sampled; any boundaries will do.
        Some(key) if ordered && here.is_face => {
            key::ranges(key::boundaries(secondary, key, &schema, &name, options.range_rows).await?)
        }
        Some(key) if ordered => key::ranges(key::boundaries(primary, key, &schema, &name, options.range_rows).await?),
        _ => vec![KeyRange::default()],
    };
    work.parts.resize(work.ranges.len(), None);
    work.psql = digest.psql();
    work.plan = Some(Arc::new(Plan {
        image: image(primary, secondary, &here.relation, &there.table).await?,
        digest,
        key,
        ordered,
        plain: options.plain,
        keep: options.keep,
    }));
    Ok(work)
}

async fn size(client: &Client, table: &str) -> Result<u64, tokio_postgres::Error> {
    let sql = "SELECT COALESCE(pg_table_size(to_regclass($1::text)), 0)";
    let row = client.query_one(sql, &[&table]).await?;
    Ok(row.get::<_, i64>(0) as u64)
}

/// A row `t` as the applier's images have it: in the primary's column order, without what the
/// secondary computes when it is read.
async fn image(primary: &Client, secondary: &Client, relation: &str, table: &str) -> Result<String, VerifyError> {
    const COLUMNS: &str = "\
        SELECT a.attname::text, a.attgenerated::text FROM pg_attribute a
         WHERE a.attrelid = to_regclass($1::text) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let here = primary.query(COLUMNS, &[&relation]).await?;
    let there = secondary.query(COLUMNS, &[&table]).await?;
    let is_virtual = |name: &str| {
        let mut columns = there.iter();
        columns.any(|row| row.get::<_, &str>(0) == name && row.get::<_, &str>(1) == "v")
    };
    let fields: Vec<String> = here
        .iter()
        .map(|row| row.get::<_, &str>(0))
        .map(|name| match is_virtual(name) {
            true => "NULL".to_owned(),
            false => format!("t.{}", identifier(name)),
        })
        .collect();
    Ok(format!("ROW({})::text", fields.join(", ")))
}
