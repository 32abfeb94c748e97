//! One table as a database's catalog has it: what is needed to write rows into it from their
//! images and to find them again.

use serde::Deserialize;
use tokio_postgres::Client;

use crate::catalog::{Oid, quote};

/// A column as [`Table`] needs it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Column {
    pub name: String,
    #[serde(rename = "type")]
    pub type_name: String,
    pub generated: Generated,
    /// GENERATED ALWAYS AS IDENTITY: an UPDATE may not set it.
    pub identity_always: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Generated {
    #[serde(rename = "")]
    No,
    #[serde(rename = "s")]
    Stored,
    /// Postgres 18: computed when read, so an image carries no value of it.
    #[serde(rename = "v")]
    Virtual,
}

/// Columns that identify a row, with the equality operator of each as the index has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct UniqueColumns {
    pub primary: bool,
    pub not_null: bool,
    pub columns: Vec<String>,
    pub operators: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub oid: Oid,
    pub schema: String,
    pub name: String,
    pub columns: Vec<Column>,
    /// The primary key, else the shortest unique index that could be one.
    pub key: Option<UniqueColumns>,
    /// Every unique index on plain columns, the key's included.
    pub uniques: Vec<UniqueColumns>,
    /// Whether the key is the only unique or exclusion constraint.
    pub key_alone: bool,
    /// The application's triggers and rules that fire even for a replica: the mode (`A`, `R`),
    /// then the name.
    pub always_triggers: Vec<String>,
    pub always_rules: Vec<String>,
    /// Whether row security is forced on the owner and on the role that asked.
    pub hides_rows: bool,
}

impl Table {
    pub fn qualified(&self) -> String {
        quote::qualified(&self.schema, &self.name)
    }

    pub fn has_virtual_columns(&self) -> bool {
        self.columns.iter().any(|column| column.generated == Generated::Virtual)
    }
}

const LOAD: &str = "\
SELECT c.oid, n.nspname::text, c.relname::text,
    (SELECT COALESCE(json_agg(json_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
            'generated', a.attgenerated, 'identity_always', a.attidentity = 'a') ORDER BY a.attnum), '[]')::text
       FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
    (SELECT COALESCE(json_agg(json_build_object('primary', i.indisprimary, 'columns', k.columns, 'operators', k.operators,
            'not_null', k.not_null) ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid), '[]')::text
       FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid JOIN pg_am am ON am.oid = ic.relam
      CROSS JOIN LATERAL (
            SELECT json_agg(a.attname ORDER BY x.ord) AS columns, bool_and(a.attnotnull) AS not_null,
                   json_agg(format('OPERATOR(%I.%s)', pn.nspname, o.oprname) ORDER BY x.ord) AS operators
              FROM unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY AS x(attnum, opclass, ord)
              JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = x.attnum
              JOIN pg_opclass oc ON oc.oid = x.opclass
              JOIN pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amoplefttype = oc.opcintype
                             AND ao.amoprighttype = oc.opcintype AND ao.amopstrategy = 3
              JOIN pg_operator o ON o.oid = ao.amopopr
              JOIN pg_namespace pn ON pn.oid = o.oprnamespace
             WHERE x.ord <= i.indnkeyatts) k
      WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND am.amname = 'btree'
        AND i.indpred IS NULL AND i.indexprs IS NULL),
    (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)),
    (SELECT COALESCE(array_agg(t.tgenabled::text || t.tgname), '{}') FROM pg_trigger t
      WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgenabled IN ('A', 'R') AND t.tgname NOT LIKE 'zzz\\_pgtandem\\_%'),
    (SELECT COALESCE(array_agg(r.ev_enabled::text || r.rulename), '{}') FROM pg_rewrite r
      WHERE r.ev_class = c.oid AND r.ev_enabled IN ('A', 'R') AND r.ev_type <> '1'),
    c.relrowsecurity AND c.relforcerowsecurity AND NOT (SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY($1)";

/// Reads tables by OID, in no order; those that are gone are left out. The session must have
/// the [pinned settings](crate::catalog::PINNED_SETTINGS).
pub async fn load(client: &Client, oids: &[Oid]) -> Result<Vec<Table>, tokio_postgres::Error> {
    let rows = client.query(LOAD, &[&oids]).await?;
    Ok(rows.iter().map(from_row).collect())
}

fn from_row(row: &tokio_postgres::Row) -> Table {
    // Our own query built the JSON; an empty list on a surprise makes the table keyless, which
    // is slow and right.
    let columns: Vec<Column> = serde_json::from_str(row.get(3)).unwrap_or_default();
    let uniques: Vec<UniqueColumns> = serde_json::from_str(row.get(4)).unwrap_or_default();
    let key = uniques.iter().find(|unique| unique.not_null).cloned();
    Table {
        oid: row.get(0),
        schema: row.get(1),
        name: row.get(2),
        columns,
        key_alone: key.is_some() && row.get::<_, i64>(5) == 1,
        key,
        uniques,
        always_triggers: row.get(6),
        always_rules: row.get(7),
        hides_rows: row.get(8),
    }
}
