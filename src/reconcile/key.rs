//! By which key a table's rows are walked, and the SQL of ranges of it. What asks the catalog is
//! [`walk_key`] and [`boundaries`]; everything else is text from data.
//!
//! A range is `(after, upto]` in the order of the key's index: rows are compared as a whole
//! (`(a, b) > (1, 'x')`), which a btree answers by its index. Boundaries are values of the key,
//! each as text under the pinned settings, so they can be kept and read back.
//!
//! Order. A backfill walks one side and may use any btree order. A verification asks both sides
//! for the same range, so their orders must be the same: [`WalkKey::agrees`] says whether that is
//! known. It is for numbers, times, uuids and the like, for enums with the same labels, and for
//! text where both columns' collations are bytewise, or of one provider, locale and version.
//! Comparing `COLLATE "C"` instead would be right as well, but no index of another collation
//! serves it: each range would read the whole table.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::catalog::quote::{identifier, literal, qualified};

/// One column of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyColumn {
    pub name: String,
    /// The type that a boundary is cast to: the column's base type, without a length.
    #[serde(rename = "type")]
    pub type_name: String,
    /// What decides the order of this column's values: equal words on two servers mean equal
    /// order. Absent where nothing is known of it.
    pub order: Option<String>,
}

/// The columns by which a table's rows are walked: those of its primary key, else of the smallest
/// unique index over NOT NULL columns. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkKey {
    pub columns: Vec<KeyColumn>,
}

/// The values of a key's columns, in its order, as text.
pub type Boundary = Vec<String>;

/// The rows after one boundary, up to and with the other; `None` is the end of the table.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeyRange {
    pub after: Option<Boundary>,
    pub upto: Option<Boundary>,
}

impl WalkKey {
    /// Whether ranges of this key hold the same rows on a side whose key is `other`.
    pub fn agrees(&self, other: &Self) -> bool {
        self.columns.len() == other.columns.len()
            && self
                .columns
                .iter()
                .zip(&other.columns)
                .all(|(one, two)| one.name == two.name && one.order.is_some() && one.order == two.order)
    }

    pub fn names(&self) -> Vec<String> {
        self.columns.iter().map(|column| column.name.clone()).collect()
    }

    /// `t."a", t."b"`
    pub fn listed(&self) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|column| format!("t.{}", identifier(&column.name)))
            .collect();
        columns.join(", ")
    }

    /// A row's boundary: `ARRAY[t."a"::text, …]`.
    pub fn as_text(&self) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|column| format!("t.{}::text", identifier(&column.name)))
            .collect();
        format!("ARRAY[{}]", columns.join(", "))
    }

    /// The condition that a row `t` lies in the range; `true` for the whole table.
    pub fn within(&self, range: &KeyRange) -> String {
        let terms: Vec<String> = [(">", &range.after), ("<=", &range.upto)]
            .into_iter()
            .filter_map(|(operator, boundary)| Some(self.compare(operator, boundary.as_ref()?)))
            .collect();
        match terms.is_empty() {
            true => "true".to_owned(),
            false => terms.join(" AND "),
        }
    }

    /// A row `t`'s key beside a boundary.
    pub fn compare(&self, operator: &str, boundary: &[String]) -> String {
        let values: Vec<String> = self
            .columns
            .iter()
            .zip(boundary)
            .map(|(column, value)| format!("{}::{}", literal(value), column.type_name))
            .collect();
        format!("({}) {operator} ({})", self.listed(), values.join(", "))
    }

    /// The boundary that lies `rows` rows after another one, or no row near the end: an index
    /// scan over so many entries. For a walk that does not know its ranges beforehand.
    pub fn step_sql(&self, relation: &str, after: Option<&[String]>, rows: u64) -> String {
        let condition = after.map_or_else(|| "true".to_owned(), |after| self.compare(">", after));
        format!(
            "SELECT {} FROM ONLY {relation} AS t WHERE {condition} ORDER BY {} OFFSET {} LIMIT 1",
            self.as_text(),
            self.listed(),
            rows.saturating_sub(1)
        )
    }

    /// Boundaries about `rows` rows apart, out of a sample of the table's blocks: `per_range`
    /// samples are read for each, so that ranges come out within a factor of about two.
    fn sample_sql(&self, schema: &str, name: &str, blocks_percent: f64, share: f64, per_range: u64) -> String {
        format!(
            "SELECT s.key FROM (
                 SELECT {key} AS key, row_number() OVER (ORDER BY {listed}) AS n
                   FROM ONLY {table} AS t TABLESAMPLE SYSTEM ({blocks_percent}) WHERE random() < {share}) s
              WHERE s.n % {per_range} = 0 ORDER BY s.n",
            key = self.as_text(),
            listed = self.listed(),
            table = qualified(schema, name),
        )
    }
}

/// The ranges between ascending boundaries, first and last one open: together every row.
pub fn ranges(boundaries: Vec<Boundary>) -> Vec<KeyRange> {
    let mut ranges = Vec::with_capacity(boundaries.len() + 1);
    let mut after = None;
    for boundary in boundaries {
        if after.as_ref() == Some(&boundary) {
            continue;
        }
        ranges.push(KeyRange {
            after: after.replace(boundary.clone()),
            upto: Some(boundary),
        });
    }
    ranges.push(KeyRange { after, upto: None });
    ranges
}

/// An index counts if it is a valid, whole, unique btree over plain NOT NULL columns with their
/// types' usual operators, all in one direction, and no deferrable constraint.
const KEY: &str = "\
SELECT k.columns::text FROM pg_index i
  JOIN pg_class ic ON ic.oid = i.indexrelid JOIN pg_am am ON am.oid = ic.relam AND am.amname = 'btree'
 CROSS JOIN LATERAL (
    SELECT json_agg(json_build_object('name', a.attname, 'type', format_type(b.oid, -1),
             'order', CASE
               WHEN b.typtype = 'e' THEN (SELECT 'enum ' || json_agg(e.enumlabel ORDER BY e.enumsortorder)::text
                                            FROM pg_enum e WHERE e.enumtypid = b.oid)
               WHEN b.oid = ANY ('{bool,int2,int4,int8,oid,numeric,float4,float8,date,time,timetz,timestamp,timestamptz,interval,uuid,bytea,inet,cidr,macaddr,macaddr8,bit,varbit,name}'::regtype[])
                 THEN b.typname
               WHEN b.oid = ANY ('{text,varchar,bpchar}'::regtype[]) THEN b.typname || ' ' || (
                 SELECT CASE
                     WHEN provider = 'c' AND locale IN ('C', 'POSIX') OR provider = 'b' THEN 'by bytes'
                     WHEN version IS NOT NULL THEN concat_ws(' ', provider, locale, version, CASE WHEN NOT deterministic THEN 'nondeterministic' END) END
                   FROM (SELECT CASE WHEN c.collprovider = 'd' THEN d.datlocprovider ELSE c.collprovider END AS provider,
                                CASE WHEN c.collprovider = 'd' THEN COALESCE(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', d.datcollate)
                                     ELSE COALESCE(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', c.collcollate) END AS locale,
                                CASE WHEN c.collprovider = 'd' THEN pg_database_collation_actual_version(d.oid)
                                     ELSE pg_collation_actual_version(c.oid) END AS version,
                                c.collisdeterministic AS deterministic
                           FROM pg_collation c, pg_database d
                          WHERE c.oid = x.coll AND d.datname = current_database()) v) END) ORDER BY x.ord) AS columns,
           bool_and(a.attnotnull AND oc.opcdefault) AND count(DISTINCT x.opt & 1) = 1 AS usable
      FROM unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[], i.indoption::int2[])
             WITH ORDINALITY AS x(attnum, opclass, coll, opt, ord)
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = x.attnum
      JOIN pg_opclass oc ON oc.oid = x.opclass
     CROSS JOIN LATERAL (
        WITH RECURSIVE base AS (
            SELECT t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = a.atttypid
            UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM base JOIN pg_type t ON t.oid = base.typbasetype WHERE base.typtype = 'd')
        SELECT t.oid, t.typname, t.typtype FROM base JOIN pg_type t ON t.oid = base.oid WHERE t.typtype <> 'd') b
     WHERE x.ord <= i.indnkeyatts AND a.attcollation = x.coll) k
 WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indisvalid AND i.indimmediate
   AND i.indpred IS NULL AND i.indexprs IS NULL AND k.usable AND json_array_length(k.columns) = i.indnkeyatts
 ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1";

/// The key by which a table is walked; `None`: it has none. The session must have the [pinned
/// settings](crate::catalog::PINNED_SETTINGS).
pub async fn walk_key(client: &Client, schema: &str, name: &str) -> Result<Option<WalkKey>, tokio_postgres::Error> {
    let found = client.query_opt(KEY, &[&qualified(schema, name)]).await?;
    // Our own query built the JSON; on a surprise the table counts as keyless, slow and right.
    let columns: Option<Vec<KeyColumn>> = found.and_then(|row| serde_json::from_str(row.get(0)).ok());
    Ok(columns
        .filter(|columns| !columns.is_empty())
        .map(|columns| WalkKey { columns }))
}

/// Samples read for each boundary.
const SAMPLES: u64 = 8;
/// More than this many boundaries are not kept: ranges then hold more rows.
const BOUNDARIES_MAX: u64 = 50_000;

/// Boundaries that split a table into ranges of about `rows` rows. Reads a sample of its blocks:
/// a few per cent of a large table, a small one (under `rows` rows or so) not at all.
pub async fn boundaries(
    client: &Client,
    key: &WalkKey,
    schema: &str,
    name: &str,
    rows: u64,
) -> Result<Vec<Boundary>, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT pg_relation_size(c.oid) / current_setting('block_size')::bigint, c.reltuples::float8, c.relpages
               FROM pg_class c WHERE c.oid = to_regclass($1)",
            &[&qualified(schema, name)],
        )
        .await?;
    let (blocks, tuples, pages): (i64, f64, i32) = (row.get(0), row.get(1), row.get(2));
    let per_block = if pages > 0 && tuples > 0.0 {
        tuples / f64::from(pages)
    } else {
        rows_per_block(client, schema, name, blocks).await?
    };
    let Some(sample) = Sample::of(blocks as f64, per_block, rows) else {
        return Ok(Vec::new());
    };
    let sql = key.sample_sql(schema, name, sample.blocks_percent, sample.share, SAMPLES);
    let rows = client.query(&sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Of a table that was never analyzed: counted in some of its blocks.
async fn rows_per_block(client: &Client, schema: &str, name: &str, blocks: i64) -> Result<f64, tokio_postgres::Error> {
    const BLOCKS: f64 = 64.0;
    let percent = (BLOCKS / blocks.max(1) as f64 * 100.0).min(100.0);
    let sql = format!(
        "SELECT count(*) FROM ONLY {} TABLESAMPLE SYSTEM ({percent})",
        qualified(schema, name)
    );
    let counted: i64 = client.query_one(&sql, &[]).await?.get(0);
    Ok(counted as f64 / (blocks as f64 * percent / 100.0).max(1.0))
}

/// How a table is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    blocks_percent: f64,
    /// Of the rows in those blocks.
    share: f64,
}

impl Sample {
    /// `None` for a table that is one range.
    fn of(blocks: f64, per_block: f64, rows: u64) -> Option<Self> {
        let total = blocks * per_block;
        let ranges = (total / rows.max(1) as f64).min(BOUNDARIES_MAX as f64);
        if ranges < 1.5 {
            return None;
        }
        let samples = ranges * SAMPLES as f64;
        // A row from each of so many blocks; neighbours in a block say nothing new.
        let share_of_blocks = (samples / blocks).min(1.0);
        Some(Self {
            blocks_percent: share_of_blocks * 100.0,
            share: (samples / (total * share_of_blocks)).min(1.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(columns: &[(&str, &str, Option<&str>)]) -> WalkKey {
        let columns = columns.iter().map(|(name, type_name, order)| KeyColumn {
            name: (*name).to_owned(),
            type_name: (*type_name).to_owned(),
            order: order.map(str::to_owned),
        });
        WalkKey {
            columns: columns.collect(),
        }
    }

    fn boundary(values: &[&str]) -> Boundary {
        values.iter().map(|&value| value.to_owned()).collect()
    }

    #[test]
    fn conditions_of_ranges() {
        let one = key(&[("id", "bigint", Some("int8"))]);
        let two = key(&[("a", "integer", Some("int4")), ("b\"x", "text", None)]);
        for (key, after, upto, expected) in [
            (&one, None, None, "true"),
            (&one, Some(vec!["5"]), None, "(t.\"id\") > ('5'::bigint)"),
            (
                &one,
                Some(vec!["5"]),
                Some(vec!["9"]),
                "(t.\"id\") > ('5'::bigint) AND (t.\"id\") <= ('9'::bigint)",
            ),
            (
                &two,
                None,
                Some(vec!["1", "it's"]),
                "(t.\"a\", t.\"b\"\"x\") <= ('1'::integer, 'it''s'::text)",
            ),
        ] {
            let range = KeyRange {
                after: after.map(|values| boundary(&values)),
                upto: upto.map(|values| boundary(&values)),
            };
            assert_eq!(key.within(&range), expected);
        }
    }

    #[test]
    fn ranges_hold_every_row_once() {
        assert_eq!(ranges(vec![]), [KeyRange::default()]);
        let (five, nine) = (boundary(&["5"]), boundary(&["9"]));
        let range = |after: Option<&Boundary>, upto: Option<&Boundary>| KeyRange {
            after: after.cloned(),
            upto: upto.cloned(),
        };
        assert_eq!(
            ranges(vec![five.clone(), five.clone(), nine.clone()]),
            [
                range(None, Some(&five)),
                range(Some(&five), Some(&nine)),
                range(Some(&nine), None)
            ]
        );
    }

    #[test]
    fn keys_agree_where_the_order_is_known_to_be_the_same() {
        let text = |order| key(&[("k", "text", order)]);
        for (one, two, agree) in [
            (text(Some("text by bytes")), text(Some("text by bytes")), true),
            (text(Some("text c de_DE 2.36")), text(Some("text c de_DE 2.36")), true),
            (text(Some("text c de_DE 2.36")), text(Some("text c de_DE 2.41")), false),
            (text(None), text(None), false),
            (
                key(&[("k", "bigint", Some("int8"))]),
                key(&[("k", "integer", Some("int4"))]),
                false,
            ),
            (
                key(&[("a", "bigint", Some("int8")), ("b", "bigint", Some("int8"))]),
                key(&[("b", "bigint", Some("int8")), ("a", "bigint", Some("int8"))]),
                false,
            ),
        ] {
            assert_eq!(one.agrees(&two), agree, "{one:?} {two:?}");
        }
    }

    #[test]
    fn samples() {
        assert_eq!(Sample::of(0.0, 0.0, 1000), None);
        assert_eq!(Sample::of(10.0, 100.0, 1000), None, "one range");
        let large = Sample::of(100_000.0, 100.0, 10_000).unwrap();
        assert_eq!(large.blocks_percent, 8.0, "1,000 ranges, 8 samples each");
        assert!((large.share - 0.01).abs() < 1e-9, "a row from each block");
        let dense = Sample::of(10.0, 100.0, 20).unwrap();
        assert_eq!(dense.blocks_percent, 100.0);
        assert!((dense.share - 0.4).abs() < 1e-9);
    }

    #[test]
    fn a_step_along_the_index() {
        let one = key(&[("id", "bigint", Some("int8"))]);
        assert_eq!(
            one.step_sql("\"s\".\"t\"", Some(&boundary(&["5"])), 100),
            "SELECT ARRAY[t.\"id\"::text] FROM ONLY \"s\".\"t\" AS t WHERE (t.\"id\") > ('5'::bigint) ORDER BY t.\"id\" OFFSET 99 LIMIT 1"
        );
    }
}
