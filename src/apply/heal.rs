//! After DDL that nobody saw: the secondary's definitions are brought in line with the primary's
//! by an operator's order, and the rows of the tables concerned are sent once more.
//!
//! Done between two rounds. The primary's definitions are read in one snapshot, in which no DDL
//! waits in the journal: what was recorded is applied, and what will be finds what it expects. The
//! tables concerned are paused in the same transaction as the statements, and go on as every
//! paused table does: what came before their rows are journaled anew is void.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::refill::{RESUMED, TOO_LARGE};
use super::seeding::CatalogWatch;
use super::session::Session;
use super::status::Seeding;
use super::tables::record_pause;
use super::{ApplyError, doing};
use crate::catalog::definitions::definitions_different;
use crate::catalog::objects::Objects;
use crate::control::Side;
use crate::journal::read::window_sql;
use crate::reconcile::schema::{Script, Statement, statements};
use crate::transform::hidden::Hidden;
use crate::upstream::control::error_chain;

/// Tries until nothing recorded waits any more, or the rows stand in nobody's way.
const ATTEMPTS: u32 = 20;

/// Tries to get the locks under which tables are captured and their rows journaled.
const LOCK_ATTEMPTS: u32 = 100;

/// The applier's sessions search by index only; that is not how large catalogs are read.
const PLAN_FREELY: &str = "SET enable_seqscan = on; SET enable_hashjoin = on; SET enable_mergejoin = on";
const PLAN_BY_INDEX: &str = "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off";

const REASON: &str = "its definition is brought in line";

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HealOrder {
    /// Tables and other objects, with or without their schema; empty: all.
    pub only: Vec<String>,
    pub dry_run: bool,
    /// Who asks, for the record.
    pub actor: Option<String>,
}

/// What was done, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Healed {
    pub statements: Vec<String>,
    /// Tables whose rows were sent once more.
    pub tables: Vec<String>,
    /// Tables too large for that.
    pub to_seed: Vec<String>,
    /// What still differs, and why.
    pub left: Vec<String>,
}

impl Session {
    /// The inner error is the operator's: nothing was changed. The outer one ends the session.
    pub(super) async fn heal(
        &mut self,
        order: &HealOrder,
        watch: &mut CatalogWatch,
    ) -> Result<Result<Healed, String>, ApplyError> {
        let mut refused = String::new();
        for attempt in 0..ATTEMPTS {
            let Some(mut primary) = self.settled_definitions().await? else {
                self.round(false).await?;
                continue;
            };
            let mut secondary = Objects::read_installed(&self.secondary)
                .await
                .map_err(doing("read the secondary's definitions"))?;
            let hidden = self.hidden().await?;
            hidden.leave_out_of_objects(&mut primary);
            hidden.leave_out_of_objects(&mut secondary);
            let scope = match scope(&order.only, &primary, &secondary) {
                Ok(scope) => scope,
                Err(why) => return Ok(Err(why)),
            };
            let script = statements(&primary, &secondary, scope.as_ref());
            let mut healed = Healed {
                statements: script
                    .statements
                    .iter()
                    .map(|statement| statement.sql.clone())
                    .collect(),
                left: script.left.clone(),
                ..Healed::default()
            };
            if order.dry_run {
                healed.tables = script.tables.into_iter().collect();
                return Ok(Ok(healed));
            }
            match self.run_script(&script, attempt > 0, order.actor.as_deref()).await? {
                Ok(()) => {
                    self.send_rows(&script, watch, &mut healed).await?;
                    if scope.is_none() {
                        healed.left.extend(self.still_different().await?);
                    }
                    return Ok(Ok(healed));
                }
                Err(why) if attempt > 2 => return Ok(Err(why)),
                // Rows that came or went meanwhile may have stood in the way.
                Err(why) => {
                    refused = why;
                    self.round(false).await?;
                }
            }
        }
        Ok(Err(if refused.is_empty() {
            "DDL keeps coming through the proxy; try again".into()
        } else {
            refused
        }))
    }

    /// The primary's definitions, unless DDL that changed them waits to be applied.
    async fn settled_definitions(&self) -> Result<Option<Objects>, ApplyError> {
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        self.aside
            .batch_execute(begin)
            .await
            .map_err(doing("read the primary's definitions"))?;
        let waits = self.ddl_waits().await?;
        let objects = Objects::read_installed(&self.aside)
            .await
            .map_err(doing("read the primary's definitions"))?;
        self.aside
            .batch_execute("COMMIT")
            .await
            .map_err(doing("read the primary's definitions"))?;
        Ok((!waits).then_some(objects))
    }

    /// Whether the journal holds DDL that is not applied.
    pub(super) async fn ddl_waits(&self) -> Result<bool, ApplyError> {
        let row = self.aside.query_one(&self.ddl_waits_sql(), &[]).await;
        let waits: bool = row.map_err(doing("look for DDL in the journal"))?.get(0);
        Ok(waits || self.target.is_some())
    }

    pub(super) fn ddl_waits_sql(&self) -> String {
        format!(
            "SELECT EXISTS (SELECT FROM {} c WHERE c.op IN ('S', 'O'))",
            window_sql(&self.since, None)
        )
    }

    /// The statements in one transaction, with the tables concerned paused. `emptied`: without the
    /// rows of those tables, which are sent once more anyway.
    async fn run_script(
        &mut self,
        script: &Script,
        emptied: bool,
        actor: Option<&str>,
    ) -> Result<Result<(), String>, ApplyError> {
        let concerned = self.mirrored_of(script).await?;
        if script.statements.is_empty() {
            return Ok(Ok(()));
        }
        for statement in script.statements.iter().filter(|statement| statement.apart) {
            if let Err(error) = self.run_alone(statement).await? {
                return Ok(Err(error));
            }
        }
        self.secondary
            .batch_execute("BEGIN; SET LOCAL check_function_bodies = off")
            .await
            .map_err(doing("begin to bring definitions in line"))?;
        for (rel, _) in &concerned {
            record_pause(&self.secondary, *rel, REASON).await?;
            if emptied && !self.is_too_large(*rel).await? {
                self.empty(*rel).await?;
            }
        }
        self.secondary
            .batch_execute("SET LOCAL session_replication_role = origin")
            .await
            .map_err(doing("begin to bring definitions in line"))?;
        for statement in script.statements.iter().filter(|statement| !statement.apart) {
            if let Err(error) = self.run_statement(statement).await {
                if self.secondary.is_closed() {
                    return Err(doing("bring definitions in line")(error));
                }
                self.roll_back().await?;
                return Ok(Err(format!("{}: {}", statement.sql, error_chain(&error))));
            }
        }
        self.secondary
            .batch_execute("COMMIT")
            .await
            .map_err(doing("bring definitions in line"))?;
        tracing::warn!(
            statements = script.statements.len(),
            tables = concerned.len(),
            actor,
            "the secondary's definitions were brought in line with the primary's"
        );
        Ok(Ok(()))
    }

    async fn run_alone(&self, statement: &Statement) -> Result<Result<(), String>, ApplyError> {
        self.secondary
            .batch_execute("BEGIN; SET LOCAL session_replication_role = origin")
            .await
            .map_err(doing("begin to bring definitions in line"))?;
        let result = self.run_statement(statement).await;
        let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
        self.secondary
            .batch_execute(end)
            .await
            .map_err(doing("bring definitions in line"))?;
        Ok(result.map_err(|error| format!("{}: {}", statement.sql, error_chain(&error))))
    }

    /// As its object's owner, as whom its defaults and casts may run code.
    pub(super) async fn run_statement(&self, statement: &Statement) -> Result<(), tokio_postgres::Error> {
        let role = statement.role.as_deref().unwrap_or(&self.own_role);
        self.run_for(role, &statement.sql, "off").await
    }

    /// The script's tables that are mirrored already: the primary's OID and the name here.
    async fn mirrored_of(&self, script: &Script) -> Result<Vec<(u32, String)>, ApplyError> {
        let names: Vec<&String> = script.tables.iter().collect();
        let rows = self
            .secondary
            .query(
                "SELECT s.rel, pgtandem.name_of(c.oid) FROM pgtandem.seeding s JOIN pg_class c ON c.oid = s.local
                  WHERE pgtandem.name_of(c.oid) = ANY ($1)",
                &[&names],
            )
            .await
            .map_err(doing("look for the tables concerned"))?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Deletes a table's rows, which are sent once more; unless row security hides them.
    pub(super) async fn empty(&self, rel: u32) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt(
                "SELECT pgtandem.name_of(c.oid) FROM pgtandem.seeding s JOIN pg_class c ON c.oid = s.local
                  WHERE s.rel = $1 AND NOT c.relforcerowsecurity",
                &[&rel],
            )
            .await
            .map_err(doing("look at a table's row security"))?;
        let Some(target) = row.map(|row| row.get::<_, String>(0)) else {
            return Ok(());
        };
        let delete = format!(
            "SET LOCAL session_replication_role = replica; DELETE FROM ONLY {target}; SET LOCAL session_replication_role = origin"
        );
        self.secondary
            .batch_execute(&delete)
            .await
            .map_err(doing("empty a table whose rows are sent once more"))
    }

    /// Has the tables concerned captured, taken up again, and their rows applied.
    async fn send_rows(
        &mut self,
        script: &Script,
        watch: &mut CatalogWatch,
        healed: &mut Healed,
    ) -> Result<(), ApplyError> {
        self.reload_tables().await?;
        for _ in 0..LOCK_ATTEMPTS {
            let settled = self.bring_in_step(watch).await?;
            let made = self.note_made(script).await?;
            let sent = self.refill_resumed().await?;
            self.round(false).await?;
            if settled && sent && !made {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        watch.forget();
        for (rel, name) in self.mirrored_of(script).await? {
            if let Some(table) = self.tables.get(rel) {
                let large = table.note.as_deref().is_some_and(|note| note.ends_with(TOO_LARGE));
                if table.state == Seeding::Synced {
                    healed.tables.push(name);
                } else if large {
                    healed.to_seed.push(name);
                } else {
                    let why = table.paused.as_ref().or(table.note.as_ref());
                    healed.left.push(format!(
                        "{name}: {}",
                        why.map_or("its rows are on their way", String::as_str)
                    ));
                }
            }
        }
        healed.tables.sort();
        healed.to_seed.sort();
        Ok(())
    }

    /// Tables that were made here now: their rows are sent, as after a pause. Whether there were any.
    async fn note_made(&mut self, script: &Script) -> Result<bool, ApplyError> {
        let names: Vec<&String> = script.tables.iter().collect();
        let noted = self
            .secondary
            .execute(
                "UPDATE pgtandem.seeding s SET note = $2 FROM pg_class c
                  WHERE c.oid = s.local AND pgtandem.name_of(c.oid) = ANY ($1)
                    AND s.state = 'unseeded' AND s.paused IS NULL AND s.note IS NULL",
                &[&names, &format!("{RESUMED}the secondary had no such table")],
            )
            .await
            .map_err(doing("note tables that were made"))?;
        if noted > 0 {
            self.reload_tables().await?;
        }
        Ok(noted > 0)
    }

    /// What is meant to differ.
    async fn hidden(&self) -> Result<Hidden, ApplyError> {
        let (legacy, new) = match self.config.primary.side {
            Side::Legacy => (&self.aside, &self.secondary),
            Side::New => (&self.secondary, &self.aside),
        };
        Hidden::read(&self.config.transform, legacy, new)
            .await
            .map_err(doing("look for what is meant to differ"))
    }

    async fn still_different(&self) -> Result<Vec<String>, ApplyError> {
        Ok(self.definitions_differ().await?.unwrap_or_default())
    }

    /// What is defined otherwise on the two sides though nothing waits in the journal; `None`
    /// while something does.
    pub(super) async fn definitions_differ(&self) -> Result<Option<Vec<String>>, ApplyError> {
        let hidden = self.hidden().await?;
        let differences = different(&self.aside, &self.secondary, &hidden).await?;
        // Asked afterwards: what was seen there is seen here.
        Ok((!self.ddl_waits().await?).then_some(differences))
    }
}

async fn different(primary: &Client, secondary: &Client, hidden: &Hidden) -> Result<Vec<String>, ApplyError> {
    for client in [primary, secondary] {
        client
            .batch_execute(PLAN_FREELY)
            .await
            .map_err(doing("compare definitions"))?;
    }
    let differences = definitions_different(primary, secondary).await;
    for (client, as_before) in [(primary, "SET enable_seqscan = off"), (secondary, PLAN_BY_INDEX)] {
        client
            .batch_execute(as_before)
            .await
            .map_err(doing("compare definitions"))?;
    }
    let mut differences = differences.map_err(doing("compare definitions"))?;
    hidden.leave_out_of(&mut differences);
    Ok(differences
        .iter()
        .filter(|found| !found.is_about_order())
        .map(|found| format!("{} {}", found.kind, found.name))
        .collect())
}

/// The roots that the names mean; `None`: everything.
fn scope(only: &[String], primary: &Objects, secondary: &Objects) -> Result<Option<BTreeSet<String>>, String> {
    if only.is_empty() {
        return Ok(None);
    }
    let roots: BTreeSet<&String> = [primary, secondary]
        .iter()
        .flat_map(|objects| objects.by_key.values().map(|object| &object.root))
        .collect();
    let mut scope = BTreeSet::new();
    for name in only {
        let means = |root: &str| {
            let bare = root.split('(').next().unwrap_or(root);
            [root, bare]
                .iter()
                .any(|root| root == name || root.split_once('.').is_some_and(|(_, rest)| rest == name))
        };
        let found: Vec<&String> = roots.iter().copied().filter(|root| means(root)).collect();
        if found.is_empty() {
            return Err(format!("neither side has anything called {name}"));
        }
        scope.extend(found.into_iter().cloned());
    }
    Ok(Some(scope))
}
