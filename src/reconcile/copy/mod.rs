//! `schema copy`: brings legacy's definitions to new, with pg_dump and psql.
//!
//! The dump is taken apart into its entries ([`dump`]). What rows need before they come (types,
//! tables, functions, views, keys) is run by psql in one transaction, and that transaction records
//! the rest (indexes, other constraints, triggers, …) in `pgtandem.schema_rest` on the new side.
//! [`rest`] builds it when the rows are in: all at once, or table by table as a backfill ends. So
//! after a crash nothing is half there, and nothing is done twice.

mod dump;
pub mod rest;
mod tools;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};
use tokio_postgres::Client;

use self::dump::{Dump, Entry};
use self::tools::Tools;
use crate::catalog::PINNED_SETTINGS;
use crate::catalog::objects::Objects;
use crate::catalog::quote::literal;
use crate::config::Target;
use crate::transform::Transform;
use crate::upstream::control::connect;

/// What is to be run on the new side.
pub struct Plan {
    /// By psql, in one transaction.
    before_rows: String,
    rest: Vec<Rest>,
    tools: Tools,
}

/// One statement that follows the rows.
struct Rest {
    name: String,
    sql: String,
    /// Tables, as `schema.name`, whose rows have to be in before.
    waits: BTreeSet<String>,
}

impl Plan {
    /// Reads legacy, and looks whether new can take it. Changes nothing. Transformed tables are left
    /// out: new has them in another shape, which the operator makes.
    ///
    /// # Errors
    /// Where there is no pg_dump that is new enough, roles are missing, or new has objects already.
    pub async fn make(legacy: &Target, new: &Target, transform: &Transform) -> anyhow::Result<Self> {
        let (from, to) = (
            connect(legacy, "schema copy").await?,
            connect(new, "schema copy").await?,
        );
        for client in [&from, &to] {
            client
                .batch_execute(&format!("{PINNED_SETTINGS} SET jit = off"))
                .await?;
        }
        let tools = Tools::find(version(&from).await?)?;
        nothing_is_there(&to, new).await?;
        roles_are_there(&from, &to, new).await?;
        let text = tools.dump(legacy, transform).await?;
        let mut dump = Dump::parse(&text)?;
        dump.resolve_attachments(&indexes(&from).await?);
        let keys = keys(&from).await?;
        let tables = tables_of(&from).await?;
        let (early, late) = dump.split(&keys);
        let newer_than_server = tools.major >= 17 && version(&to).await? < 17;
        Ok(Self {
            before_rows: dump.script(&early, newer_than_server),
            rest: rest_of(&late, &tables)
                .into_iter()
                .chain(refreshes(&from, &tables).await?)
                .collect(),
            tools,
        })
    }

    /// Everything as text, in its order.
    pub fn to_sql(&self) -> String {
        let mut text = format!("-- before the rows\n{}", self.before_rows);
        text.push_str("\n-- after the rows\n");
        for rest in &self.rest {
            text.push_str(&rest.sql);
            text.push('\n');
        }
        text
    }

    /// How many statements follow the rows.
    pub const fn rest(&self) -> usize {
        self.rest.len()
    }

    /// Runs the first half and records the second, in one transaction.
    pub async fn run_before_rows(&self, new: &Target) -> anyhow::Result<()> {
        let mut script = self.before_rows.clone();
        script.push_str(rest::TABLE);
        for (number, rest) in self.rest.iter().enumerate() {
            let waits: Vec<String> = rest.waits.iter().map(|name| literal(name)).collect();
            script.push_str(&format!(
                "INSERT INTO pgtandem.schema_rest (number, name, sql, waits) VALUES ({number}, {}, {}, ARRAY[{}]::pg_catalog.text[]);\n",
                literal(&rest.name),
                literal(&rest.sql),
                waits.join(", ")
            ));
        }
        self.tools.run(new, script).await
    }
}

async fn version(client: &Client) -> anyhow::Result<u32> {
    let row = client
        .query_one("SELECT current_setting('server_version_num')::int / 10000", &[])
        .await?;
    Ok(row.get::<_, i32>(0) as u32)
}

/// What every database has, or may have without being in the way.
const HARMLESS: [&str; 4] = ["schema", "extension", "grant", "comment"];

async fn nothing_is_there(new: &Client, target: &Target) -> anyhow::Result<()> {
    let objects = Objects::read(new).await.context("read the new side")?;
    let names: Vec<String> = objects
        .by_key
        .keys()
        .filter(|(kind, _)| !HARMLESS.contains(&kind.as_str()))
        .map(|(kind, name)| format!("{kind} {name}"))
        .collect();
    let Some(first) = names.first() else { return Ok(()) };
    bail!(
        "{} has {} objects already ({first}, …): copy into an empty database, or use `pgtandem schema diff --sql`",
        target.describe(),
        names.len()
    );
}

async fn roles_are_there(from: &Client, to: &Client, target: &Target) -> anyhow::Result<()> {
    let facts = crate::check::facts::SideFacts::read(from).await?;
    let there = to.query("SELECT rolname::text FROM pg_roles", &[]).await?;
    let there: BTreeSet<String> = there.iter().map(|row| row.get(0)).collect();
    let missing: Vec<String> = facts
        .concerned
        .iter()
        .filter(|role| !there.contains(*role))
        .map(|role| crate::check::create_role(role, facts.roles.get(role) == Some(&true)))
        .collect();
    ensure!(
        missing.is_empty(),
        "{} lacks roles that own something or are granted something; as a DBA: {};",
        target.describe(),
        missing.join("; ")
    );
    Ok(())
}

/// Constraints and indexes, by OID, that have to be there before the rows: primary keys, and where
/// there is none, what a table's rows could be walked by (see `reconcile::key`).
async fn keys(client: &Client) -> anyhow::Result<BTreeSet<u32>> {
    let rows = client
        .query(
            "SELECT COALESCE(k.oid, i.indexrelid)
               FROM pg_index i LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u')
              WHERE i.indisprimary
                 OR (i.indisunique AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
                     AND NOT EXISTS (SELECT FROM pg_index p WHERE p.indrelid = i.indrelid AND p.indisprimary)
                     AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) AND NOT a.attnotnull))",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// By name, the entry of each index: its own, or its constraint's.
async fn indexes(client: &Client) -> anyhow::Result<BTreeMap<String, (u32, u32)>> {
    let rows = client
        .query(
            "SELECT i.indexrelid::regclass::text,
                    CASE WHEN k.oid IS NULL THEN 'pg_class'::regclass ELSE 'pg_constraint'::regclass END::oid,
                    COALESCE(k.oid, i.indexrelid)
               FROM pg_index i LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}

/// By class and OID of what belongs to tables: those tables whose rows it is about, as
/// `schema.name`; of a partitioned table its partitions.
type TablesOf = BTreeMap<(u32, u32), BTreeSet<String>>;

async fn tables_of(client: &Client) -> anyhow::Result<TablesOf> {
    let rows = client
        .query(
            "WITH parts(class, oid, rel) AS (
                 SELECT 'pg_constraint'::regclass, oid, conrelid FROM pg_constraint WHERE conrelid <> 0
                 UNION ALL SELECT 'pg_constraint'::regclass, oid, confrelid FROM pg_constraint WHERE confrelid <> 0
                 UNION ALL SELECT 'pg_class'::regclass, indexrelid, indrelid FROM pg_index
                 UNION ALL SELECT 'pg_trigger'::regclass, oid, tgrelid FROM pg_trigger
                 UNION ALL SELECT 'pg_rewrite'::regclass, oid, ev_class FROM pg_rewrite
                 UNION ALL SELECT 'pg_policy'::regclass, oid, polrelid FROM pg_policy
                 UNION ALL SELECT 'pg_statistic_ext'::regclass, oid, stxrelid FROM pg_statistic_ext
                 -- Row security: pg_dump gives the table without a class.
                 UNION ALL SELECT 0, oid, oid FROM pg_class WHERE relkind IN ('r', 'p'))
             SELECT p.class::oid, p.oid, n.nspname || '.' || c.relname
               FROM parts p CROSS JOIN LATERAL (
                    SELECT p.rel AS oid UNION SELECT t.relid FROM pg_partition_tree(p.rel) t) AS leaf
               JOIN pg_class c ON c.oid = leaf.oid AND c.relkind = 'r' JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE p.rel >= 16384",
            &[],
        )
        .await?;
    let mut tables = TablesOf::new();
    for row in rows {
        tables.entry((row.get(0), row.get(1))).or_default().insert(row.get(2));
    }
    Ok(tables)
}

/// Comments and attached indexes wait for what their subjects wait for.
fn rest_of(late: &[&Entry], tables: &TablesOf) -> Vec<Rest> {
    let mut waits: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    let mut rest = Vec::with_capacity(late.len());
    for entry in late {
        let mut own = tables.get(&(entry.class, entry.oid)).cloned().unwrap_or_default();
        for on in &entry.depends {
            own.extend(waits.get(on).into_iter().flatten().cloned());
        }
        waits.insert(entry.id, own.clone());
        rest.push(Rest {
            name: format!("{} {}", entry.kind, entry.name),
            sql: entry.sql.clone(),
            waits: own,
        });
    }
    rest
}

/// Materialized views come without rows, and get them when all tables have theirs.
async fn refreshes(client: &Client, tables: &TablesOf) -> anyhow::Result<Vec<Rest>> {
    let all: BTreeSet<String> = tables.values().flatten().cloned().collect();
    let rows = client
        .query(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| {
            let name: String = row.get(0);
            Rest {
                sql: format!("REFRESH MATERIALIZED VIEW {name};"),
                name: format!("REFRESH {name}"),
                waits: all.clone(),
            }
        })
        .collect())
}
