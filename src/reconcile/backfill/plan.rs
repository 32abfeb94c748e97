//! How one table is copied: which columns, along which key, by which statements.
//!
//! Rows travel in COPY's text format under the pinned settings, which writes a value alike on
//! every version. Tables of plain types only go in the binary format, which is the same on all
//! versions there and costs half as much; elsewhere it carries OIDs (arrays, composites).

use tokio_postgres::{Client, SimpleQueryMessage};

use crate::apply::statements::Writer;
use crate::catalog::quote::{identifier, qualified};
use crate::catalog::table::{self, Generated, Table};
use crate::catalog::{Oid, PINNED_SETTINGS};
use crate::reconcile::key::{Boundary, KeyRange, WalkKey, walk_key};
use crate::reconcile::place::Place;

/// The key along which a table is cut into ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub walk: WalkKey,
    /// Both sides sort it alike, so a range holds the same rows on both. Where that is not known
    /// (text under a language's collation), rows are removed from the secondary key by key.
    pub sorts_alike: bool,
}

impl Key {
    /// What identifies a range's bounds: they are of no use once this changes.
    pub(super) fn signature(&self) -> Vec<String> {
        let columns = self.walk.columns.iter();
        columns
            .map(|column| format!("{} {}", column.name, column.type_name))
            .collect()
    }
}

/// COPY's formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Each row is one message.
    Text,
    /// The first row's message begins with a header, and a trailer follows the last one.
    Binary,
}

impl Format {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Binary => "binary",
        }
    }

    /// How many rows came in so many messages.
    pub(super) const fn rows(self, messages: u64) -> u64 {
        match self {
            Self::Text => messages,
            Self::Binary => messages.saturating_sub(1),
        }
    }
}

/// A stretch of a table's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub number: i64,
    pub keys: KeyRange,
}

#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub rel: Oid,
    /// What is read on the primary.
    pub source: String,
    pub is_face: bool,
    pub schema: String,
    pub name: String,
    /// The primary's columns as `pgtandem.seeding` has them: the plan is of no use once they change.
    pub recorded_columns: String,
    /// Those that are written: all but what the server computes.
    pub columns: Vec<String>,
    /// None: the table is copied as one.
    pub key: Option<Key>,
    pub rows_expected: u64,
    pub bytes_expected: u64,
    pub silence: Option<(String, String)>,
    /// How rows are copied, until some of them are refused.
    pub format: Format,
    /// Both servers write and read COPY in it. An SQL_ASCII primary holds bytes of any encoding:
    /// they are passed on as they are, and the secondary refuses what it cannot be.
    encoding: &'static str,
}

impl Plan {
    /// Reads what is needed from both sides; both connections have the pinned settings.
    ///
    /// # Errors
    /// In words, why the table cannot be copied; or the server's error.
    pub(super) async fn make(
        primary: &Client,
        secondary: &Client,
        rel: Oid,
    ) -> Result<Result<Self, String>, tokio_postgres::Error> {
        let recorded = secondary
            .query_opt(
                "SELECT schema, name, columns, local, paused FROM pgtandem.seeding WHERE rel = $1",
                &[&rel],
            )
            .await?;
        let Some(recorded) = recorded else {
            return Ok(Err("it was dropped".into()));
        };
        if let Some(why) = recorded.get::<_, Option<String>>(4) {
            return Ok(Err(format!("its mirroring is paused: {why}")));
        }
        let local: Option<Oid> = recorded.get(3);
        let (here, there) = (
            table::load(primary, &[rel]).await?.pop(),
            table::load(secondary, &[local.unwrap_or_default()]).await?.pop(),
        );
        let (Some(here), Some(there)) = (here, there) else {
            return Ok(Err("one of the sides does not have it".into()));
        };
        let names = |table: &Table| -> Vec<String> {
            let written = table.columns.iter().filter(|column| column.generated == Generated::No);
            written.map(|column| column.name.clone()).collect()
        };
        let (schema, name): (&str, &str) = (recorded.get(0), recorded.get(1));
        let place = Place::on_primary(primary, schema, name).await?;
        let columns = names(&here);
        let (mut one, mut other) = (columns.clone(), names(&there));
        one.sort_unstable();
        other.sort_unstable();
        if one != other {
            return Ok(Err("the two sides compute different columns (GENERATED)".into()));
        }
        if columns.is_empty() {
            return Ok(Err("it has no column that could be copied".into()));
        }
        let theirs = walk_key(secondary, &there.schema, &there.name).await?;
        let key = place.key.map(|walk| Key {
            sorts_alike: theirs.is_some_and(|theirs| walk.agrees(&theirs)),
            walk,
        });
        let size = primary.query_one(SIZE, &[&rel]).await?;
        let rows_expected = match size.get::<_, f64>(0) {
            estimate if estimate >= 0.0 => estimate as u64,
            // Never analyzed: as the planner would guess.
            _ => guessed_rows(primary, &here).await?,
        };
        let encoding = primary
            .query_one("SELECT current_setting('server_encoding')", &[])
            .await?;
        let any_bytes = encoding.get::<_, &str>(0) == "SQL_ASCII";
        let plain = here.columns.iter().all(|column| is_plain(&column.type_name));
        Ok(Ok(Self {
            rel,
            source: place.relation,
            is_face: place.is_face,
            schema: recorded.get(0),
            name: recorded.get(1),
            recorded_columns: recorded.get(2),
            silence: Writer::new(there, &[]).silence(),
            columns,
            key,
            rows_expected,
            bytes_expected: size.get::<_, i64>(1) as u64,
            format: if plain && !any_bytes {
                Format::Binary
            } else {
                Format::Text
            },
            encoding: if any_bytes { "SQL_ASCII" } else { "UTF8" },
        }))
    }

    /// On the secondary.
    pub(super) fn target(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    pub(super) fn column_list(&self) -> String {
        let columns: Vec<String> = self.columns.iter().map(|name| identifier(name)).collect();
        columns.join(", ")
    }

    /// The condition of a range, of a row `t`; `None` is the whole table.
    fn within(&self, range: Option<&Range>) -> String {
        match (&self.key, range) {
            (Some(key), Some(range)) => key.walk.within(&range.keys),
            _ => "true".into(),
        }
    }

    /// The end of the next range of `rows` rows, if there is one: an array of text.
    pub(super) fn step(&self, key: &Key, after: Option<&Boundary>, rows: u64) -> String {
        key.walk.step_sql(&self.source, after.map(Vec::as_slice), rows)
    }

    /// Reads a range on the primary.
    pub(super) fn read(&self, range: Option<&Range>) -> String {
        self.copy_out(range, String::new(), self.format)
    }

    /// Reads rows `from` up to, not including, `to` of a range, in an order that is the same each
    /// time within a snapshot.
    pub(super) fn read_part(&self, range: Option<&Range>, from: u64, to: Option<u64>) -> String {
        let order = self.key.as_ref().map_or_else(
            || if self.is_face { "(t.*)::text" } else { "t.ctid" }.to_owned(),
            |key| key.walk.listed(),
        );
        let limit = to.map_or_else(String::new, |to| format!(" LIMIT {}", to - from));
        self.copy_out(range, format!(" ORDER BY {order} OFFSET {from}{limit}"), Format::Text)
    }

    fn copy_out(&self, range: Option<&Range>, more: String, format: Format) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|name| format!("t.{}", identifier(name)))
            .collect();
        format!(
            "COPY (SELECT {} FROM ONLY {} AS t WHERE {}{more}) TO STDOUT WITH (FORMAT {}, ENCODING '{}')",
            columns.join(", "),
            self.source,
            self.within(range),
            format.as_str(),
            self.encoding
        )
    }

    pub(super) fn write(&self, target: &str, format: Format) -> String {
        format!(
            "COPY {target} ({}) FROM STDIN WITH (FORMAT {}, ENCODING '{}')",
            self.column_list(),
            format.as_str(),
            self.encoding
        )
    }

    /// Removes from the secondary what mirroring has brought of a range already.
    pub(super) fn clear(&self, range: Option<&Range>) -> String {
        format!("DELETE FROM ONLY {} AS t WHERE {}", self.target(), self.within(range))
    }

    /// Where both sides do not sort alike, a range passes through this: rows are then removed key
    /// by key.
    pub(super) fn stage(&self) -> String {
        format!("pg_temp.{}", identifier(&format!("backfill_{}", self.rel)))
    }

    pub(super) fn create_stage(&self) -> String {
        format!(
            "DROP TABLE IF EXISTS {}; CREATE TEMP TABLE {} ON COMMIT DELETE ROWS AS SELECT {} FROM ONLY {} WITH NO DATA",
            self.stage(),
            identifier(&format!("backfill_{}", self.rel)),
            self.column_list(),
            self.target()
        )
    }

    pub(super) fn clear_staged(&self, key: &Key) -> String {
        let columns = key.walk.columns.iter();
        let same: Vec<String> = columns
            .map(|column| format!("t.{0} = s.{0}", identifier(&column.name)))
            .collect();
        format!(
            "DELETE FROM ONLY {} AS t USING {} AS s WHERE {}",
            self.target(),
            self.stage(),
            same.join(" AND ")
        )
    }

    pub(super) fn write_staged(&self) -> String {
        format!(
            "INSERT INTO {} ({1}) OVERRIDING SYSTEM VALUE SELECT {1} FROM {2}",
            self.target(),
            self.column_list(),
            self.stage()
        )
    }
}

/// Types that every version writes alike in the binary format, and that carry no OID. Names are as
/// `format_type` gives them, where everything outside `pg_catalog` is qualified.
fn is_plain(type_name: &str) -> bool {
    let name = match (type_name.find('('), type_name.find(')')) {
        (Some(open), Some(close)) => format!("{}{}", &type_name[..open], &type_name[close + 1..]),
        _ => type_name.to_owned(),
    };
    const PLAIN: [&str; 17] = [
        "boolean",
        "smallint",
        "integer",
        "bigint",
        "real",
        "double precision",
        "numeric",
        "text",
        "character",
        "character varying",
        "bytea",
        "uuid",
        "date",
        "time without time zone",
        "timestamp without time zone",
        "timestamp with time zone",
        "interval",
    ];
    PLAIN.contains(&name.as_str())
}

/// The planner's own arithmetic: the density at the last ANALYZE times the size now.
const SIZE: &str = "\
SELECT CASE WHEN c.reltuples < 0 OR c.relpages = 0 AND pg_relation_size(c.oid) > 0 THEN -1
            WHEN c.relpages = 0 THEN 0
            ELSE c.reltuples::float8 / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int) END,
       pg_table_size(c.oid)
  FROM pg_class c WHERE c.oid = pgtandem.source_of($1)";

async fn guessed_rows(primary: &Client, table: &Table) -> Result<u64, tokio_postgres::Error> {
    let explained = primary
        .simple_query(&format!("EXPLAIN (FORMAT JSON) SELECT FROM ONLY {}", table.qualified()))
        .await?;
    let text: String = explained
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        })
        .collect();
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    Ok(plan[0]["Plan"]["Plan Rows"].as_u64().unwrap_or(0))
}

/// Settings of every connection that copies, on either side: a range is found by its index, and
/// rows come in the same order each time.
pub(super) fn copying_settings() -> String {
    format!(
        "{PINNED_SETTINGS} SET synchronous_commit = on; SET statement_timeout = 0; SET lock_timeout = '1s'; \
         SET idle_in_transaction_session_timeout = 0; SET default_transaction_read_only = off; \
         SET default_transaction_isolation = 'read committed'; SET default_transaction_deferrable = off; \
         SET row_security = off; SET client_min_messages = warning; SET enable_seqscan = off; \
         SET enable_hashjoin = off; SET enable_mergejoin = off; SET max_parallel_workers_per_gather = 0; \
         SET synchronize_seqscans = off; SET jit = off;"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::key::KeyColumn;

    fn plan() -> Plan {
        let column = |name: &str, type_name: &str| KeyColumn {
            name: name.into(),
            type_name: type_name.into(),
            order: None,
        };
        Plan {
            rel: 7,
            source: "\"S\".\"t\"\"x\"".into(),
            is_face: false,
            schema: "S".into(),
            name: "t\"x".into(),
            recorded_columns: String::new(),
            columns: vec!["a".into(), "b".into()],
            key: Some(Key {
                walk: WalkKey {
                    columns: vec![column("a", "integer"), column("b", "text")],
                },
                sorts_alike: false,
            }),
            rows_expected: 0,
            bytes_expected: 0,
            silence: None,
            format: Format::Text,
            encoding: "UTF8",
        }
    }

    #[test]
    fn a_range_is_open_below_and_closed_above() {
        let range = Range {
            number: 1,
            keys: KeyRange {
                after: Some(vec!["1".into(), "it's".into()]),
                upto: None,
            },
        };
        assert_eq!(
            plan().clear(Some(&range)),
            "DELETE FROM ONLY \"S\".\"t\"\"x\" AS t WHERE (t.\"a\", t.\"b\") > ('1'::integer, 'it''s'::text)"
        );
        assert!(plan().clear(None).ends_with("WHERE true"));
    }

    #[test]
    fn a_part_can_be_read_again() {
        let sql = plan().read_part(None, 3, Some(5));
        assert!(sql.contains("ORDER BY t.\"a\", t.\"b\" OFFSET 3 LIMIT 2)"), "{sql}");
    }

    #[test]
    fn plain_types() {
        for (name, plain) in [
            ("numeric(12,2)", true),
            ("timestamp(3) with time zone", true),
            ("character varying(8)", true),
            ("integer[]", false),
            ("numeric(3,1)[]", false),
            ("public.\"integer\"", false),
            ("jsonb", false),
        ] {
            assert_eq!(is_plain(name), plain, "{name}");
        }
    }

    #[test]
    fn a_stage_is_emptied_key_by_key() {
        let plan = plan();
        let key = plan.key.clone().unwrap();
        let sql = plan.clear_staged(&key);
        assert!(sql.ends_with("WHERE t.\"a\" = s.\"a\" AND t.\"b\" = s.\"b\""), "{sql}");
    }
}
