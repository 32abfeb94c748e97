//! `pgtandem schema copy|diff|heal`

use std::collections::BTreeMap;

use anyhow::Context;
use clap::Subcommand;
use serde::Serialize;

use super::quarantine::actor;
use super::{Common, Output, client, load, print_json, say};
use crate::admin::api::{HealAnswer, HealRequest};
use crate::admin::client::{AdminClient, AdminError};
use crate::catalog::PINNED_SETTINGS;
use crate::catalog::definitions::{DefinitionDifference, definitions_different};
use crate::catalog::objects::Objects;
use crate::check::primary_of;
use crate::config::{Config, EVERY_OTHER_DATABASE, Target};
use crate::control::Side;
use crate::reconcile::copy;
use crate::reconcile::schema::{Script, statements};
use crate::transform::hidden::Hidden;
use crate::upstream::control::connect;

#[derive(Subcommand)]
pub(super) enum Action {
    /// Bring legacy's definitions to an empty new side, with pg_dump and psql; the proxy need not
    /// run. Without --before-rows all at once. Exit 1 when something is left.
    Copy {
        #[command(flatten)]
        common: Common,
        /// Only this one.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
        /// Only what rows need: tables, types, functions, views, keys. `pgtandem backfill` builds
        /// indexes, constraints and triggers as each table's rows are in.
        #[arg(long)]
        before_rows: bool,
        /// Build what --before-rows has left, of tables whose rows are in.
        #[arg(long, conflicts_with_all = ["before_rows", "dry_run"])]
        after_rows: bool,
        /// Print the statements and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Compare the definitions of both sides; the proxy need not run. Exit 1 where they differ.
    Diff {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// Only this one.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
        /// Print the statements that bring the secondary in line with the primary.
        #[arg(long, conflicts_with = "json")]
        sql: bool,
    },
    /// Have the running proxy bring the secondary in line with the primary, after DDL that it did
    /// not see: definitions first, then the rows of the tables concerned. Exit 1 when something
    /// is left.
    Heal {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// Only this one.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
        /// Only these tables (or views, functions, … by their names with the schema).
        #[arg(long, value_name = "NAME")]
        table: Vec<String>,
        /// Show what would be run and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

pub(super) async fn run(action: Action) -> anyhow::Result<bool> {
    match action {
        Action::Copy {
            common,
            database,
            before_rows,
            after_rows,
            dry_run,
        } => {
            let config = load(&common)?;
            let mut all = true;
            for (name, [legacy, new]) in pairs(&config, database.as_deref()).await? {
                if !after_rows {
                    let plan = copy::Plan::make(&legacy, &new, &config.transform_of(&name)).await?;
                    if dry_run {
                        say(&format!("-- database {name}\n{}", plan.to_sql()));
                        continue;
                    }
                    plan.run_before_rows(&new).await?;
                    say(&format!(
                        "database {name}: what rows need is there; {} statements follow the rows",
                        plan.rest()
                    ));
                }
                if !before_rows {
                    all &= build_rest(&name, &legacy, &new).await?;
                }
            }
            Ok(all)
        }
        Action::Diff {
            common,
            output,
            database,
            sql,
        } => diff(&load(&common)?, output.json, database.as_deref(), sql).await,
        Action::Heal {
            common,
            output,
            database,
            table,
            dry_run,
        } => {
            let request = HealRequest {
                database,
                tables: table,
                dry_run,
                actor: Some(actor()),
            };
            heal(&client(&common)?, output.json, request).await
        }
    }
}

/// True where nothing is left.
async fn build_rest(database: &str, legacy: &Target, new: &Target) -> anyhow::Result<bool> {
    let (legacy, mut client) = tokio::try_join!(connect(legacy, "schema copy"), connect(new, "schema copy"))?;
    let mirrored = "SELECT pg_catalog.to_regclass('pgtandem.side') IS NOT NULL";
    let mirrored = legacy
        .query_one(mirrored, &[])
        .await
        .context("look whether legacy is mirrored")?
        .get(0);
    let built = copy::rest::build(&mut client, None, mirrored)
        .await
        .context("build what follows the rows")?;
    say(&format!(
        "database {database}: {} statements that follow the rows were run, {} wait for rows",
        built.built, built.waiting
    ));
    for (name, why) in &built.failed {
        say(&format!("  refused: {name}: {why}"));
    }
    Ok(built.failed.is_empty() && built.waiting == 0)
}

/// What one database's two sides define otherwise.
#[derive(Serialize)]
struct Diff {
    database: String,
    primary: Side,
    /// `first` is the primary's definition, `second` the secondary's.
    differences: Vec<DefinitionDifference>,
    statements: Vec<String>,
    /// What no statement can do.
    left: Vec<String>,
    #[serde(skip)]
    script: Script,
}

async fn diff(config: &Config, json: bool, only: Option<&str>, sql: bool) -> anyhow::Result<bool> {
    let mut diffs = Vec::new();
    for (name, targets) in pairs(config, only).await? {
        diffs.push(compare(config, name, &targets).await?);
    }
    if json {
        print_json(&diffs)?;
    } else {
        for diff in &diffs {
            if sql {
                say(&format!("-- database {}\n{}", diff.database, diff.script.to_sql()));
            } else {
                print(diff);
            }
        }
    }
    Ok(diffs.iter().all(|diff| diff.differences.is_empty()))
}

/// The databases with both their targets, legacy first.
pub(super) async fn pairs(config: &Config, only: Option<&str>) -> anyhow::Result<BTreeMap<String, [Target; 2]>> {
    let mut pairs = BTreeMap::new();
    for (name, database) in &config.databases {
        let targets = [database.legacy.clone(), database.new.clone()];
        if name != EVERY_OTHER_DATABASE {
            pairs.insert(name.clone(), targets);
            continue;
        }
        let listed = crate::catalog::databases(&database.legacy)
            .await
            .map_err(anyhow::Error::msg)?;
        for found in listed.into_iter().filter(|found| !config.databases.contains_key(found)) {
            let named = targets.clone().map(|target| target.with_dbname(&found));
            pairs.insert(found, named);
        }
    }
    if let Some(only) = only {
        pairs.retain(|name, _| name == only);
        anyhow::ensure!(!pairs.is_empty(), "no database is called {only}");
    }
    Ok(pairs)
}

async fn compare(config: &Config, database: String, [legacy, new]: &[Target; 2]) -> anyhow::Result<Diff> {
    let legacy = connect(legacy, "schema diff").await?;
    let new = connect(new, "schema diff").await?;
    let primary = primary_of(config, &legacy, &new).await?;
    let (first, second) = match primary {
        Side::Legacy => (&legacy, &new),
        Side::New => (&new, &legacy),
    };
    for client in [first, second] {
        // To compile such queries would take far longer than to run them.
        client
            .batch_execute(&format!("{PINNED_SETTINGS} SET jit = off"))
            .await?;
    }
    let mut differences = definitions_different(first, second)
        .await
        .context("compare definitions")?;
    differences.retain(|found| !found.is_about_order());
    let (mut here, mut there) =
        tokio::try_join!(Objects::read(first), Objects::read(second)).context("read definitions")?;
    let hidden = Hidden::read(&config.transform_of(&database), &legacy, &new).await?;
    hidden.leave_out_of(&mut differences);
    hidden.leave_out_of_objects(&mut here);
    hidden.leave_out_of_objects(&mut there);
    let script = statements(&here, &there, None);
    Ok(Diff {
        database,
        primary,
        statements: script
            .statements
            .iter()
            .map(|statement| statement.sql.clone())
            .collect(),
        left: script.left.clone(),
        differences,
        script,
    })
}

fn print(diff: &Diff) {
    let Diff {
        database,
        differences,
        left,
        ..
    } = diff;
    if differences.is_empty() {
        say(&format!("database {database}: both sides define the same"));
        return;
    }
    say(&format!(
        "database {database}: {} objects are not defined alike (primary: {})",
        differences.len(),
        diff.primary
    ));
    let width = differences
        .iter()
        .map(|found| found.kind.len())
        .max()
        .unwrap_or_default();
    for found in differences {
        let what = match (&found.first, &found.second) {
            (Some(_), None) => "only on the primary".to_owned(),
            (None, _) => "only on the secondary".to_owned(),
            (Some(here), Some(there)) => format!(
                "primary: {}\n{:width$}  secondary: {}",
                one_line(here),
                "",
                one_line(there)
            ),
        };
        say(&format!("{:width$}  {}  {what}", found.kind, found.name));
    }
    for why in left {
        say(&format!("no statement can do this: {why}"));
    }
    say("`pgtandem schema heal` brings the secondary in line; `pgtandem schema diff --sql` prints the statements");
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

async fn heal(client: &AdminClient, json: bool, request: HealRequest) -> anyhow::Result<bool> {
    let answer: HealAnswer = match client.post("/api/v1/schema/heal", &request).await {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("not healed: {why}");
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    if json {
        print_json(&answer)?;
        return Ok(answer.done);
    }
    for (database, healed) in &answer.databases {
        let verb = if request.dry_run { "to run" } else { "run" };
        say(&format!(
            "database {database}: {} statements {verb}",
            healed.statements.len()
        ));
        for statement in &healed.statements {
            say(&format!("  {statement};"));
        }
        for table in &healed.tables {
            say(&format!("  rows sent once more: {table}"));
        }
        for table in &healed.to_seed {
            say(&format!("  too large for that, needs seeding: {table}"));
        }
        for why in &healed.left {
            say(&format!("  left: {why}"));
        }
    }
    Ok(answer.done)
}
