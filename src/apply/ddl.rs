//! DDL on the secondary, at its place in the round, as the client's own role.

use std::borrow::Cow;
use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::ApplyError;
use super::doing;
use super::plan::{DdlRecord, TableRecord};
use super::session::Session;
use super::tables::record_pause;
use crate::catalog::objects::Objects;
use crate::catalog::quote::{identifier, literal, qualified};
use crate::catalog::{Oid, PINNED_SETTINGS};
use crate::reconcile::schema::{Statement, statements};
use crate::sql::{self, Class, DdlKind};

const SWITCH_CAPTURE_ON: &str = "\
SELECT pgtandem.switch_on(s.rel) FROM pgtandem.shape s
 WHERE NOT s.capturing
   AND s.rel = ANY (ARRAY(SELECT pg_catalog.to_regclass($1)::oid
                    UNION SELECT p.relid::oid FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1)) p))";

/// The record as `pgtandem.watermark.outside` keeps it.
pub(super) fn record_text(record: &DdlRecord) -> String {
    serde_json::json!({
        "statement": record.statement,
        "user": record.user,
        "role": record.role,
        "settings": record.settings,
    })
    .to_string()
}

impl Session {
    /// Inside the round's transaction.
    pub(super) async fn run_ddl(&mut self, record: &DdlRecord) -> Result<(), ApplyError> {
        match &record.objects {
            Some(objects) => self.bring_objects_in_line(record, objects).await?,
            None => self.run_statement_of(record).await?,
        }
        let restored = PINNED_SETTINGS.replace("SET ", "SET LOCAL ");
        self.secondary
            .batch_execute(&format!("{restored} SET LOCAL session_replication_role = replica"))
            .await
            .map_err(doing("restore the applier's settings"))?;

        for table in &record.created {
            self.table_created(table).await?;
        }
        for table in &record.changed {
            self.table_changed(table).await?;
        }
        self.secondary
            .batch_execute(
                "DELETE FROM pgtandem.seeding s
                  WHERE s.local IS NOT NULL AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = s.local)",
            )
            .await
            .map_err(doing("forget dropped tables"))?;
        self.sequences.forget();
        self.tables_stale = true;
        Ok(())
    }

    async fn run_statement_of(&self, record: &DdlRecord) -> Result<(), ApplyError> {
        let secondary = &self.secondary;
        let settings: Vec<String> = record
            .settings
            .iter()
            .map(|(name, value)| format!("SELECT set_config({}, {}, true)", literal(name), literal(value)))
            .collect();
        secondary
            .batch_execute(&format!(
                "SET LOCAL session_replication_role = origin; {}",
                settings.join("; ")
            ))
            .await
            .map_err(doing("take over the settings of a DDL statement"))?;
        let check_bodies = record
            .settings
            .get("check_function_bodies")
            .map_or("on", String::as_str);
        let statement = as_detached_here(secondary, &record.statement)
            .await
            .map_err(doing("look for a partition that is being detached"))?;
        self.run_for(&record.role, &tolerant(&statement), check_bodies)
            .await
            .map_err(doing("run a DDL statement on the secondary"))
    }

    /// Runs a statement with a role's privileges.
    pub(super) async fn run_for(
        &self,
        role: &str,
        statement: &str,
        check_bodies: &str,
    ) -> Result<(), tokio_postgres::Error> {
        self.route_tables_of(statement).await?;
        if role == self.own_role {
            self.secondary.execute(statement, &[]).await?;
        } else {
            run_as(&self.secondary, role, statement, check_bodies).await?;
        }
        self.switch_capture_on_of(statement).await
    }

    /// Capture stands here as well, and ALTER TABLE … DISABLE TRIGGER ALL is not about it.
    async fn switch_capture_on_of(&self, statement: &str) -> Result<(), tokio_postgres::Error> {
        let script = sql::analyze(statement.as_bytes());
        let Some(Class::Ddl(ddl)) = script.single().map(|statement| &statement.class) else {
            return Ok(());
        };
        if ddl.tag == "ALTER TABLE" {
            for table in &ddl.concerns {
                self.secondary.execute(SWITCH_CAPTURE_ON, &[&table.quoted()]).await?;
            }
        }
        Ok(())
    }

    /// Capture stands here as well, and must not hinder a table from becoming a partition.
    async fn route_tables_of(&self, statement: &str) -> Result<(), tokio_postgres::Error> {
        let script = sql::analyze(statement.as_bytes());
        let Some(Class::Ddl(ddl)) = script.single().map(|statement| &statement.class) else {
            return Ok(());
        };
        for table in &ddl.routes {
            self.secondary
                .execute("SELECT pgtandem.route(to_regclass($1))", &[&table.quoted()])
                .await?;
        }
        Ok(())
    }

    /// DDL inside something else: what it dropped and renamed is done here, and the objects that it
    /// concerned are made as the record has them. Its place among the changes is exact, so nothing
    /// else differs here.
    async fn bring_objects_in_line(&self, record: &DdlRecord, objects: &[[String; 6]]) -> Result<(), ApplyError> {
        self.secondary
            .batch_execute("SET LOCAL session_replication_role = origin; SET LOCAL check_function_bodies = off")
            .await
            .map_err(doing("begin to bring definitions in line"))?;
        let first = record.first.iter().map(|(role, sql)| Statement {
            role: role.clone(),
            sql: sql.clone(),
            apart: false,
        });
        for statement in first {
            self.run_statement(&statement)
                .await
                .map_err(doing("drop or refresh what was on the primary"))?;
        }
        for table in &record.changed {
            self.rename(table).await?;
            // A cast that the primary did by an expression need not go well here.
            if table.filled {
                self.empty(table.rel).await?;
            }
        }
        let primary = Objects::from_rows(record.major, objects.iter().cloned());
        let scope: BTreeSet<String> = primary.by_key.values().map(|object| object.root.clone()).collect();
        let secondary = Objects::read_installed(&self.secondary)
            .await
            .map_err(doing("read the secondary's definitions"))?;
        let script = statements(&primary, &secondary, Some(&scope));
        for statement in &script.statements {
            self.run_statement(statement)
                .await
                .map_err(doing("bring definitions in line"))?;
        }
        if !script.left.is_empty() {
            return Err(ApplyError::Refused(script.left.join("; ")));
        }
        Ok(())
    }

    /// A table and its columns keep their rows under other names.
    async fn rename(&self, table: &TableRecord) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt(
                "SELECT n.nspname::text, c.relname::text FROM pgtandem.seeding s JOIN pg_class c ON c.oid = s.local
                   JOIN pg_namespace n ON n.oid = c.relnamespace WHERE s.rel = $1",
                &[&table.rel],
            )
            .await
            .map_err(doing("look for a renamed table"))?;
        let Some(row) = row else { return Ok(()) };
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        let mut sql = Vec::new();
        if schema != table.schema {
            let target = identifier(&table.schema);
            sql.push(format!("ALTER TABLE {} SET SCHEMA {target}", qualified(&schema, &name)));
        }
        if name != table.name {
            let target = identifier(&table.name);
            sql.push(format!(
                "ALTER TABLE {} RENAME TO {target}",
                qualified(&table.schema, &name)
            ));
        }
        let target = qualified(&table.schema, &table.name);
        sql.extend(table.renamed.iter().map(|(old, new)| {
            let (old, new) = (identifier(old), identifier(new));
            format!("ALTER TABLE {target} RENAME COLUMN {old} TO {new}")
        }));
        self.secondary
            .batch_execute(&sql.join("; "))
            .await
            .map_err(doing("rename a table or its columns"))
    }

    /// A table that the proxy saw being created is equal from its first row. Where it is not
    /// new here (IF NOT EXISTS), it needs seeding unless it is empty; where the DDL computed
    /// rows, a clear and those rows follow in the journal.
    async fn table_created(&self, table: &TableRecord) -> Result<(), ApplyError> {
        let local = self.local_table(table).await?;
        let state = match local {
            None => "unseeded",
            Some(_) => {
                let has_rows = self
                    .secondary
                    .query_one(
                        &format!(
                            "SELECT EXISTS (SELECT FROM ONLY {})",
                            qualified(&table.schema, &table.name)
                        ),
                        &[],
                    )
                    .await
                    .map_err(doing("look into a new table"))?
                    .get::<_, bool>(0);
                if has_rows { "unseeded" } else { "synced" }
            }
        };
        let paused = local.is_none().then_some("the secondary has no such table");
        self.record_table(table, local, state, paused).await?;
        if let Some(local) = local {
            self.capture_here(local).await?;
        }
        Ok(())
    }

    async fn table_changed(&self, table: &TableRecord) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt("SELECT local FROM pgtandem.seeding WHERE rel = $1", &[&table.rel])
            .await
            .map_err(doing("read pgtandem.seeding"))?;
        let Some(local) = row.and_then(|row| row.get::<_, Option<Oid>>(0)) else {
            return Ok(());
        };
        self.secondary
            .execute(
                "UPDATE pgtandem.seeding SET schema = $2, name = $3, columns = $4, shape = $5, filenode = $6, attributes = $7 WHERE rel = $1",
                &[
                    &table.rel,
                    &table.schema,
                    &table.name,
                    &table.columns,
                    &table.shape,
                    &table.filenode,
                    &table.attributes,
                ],
            )
            .await
            .map_err(doing("record a changed table"))?;
        let here = self
            .secondary
            .query_opt(
                "SELECT columns, pgtandem.name_of(rel) FROM pgtandem.shape WHERE rel = $1",
                &[&local],
            )
            .await
            .map_err(doing("read a changed table's definition"))?;
        let Some(here) = here else { return Ok(()) };
        if !super::tables::same_columns(here.get(0), &table.columns) {
            return record_pause(&self.secondary, table.rel, "the two sides' columns differ after DDL").await;
        }
        let target: String = here.get(1);
        for computed in &table.computed {
            self.copy_computed(local, &target, &computed.column, &computed.value)
                .await?;
        }
        self.capture_here(local).await
    }

    /// A column added with a default that is not constant (now()) got one value for all rows
    /// that existed; here it was computed a second time.
    async fn copy_computed(&self, local: Oid, target: &str, column: &str, value: &str) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt(
                "SELECT format_type(a.atttypid, a.atttypmod), a.attmissingval::text IS NOT DISTINCT FROM $3
                   FROM pg_attribute a WHERE a.attrelid = $1 AND a.attname = $2 AND NOT a.attisdropped",
                &[&local, &column, &value],
            )
            .await
            .map_err(doing("compare a column's value for existing rows"))?;
        let Some(row) = row else { return Ok(()) };
        if row.get::<_, bool>(1) {
            return Ok(());
        }
        let type_name: String = row.get(0);
        self.secondary
            .batch_execute(&format!(
                "UPDATE ONLY {target} SET {} = (({}::{type_name}[])[1])",
                identifier(column),
                literal(value)
            ))
            .await
            .map_err(doing("copy a column's value for existing rows"))
    }

    async fn local_table(&self, table: &TableRecord) -> Result<Option<Oid>, ApplyError> {
        let row = self
            .secondary
            .query_opt(
                "SELECT rel FROM pgtandem.shape WHERE schema = $1 AND name = $2",
                &[&table.schema, &table.name],
            )
            .await
            .map_err(doing("look for a new table"))?;
        Ok(row.map(|row| row.get(0)))
    }

    pub(super) async fn record_table(
        &self,
        table: &TableRecord,
        local: Option<Oid>,
        state: &str,
        paused: Option<&str>,
    ) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "INSERT INTO pgtandem.seeding (rel, local, schema, name, state, paused, columns, shape, filenode, attributes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
                 ON CONFLICT (rel) DO UPDATE SET local = EXCLUDED.local, schema = EXCLUDED.schema, name = EXCLUDED.name,
                     state = EXCLUDED.state, paused = EXCLUDED.paused, note = NULL, columns = EXCLUDED.columns,
                     shape = EXCLUDED.shape, filenode = EXCLUDED.filenode, attributes = EXCLUDED.attributes",
                &[
                    &table.rel,
                    &local,
                    &table.schema,
                    &table.name,
                    &state,
                    &paused,
                    &table.columns,
                    &table.shape,
                    &table.filenode,
                    &table.attributes,
                ],
            )
            .await
            .map_err(doing("record a new table"))?;
        Ok(())
    }

    async fn capture_here(&self, local: Oid) -> Result<(), ApplyError> {
        self.secondary
            .execute("SELECT pgtandem.capture($1)", &[&local])
            .await
            .map_err(doing("arm capture on the secondary"))?;
        Ok(())
    }

    /// Outside any transaction. The watermark says what was begun, so that after a crash in the
    /// middle it is run again: what it had already done is then no error. What is refused for good
    /// goes into quarantine.
    pub(super) async fn run_outside(&mut self, record: &DdlRecord) -> Result<(), ApplyError> {
        if let Err(error) = self.execute_outside(record).await {
            let refusal = self.refusal_of(error)?;
            return self.hold_outside(record, refusal).await;
        }
        self.secondary
            .batch_execute(&format!(
                "UPDATE pgtandem.watermark SET outside = NULL WHERE epoch = {} AND round = {}",
                self.config.epoch, self.round
            ))
            .await
            .map_err(doing("record a finished DDL statement"))?;
        self.outside = None;
        self.sequences.forget();
        self.reload_tables().await?;
        Ok(())
    }

    pub(super) async fn execute_outside(&mut self, record: &DdlRecord) -> Result<(), ApplyError> {
        let secondary = &self.secondary;
        let settings: Vec<String> = record
            .settings
            .iter()
            .map(|(name, value)| format!("SELECT set_config({}, {}, false)", literal(name), literal(value)))
            .collect();
        let becoming = if record.role == self.own_role {
            String::new()
        } else {
            format!("SET ROLE {};", identifier(&record.role))
        };
        if !may_run_outside(&record.statement) {
            return Err(ApplyError::Refused(format!(
                "not a statement that runs outside transactions: {}",
                record.statement
            )));
        }
        drop_invalid_index(secondary, &record.statement).await?;
        secondary
            .batch_execute(&format!(
                "SET session_replication_role = origin; {}",
                settings.join("; ")
            ))
            .await
            .map_err(doing("take over the settings of a DDL statement"))?;
        // The extended protocol takes one statement only: nothing can follow it under our role.
        let result = run_outside_as(secondary, &becoming, &record.statement).await;
        secondary
            .batch_execute(&format!(
                "SET ROLE NONE; {PINNED_SETTINGS} SET session_replication_role = replica"
            ))
            .await
            .map_err(doing("restore the applier's settings"))?;
        match result {
            Ok(_) => {}
            // 42P04, 42P06, 42P07, 42710: already there; 42P01, 42704, 3D000: already gone.
            Err(error)
                if error.code().is_some_and(|code| {
                    ["42P04", "42P06", "42P07", "42710", "42P01", "42704", "3D000"].contains(&code.code())
                }) =>
            {
                tracing::info!(
                    statement = record.statement,
                    error = crate::upstream::control::error_chain(&error),
                    "a DDL statement outside transactions had already been done on the secondary"
                );
            }
            Err(error) => return Err(doing("run a DDL statement outside transactions")(error)),
        }
        Ok(())
    }
}

/// Runs a statement with a role's privileges and no more. SET ROLE alone would not do: the
/// statement could itself be a RESET ROLE, or a DO block with one inside. A function that
/// belongs to the role and is SECURITY DEFINER forbids it. In language SQL, because PL/pgSQL's
/// EXECUTE does not know SELECT INTO.
async fn run_as(
    secondary: &Client,
    role: &str,
    statement: &str,
    check_bodies: &str,
) -> Result<(), tokio_postgres::Error> {
    let role = identifier(role);
    secondary
        .batch_execute(&format!(
            "GRANT USAGE, CREATE ON SCHEMA pgtandem TO {role};
             SET LOCAL check_function_bodies = off;
             CREATE FUNCTION pgtandem.run_as() RETURNS void LANGUAGE sql SECURITY DEFINER AS {};
             SET LOCAL check_function_bodies = {};
             ALTER FUNCTION pgtandem.run_as() OWNER TO {role};
             REVOKE USAGE, CREATE ON SCHEMA pgtandem FROM {role}",
            literal(statement),
            literal(check_bodies)
        ))
        .await?;
    secondary.batch_execute("SELECT pgtandem.run_as()").await?;
    secondary.batch_execute("DROP FUNCTION pgtandem.run_as()").await
}

/// A concurrent build that failed has left an invalid index on the primary, and none here. What
/// drops or alters it there has succeeded, so its absence here is no error.
fn tolerant(statement: &str) -> Cow<'_, str> {
    match sql::place_for_if_exists(statement.as_bytes()) {
        Some(at) => Cow::Owned(format!("{} IF EXISTS {}", &statement[..at], &statement[at..])),
        None => Cow::Borrowed(statement),
    }
}

async fn run_outside_as(secondary: &Client, becoming: &str, statement: &str) -> Result<u64, tokio_postgres::Error> {
    secondary.batch_execute(becoming).await?;
    let statement = as_detached_here(secondary, statement).await?;
    secondary.execute(&*statement, &[]).await
}

/// A concurrent DETACH that was cut short has left its partition half detached on one side only:
/// on the primary, where FINALIZE then completes what was never begun here; or here, by a crash of
/// the applier. The statement's search path is set.
async fn as_detached_here<'a>(secondary: &Client, statement: &'a str) -> Result<Cow<'a, str>, tokio_postgres::Error> {
    let Some(detach) = sql::detach(statement.as_bytes()) else {
        return Ok(Cow::Borrowed(statement));
    };
    // Servers before 14 have no such column.
    let half_detached: bool = secondary
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits i
                             WHERE i.inhrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1)
                               AND pg_catalog.to_jsonb(i) OPERATOR(pg_catalog.->>) 'inhdetachpending' OPERATOR(pg_catalog.=) 'true')",
            &[&detach.partition.quoted()],
        )
        .await?
        .get(0);
    let word = match (detach.finalizes, half_detached) {
        (true, false) => "",
        (false, true) => "FINALIZE",
        _ => return Ok(Cow::Borrowed(statement)),
    };
    let (before, after) = (&statement[..detach.word.start], &statement[detach.word.end..]);
    Ok(Cow::Owned(format!("{before}{word}{after}")))
}

/// Outside a transaction there is no function around the statement to keep it in its role, so
/// only what runs no code of its writer's is let through. The record may be forged.
fn may_run_outside(statement: &str) -> bool {
    let script = sql::analyze(statement.as_bytes());
    match script.single().map(|statement| &statement.class) {
        Some(Class::Ddl(ddl)) => ddl.kind == DdlKind::Outside || ddl.tag == "REINDEX" || is_database(&ddl.tag),
        _ => false,
    }
}

fn is_database(tag: &str) -> bool {
    ["CREATE DATABASE", "DROP DATABASE", "ALTER DATABASE"].contains(&tag)
}

/// A concurrent index build that was cut short leaves an invalid index of the same name.
async fn drop_invalid_index(secondary: &Client, statement: &str) -> Result<(), ApplyError> {
    let upper = statement.to_ascii_uppercase();
    if !(upper.contains("CREATE") && upper.contains("INDEX") && upper.contains("CONCURRENTLY")) {
        return Ok(());
    }
    let rows = secondary
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
               JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE NOT i.indisvalid AND position(c.relname::text IN $1) > 0",
            &[&statement],
        )
        .await
        .map_err(doing("look for an unfinished index"))?;
    for row in &rows {
        secondary
            .batch_execute(&format!(
                "DROP INDEX CONCURRENTLY IF EXISTS {}",
                qualified(row.get(0), row.get(1))
            ))
            .await
            .map_err(doing("drop an unfinished index"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_is_not_here_is_no_error() {
        for (statement, expected) in [
            ("drop index a_u", "drop index  IF EXISTS a_u"),
            ("DROP INDEX IF EXISTS a_u", "DROP INDEX IF EXISTS a_u"),
            (
                "/* x */ alter index a rename to b",
                "/* x */ alter index  IF EXISTS a rename to b",
            ),
            ("drop table a", "drop table a"),
            (
                "alter index all in tablespace x set tablespace y",
                "alter index all in tablespace x set tablespace y",
            ),
            (
                "alter index s.\"P\" attach partition a",
                "alter index s.\"P\" attach partition a",
            ),
            (
                "alter index a no depends on extension x",
                "alter index a no depends on extension x",
            ),
            (
                "alter index a depends on extension x",
                "alter index a depends on extension x",
            ),
            (
                "alter index attach rename to no",
                "alter index  IF EXISTS attach rename to no",
            ),
        ] {
            assert_eq!(tolerant(statement), expected);
        }
    }

    #[test]
    fn what_may_run_outside_a_transaction() {
        for (statement, allowed) in [
            ("CREATE INDEX CONCURRENTLY i ON t (a)", true),
            ("  /* x */ -- y\n create unique index concurrently i on t (a)", true),
            ("DROP INDEX CONCURRENTLY i", true),
            ("REINDEX TABLE CONCURRENTLY t", true),
            ("REINDEX (CONCURRENTLY) TABLE t", true),
            ("CREATE DATABASE d", true),
            ("ALTER TABLE p DETACH PARTITION q CONCURRENTLY", true),
            ("alter table s.\"P p\" detach partition \"P 1\" concurrently", true),
            (
                "ALTER TABLE p ALTER a TYPE text USING f(a) -- DETACH PARTITION q CONCURRENTLY",
                false,
            ),
            ("CREATE INDEX i ON t (a)", false),
            ("DO $$ BEGIN RESET ROLE; END $$", false),
            ("RESET ROLE", false),
            ("CREATE TABLE x AS SELECT f()", false),
            ("", false),
        ] {
            assert_eq!(may_run_outside(statement), allowed, "{statement}");
        }
    }
}
