//! Which tables are mirrored, and keeping that in step with both catalogs.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::plan::{DdlRecord, TableRecord};
use super::session::Session;
use super::status::{NotMirrored, Seeding};
use super::tables::same_columns;
use super::{ApplyError, doing};
use crate::catalog::quote::qualified;
use crate::catalog::{Oid, privileges};
use crate::journal::read::Shape;
use crate::journal::{CaptureReport, capture_tables};

/// What the last look at both catalogs found, besides the tables.
#[derive(Default)]
pub(super) struct CatalogWatch {
    /// Of both sides' catalogs; unchanged means there is nothing to look at.
    fingerprint: Option<(String, String)>,
    pub not_mirrored: Vec<NotMirrored>,
    pub sql_for_dba: Vec<String>,
    /// What is defined otherwise on the two sides and waits in no journal.
    pub different: Vec<String>,
    /// Of both sides' definitions when they were last compared.
    compared: Option<(String, String)>,
    next_comparison: Option<Instant>,
}

/// Why a table is paused whose transform has no inverse.
const NO_FACE: &str = "transform: it has no way back to the other side's shape";

impl CatalogWatch {
    /// The next look looks at everything.
    pub(super) fn forget(&mut self) {
        self.fingerprint = None;
        self.compared = None;
        self.next_comparison = None;
    }
}

/// Definitions are compared at most this often, and only when a catalog has changed.
const COMPARE_EVERY: Duration = Duration::from_secs(2);

/// Cheap enough for every second: changes with every table, column, trigger or index created,
/// changed or dropped. pg_class itself is updated in place by VACUUM and ANALYZE, which leaves
/// xmin alone.
pub(super) const FINGERPRINT: &str = "\
SELECT concat_ws(' ',
    EXISTS (SELECT FROM pg_largeobject_metadata),
    (SELECT concat(count(*), ':', sum(hashint8(c.oid::bigint * 4294967296 + c.xmin::text::bigint)::bigint))
       FROM pg_class c WHERE c.relkind IN ('r', 'p', 'S', 'f', 'm') AND c.oid >= 16384),
    (SELECT concat(count(*), ':', sum(hashint8(a.attrelid::bigint * 4294967296 + a.xmin::text::bigint)::bigint))
       FROM pg_attribute a WHERE a.attrelid >= 16384 AND a.attnum > 0),
    (SELECT concat(count(*), ':', sum(hashint8(t.oid::bigint * 4294967296 + t.xmin::text::bigint)::bigint))
       FROM pg_trigger t WHERE NOT t.tgisinternal),
    (SELECT concat(count(*), ':', sum(hashint8(i.indexrelid::bigint * 4294967296 + i.xmin::text::bigint)::bigint))
       FROM pg_index i WHERE i.indexrelid >= 16384),
    (SELECT concat(count(*), ':', sum(hashint8(n.oid::bigint * 4294967296 + n.xmin::text::bigint)::bigint)) FROM pg_namespace n))";

/// The same of everything that makes up definitions, but for what is temporary.
const DEFINITIONS_FINGERPRINT: &str = "\
SELECT concat_ws(' ',
    (SELECT concat(count(*), ':', sum(hashint8(c.oid::bigint * 4294967296 + c.xmin::text::bigint)::bigint))
       FROM pg_class c WHERE c.relpersistence <> 't' AND c.relkind <> 't' AND c.oid >= 16384),
    (SELECT concat(count(*), ':', sum(hashint8(a.attrelid::bigint * 4294967296 + a.xmin::text::bigint)::bigint))
       FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE c.relpersistence <> 't' AND a.attrelid >= 16384 AND a.attnum > 0),
    (SELECT concat(count(*), ':', sum(hashint8(d.oid::bigint * 4294967296 + d.xmin::text::bigint)::bigint))
       FROM (SELECT oid, xmin FROM pg_proc UNION ALL SELECT oid, xmin FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%'
             UNION ALL SELECT oid, xmin FROM pg_type WHERE typtype IN ('e', 'd', 'r') UNION ALL SELECT oid, xmin FROM pg_enum
             UNION ALL SELECT oid, xmin FROM pg_policy UNION ALL SELECT oid, xmin FROM pg_rewrite UNION ALL SELECT oid, xmin FROM pg_extension
             UNION ALL SELECT oid, xmin FROM pg_statistic_ext UNION ALL SELECT oid, xmin FROM pg_default_acl UNION ALL SELECT oid, xmin FROM pg_trigger
             UNION ALL SELECT objoid, xmin FROM pg_description UNION ALL SELECT oid, xmin FROM pg_operator UNION ALL SELECT oid, xmin FROM pg_cast
             UNION ALL SELECT oid, xmin FROM pg_collation
             UNION ALL SELECT d.oid, d.xmin FROM pg_attrdef d JOIN pg_class c ON c.oid = d.adrelid WHERE c.relpersistence <> 't'
             UNION ALL SELECT i.indexrelid, i.xmin FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relpersistence <> 't'
             UNION ALL SELECT k.oid, k.xmin FROM pg_constraint k LEFT JOIN pg_class c ON c.oid = k.conrelid WHERE c.relpersistence IS DISTINCT FROM 't') d))";

/// A table as both sides' catalogs have it.
struct Found {
    rel: Oid,
    columns: String,
    shape: Shape,
}

impl Session {
    /// Looks whether a catalog changed, and if so brings capture and tables in step.
    pub(super) async fn keep_in_step(&mut self, watch: &mut CatalogWatch) -> Result<(), ApplyError> {
        let (here, there) = tokio::try_join!(
            self.aside.query_one(FINGERPRINT, &[]),
            self.secondary.query_one(FINGERPRINT, &[])
        )
        .map_err(doing("look for changes of the catalogs"))?;
        let now: (String, String) = (here.get(0), there.get(0));
        if watch.fingerprint.as_ref() == Some(&now) {
            return Ok(());
        }
        let done = self.bring_in_step(watch).await?;
        // What was done here changed the catalogs as well: the next look settles it. So does it
        // what could not be finished now.
        watch.fingerprint = done.then_some(now);
        self.sequences.forget();
        Ok(())
    }

    /// Looks whether the two sides define everything alike, where a catalog has changed since the
    /// last look: DDL that nobody saw need not concern tables.
    pub(super) async fn compare_everything(&self, watch: &mut CatalogWatch) -> Result<(), ApplyError> {
        if watch.next_comparison.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        let began = Instant::now();
        let (here, there) = tokio::try_join!(
            self.aside.query_one(DEFINITIONS_FINGERPRINT, &[]),
            self.secondary.query_one(DEFINITIONS_FINGERPRINT, &[])
        )
        .map_err(doing("look for changes of the definitions"))?;
        let now: (String, String) = (here.get(0), there.get(0));
        if watch.compared.as_ref() != Some(&now)
            && let Some(different) = self.definitions_if_readable().await?
        {
            if !different.is_empty() && different != watch.different {
                tracing::error!(
                    objects = different.join(", "),
                    "the two sides' definitions differ; `pgtandem schema heal` brings the secondary in line"
                );
            }
            watch.different = different;
            watch.compared = Some(now);
        }
        watch.next_comparison = Some(Instant::now() + COMPARE_EVERY.max(began.elapsed() * 50));
        Ok(())
    }

    /// What a catalog function cannot describe because it is being dropped, or only behind a
    /// client's lock, is read at the next look; mirroring does not rest on it and must not wait.
    async fn definitions_if_readable(&self) -> Result<Option<Vec<String>>, ApplyError> {
        self.wait_for_locks("SET lock_timeout = '50ms'").await?;
        let found = self.definitions_differ().await;
        self.wait_for_locks("SET lock_timeout = 0").await?;
        match found {
            Err(error) if !error.is_connection() => {
                tracing::debug!(%error, "the two sides' definitions cannot be compared now");
                Ok(None)
            }
            other => other,
        }
    }

    async fn wait_for_locks(&self, setting: &str) -> Result<(), ApplyError> {
        for client in [&self.aside, &self.secondary] {
            client
                .batch_execute(setting)
                .await
                .map_err(doing("compare definitions"))?;
        }
        Ok(())
    }

    /// False when something has to be looked at again.
    pub(super) async fn bring_in_step(&mut self, watch: &mut CatalogWatch) -> Result<bool, ApplyError> {
        let primary_report = capture_tables(&self.aside).await?;
        for &rel in &primary_report.again {
            self.note_lost_capture(rel).await?;
        }
        let secondary_report = capture_tables(&self.secondary).await?;
        // Definitions and capture may have changed under prepared statements.
        self.reload_tables().await?;
        self.adopt_quiet().await?;
        let settled = self.compare_definitions().await?;
        let refilled = self.refill_resumed().await?;
        self.aside
            .batch_execute(
                "UPDATE pgtandem.captured c SET filenode = s.filenode FROM pgtandem.shape s
                  WHERE s.rel = c.rel AND s.filenode <> c.filenode AND s.attributes = c.attributes
                    AND c.rel IN (SELECT k.rel FROM pgtandem.captured k FOR UPDATE SKIP LOCKED)",
            )
            .await
            .map_err(doing("refresh the captured tables"))?;
        watch.not_mirrored = self.not_mirrored(&primary_report, &secondary_report).await?;
        watch.sql_for_dba = primary_report.sql_for_dba;
        watch.sql_for_dba.extend(
            privileges::missing_ownership(&self.secondary)
                .await
                .map_err(doing("check ownership on the secondary"))?,
        );
        Ok(settled && refilled && primary_report.busy.is_empty() && secondary_report.busy.is_empty())
    }

    async fn note_lost_capture(&mut self, rel: Oid) -> Result<(), ApplyError> {
        let rels = self.faces.of(rel);
        self.secondary
            .execute(
                "UPDATE pgtandem.seeding SET state = 'unseeded',
                        note = 'capture was switched off or dropped for a while: changes are missing' WHERE rel = ANY ($1)",
                &[&rels],
            )
            .await
            .map_err(doing("mark a table for seeding"))?;
        tracing::error!(
            rel,
            "capture of a table was switched off or dropped for a while; it needs seeding"
        );
        Ok(())
    }

    /// Tables that changes name and that are not known yet, before they are needed.
    pub(super) async fn adopt_unknown<'a>(
        &mut self,
        rels: &[Oid],
        ddl: impl Iterator<Item = &'a DdlRecord>,
    ) -> Result<(), ApplyError> {
        let mut created = HashSet::new();
        let mut wanted: Vec<Oid> = rels.to_vec();
        for record in ddl {
            created.extend(record.created.iter().map(|table| table.rel));
            wanted.extend(record.changed.iter().map(|table| table.rel));
        }
        wanted.retain(|rel| self.tables.get(*rel).is_none() && !created.contains(rel));
        if !wanted.is_empty() {
            self.adopt(&wanted, "true").await?;
        }
        Ok(())
    }

    /// Records captured tables that the secondary does not know yet. Not while DDL waits in the
    /// journal: that may be what makes them, or drops another one of the same name here.
    async fn adopt_quiet(&mut self) -> Result<(), ApplyError> {
        let rows = self
            .aside
            .query(
"SELECT COALESCE(t.rel, c.rel) FROM pgtandem.captured c LEFT JOIN pgtandem.transform t ON c.rel = ANY (t.sources)
                  WHERE COALESCE(t.rel, c.rel) <> ALL ($1)",
                &[&self.tables.rels()],
            )
            .await
            .map_err(doing("list captured tables"))?;
        let unknown: Vec<Oid> = rows.iter().map(|row| row.get(0)).collect();
        if unknown.is_empty() || self.target.is_some() {
            return Ok(());
        }
        self.adopt(&unknown, &format!("NOT ({})", self.ddl_waits_sql())).await
    }

    /// As they were when their capture began: what DDL did to them since is in the journal. The
    /// condition is asked in the same snapshot.
    async fn adopt(&mut self, rels: &[Oid], condition: &str) -> Result<(), ApplyError> {
        let rows = self
            .aside
            .query(
                &format!(
                    "SELECT c.origin::text, c.was_empty FROM pgtandem.captured c
                      WHERE c.rel = ANY ($1) AND EXISTS (SELECT FROM pg_class k WHERE k.oid = c.rel) AND {condition}
                     UNION ALL
                     SELECT jsonb_build_object('rel', m.rel::bigint, 'schema', m.schema, 'name', m.name, 'columns', m.columns, 'shape', m.shape,
                                'filenode', m.filenode::bigint, 'attributes', m.attributes)::text, c.was_empty
                       FROM pgtandem.mirrored m JOIN pgtandem.captured c ON c.rel = m.source
                      WHERE m.rel = ANY ($1) AND m.rel <> m.source AND {condition}"
                ),
                &[&rels],
            )
            .await
            .map_err(doing("read captured tables"))?;
        if rows.is_empty() {
            return Ok(());
        }
        for row in &rows {
            let table: TableRecord =
                serde_json::from_str(row.get(0)).map_err(|error| ApplyError::Inconsistent(error.to_string()))?;
            self.adopt_table(&table, row.get(1)).await?;
        }
        self.reload_tables().await?;
        Ok(())
    }

    async fn adopt_table(&self, table: &TableRecord, was_empty: bool) -> Result<(), ApplyError> {
        let here = self
            .secondary
            .query_opt(
                "SELECT rel, columns FROM pgtandem.shape WHERE schema = $1 AND name = $2",
                &[&table.schema, &table.name],
            )
            .await
            .map_err(doing("look for a table on the secondary"))?;
        let local: Option<Oid> = here.as_ref().map(|row| row.get(0));
        let paused = match &here {
            _ if self.has_no_face(table.rel, &table.schema, &table.name) => Some(NO_FACE),
            None => Some("the secondary has no such table"),
            Some(row) if !same_columns(row.get(1), &table.columns) => Some("the two sides' columns differ"),
            Some(_) => None,
        };
        let mut state = Seeding::Unseeded;
        if paused.is_none() && was_empty {
            let empty = self
                .secondary
                .query_one(
                    &format!(
                        "SELECT NOT EXISTS (SELECT FROM ONLY {})",
                        qualified(&table.schema, &table.name)
                    ),
                    &[],
                )
                .await
                .map_err(doing("look into a table on the secondary"))?
                .get::<_, bool>(0);
            if empty {
                state = Seeding::Synced;
            }
        }
        self.secondary
            .execute(
                "INSERT INTO pgtandem.seeding (rel, local, schema, name, state, paused, columns, shape, filenode, attributes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (rel) DO NOTHING",
                &[
                    &table.rel,
                    &local,
                    &table.schema,
                    &table.name,
                    &state.as_str(),
                    &paused,
                    &table.columns,
                    &table.shape,
                    &table.filenode,
                    &table.attributes,
                ],
            )
            .await
            .map_err(doing("record a mirrored table"))?;
        Ok(())
    }

    /// Pauses what was changed by DDL that the proxy did not see, also where no row came since;
    /// resumes what agrees again. Only while no DDL waits in the journal: until that is
    /// applied, the two sides may differ.
    async fn compare_definitions(&mut self) -> Result<bool, ApplyError> {
        let ddl_waits = self.ddl_waits_sql();
        let (begun, waiting, primary, ended) = tokio::join!(
            biased;
            self.aside.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            self.aside.query_one(&ddl_waits, &[]),
            self.aside.query("SELECT rel, columns, shape, filenode, attributes FROM pgtandem.mirrored", &[]),
            self.aside.batch_execute("COMMIT"),
        );
        for result in [begun, ended] {
            result.map_err(doing("compare the two sides' definitions"))?;
        }
        let waiting = waiting.map_err(doing("look for DDL in the journal"))?;
        if waiting.get::<_, bool>(0) || self.target.is_some() {
            return Ok(false);
        }
        let primary = found(&primary.map_err(doing("read the primary's tables"))?);
        let secondary = found(
            &self
                .secondary
                .query(
                    "SELECT rel, columns, shape, filenode, attributes FROM pgtandem.shape",
                    &[],
                )
                .await
                .map_err(doing("read the secondary's tables"))?,
        );
        let mut resumed = false;
        let rels = self.tables.rels();
        for rel in rels {
            let Some(mirrored) = self.tables.get(rel) else { continue };
            let there = mirrored.local.and_then(|local| secondary.get(&local));
            match (primary.get(&rel), there) {
                (None, None) => {
                    self.forget(rel).await?;
                    resumed = true;
                }
                (None, Some(_)) if mirrored.paused.is_none() => {
                    let reason = "the primary no longer has it, by DDL that the proxy did not see";
                    self.tables.pause(&self.secondary, rel, reason).await?;
                }
                (None, Some(_)) => {}
                (Some(now), _) if mirrored.paused.is_some() => resumed |= self.try_resume(rel, now, &secondary).await?,
                (Some(now), _) if now.shape.shape != mirrored.shape.shape => {
                    let reason = "its definition changed by DDL that the proxy did not see";
                    self.tables.pause(&self.secondary, rel, reason).await?;
                }
                (Some(now), _)
                    if now.shape.filenode != mirrored.shape.filenode
                        && now.shape.attributes != mirrored.shape.attributes =>
                {
                    let reason = "it was rewritten by DDL that the proxy did not see";
                    self.tables.pause(&self.secondary, rel, reason).await?;
                }
                (Some(now), Some(there)) if !same_columns(&now.columns, &there.columns) => {
                    let reason = "the two sides' columns differ";
                    self.tables.pause(&self.secondary, rel, reason).await?;
                }
                (Some(_), _) => {}
            }
        }
        if resumed {
            self.reload_tables().await?;
        }
        Ok(true)
    }

    async fn forget(&self, rel: Oid) -> Result<(), ApplyError> {
        self.secondary
            .execute("DELETE FROM pgtandem.seeding WHERE rel = $1", &[&rel])
            .await
            .map_err(doing("forget a dropped table"))?;
        Ok(())
    }

    /// Whether a table has another shape on the secondary that its rows cannot be given: whatever is
    /// called the same there is something else.
    fn has_no_face(&self, rel: Oid, schema: &str, name: &str) -> bool {
        let primary = self.config.primary.side;
        self.faces.relation(rel).is_none() && self.config.transform.concerns(primary, schema, name)
    }

    /// A paused table goes on when both sides have the same columns again. What came meanwhile
    /// is missing, so it is unseeded: applied from here on, and reported as needing seeding.
    async fn try_resume(&self, rel: Oid, now: &Found, secondary: &HashMap<Oid, Found>) -> Result<bool, ApplyError> {
        let names = self
            .aside
            .query_opt("SELECT schema, name FROM pgtandem.mirrored WHERE rel = $1", &[&rel])
            .await
            .map_err(doing("read a table's name"))?;
        let Some(names) = names else { return Ok(false) };
        let (schema, name): (String, String) = (names.get(0), names.get(1));
        if self.has_no_face(rel, &schema, &name) {
            return Ok(false);
        }
        let local = self
            .secondary
            .query_opt(
                "SELECT rel FROM pgtandem.shape WHERE schema = $1 AND name = $2",
                &[&schema, &name],
            )
            .await
            .map_err(doing("look for a table on the secondary"))?
            .map(|row| row.get::<_, Oid>(0));
        let Some(there) = local.and_then(|local| secondary.get(&local)) else {
            return Ok(false);
        };
        if !same_columns(&now.columns, &there.columns) {
            return Ok(false);
        }
        self.secondary
            .execute(
                "UPDATE pgtandem.seeding SET note = 'was paused: ' || paused, paused = NULL, state = 'unseeded', local = $2,
                        schema = $3, name = $4, columns = $5, shape = $6, filenode = $7, attributes = $8 WHERE rel = $1",
                &[
                    &rel,
                    &local,
                    &schema,
                    &name,
                    &now.columns,
                    &now.shape.shape,
                    &now.shape.filenode,
                    &now.shape.attributes,
                ],
            )
            .await
            .map_err(doing("resume a table"))?;
        tracing::warn!(schema, table = name, "mirroring of a table goes on; it needs seeding");
        Ok(true)
    }

    /// A table's file or column grants changed, but not how its rows are written.
    pub(super) async fn remember_shape(&mut self, shape: &Shape) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "UPDATE pgtandem.seeding SET filenode = $2, attributes = $3 WHERE rel = $1",
                &[&shape.rel, &shape.filenode, &shape.attributes],
            )
            .await
            .map_err(doing("remember a table's file"))?;
        if let Some(mirrored) = self.tables.get_mut(shape.rel) {
            mirrored.shape = shape.clone();
        }
        Ok(())
    }

    /// What is on the primary and does not reach the secondary, with the reason: never silent.
    async fn not_mirrored(
        &self,
        primary: &CaptureReport,
        secondary: &CaptureReport,
    ) -> Result<Vec<NotMirrored>, ApplyError> {
        let mut list: Vec<NotMirrored> = Vec::new();
        for (side, report) in [("primary", primary), ("secondary", secondary)] {
            for (table, error) in &report.failed {
                list.push(NotMirrored {
                    what: table.clone(),
                    reason: format!("cannot be captured on the {side}: {error}"),
                });
            }
        }
        for table in &primary.busy {
            list.push(NotMirrored {
                what: table.clone(),
                reason: "waiting for a lock to begin its capture".into(),
            });
        }
        let rows = self
            .aside
            .query(
                "SELECT pgtandem.name_of(s.rel), 'belongs to extension ' || s.extension FROM pgtandem.shape s WHERE s.extension IS NOT NULL
                 UNION ALL
                 SELECT format('%I.%I', n.nspname, c.relname), 'is a foreign table: its rows are elsewhere'
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'f'
                 UNION ALL
                 SELECT 'large objects', count(*) || ' of them; triggers do not see them' FROM pg_largeobject_metadata HAVING count(*) > 0",
                &[],
            )
            .await
            .map_err(doing("list what is not mirrored"))?;
        list.extend(rows.iter().map(|row| NotMirrored {
            what: row.get(0),
            reason: row.get(1),
        }));
        list.extend(super::views::unrepeatable(&self.aside).await?);
        Ok(list)
    }
}

fn found(rows: &[tokio_postgres::Row]) -> HashMap<Oid, Found> {
    rows.iter()
        .map(|row| {
            let rel = row.get(0);
            let found = Found {
                rel,
                columns: row.get(1),
                shape: Shape {
                    rel,
                    shape: row.get(2),
                    filenode: row.get(3),
                    attributes: row.get(4),
                },
            };
            (found.rel, found)
        })
        .collect()
}
