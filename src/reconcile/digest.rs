//! How rows become checksums that both servers compute alike. Pure: SQL text from columns.
//!
//! A row's text is its columns in the order of their names, each as text under the pinned
//! settings, joined by the byte 0x1F: so neither OIDs nor versions nor the physical order matter,
//! and what the servers write differently (`1.0` and `1.00`, `-0` and `0`) is different. No two
//! rows have one text: what may hold any bytes is preceded by its length, and a null is 0x1E in
//! the place of a value. `concat_ws` makes it at half the price of `ROW(…)::text`.
//!
//! A row's hash is `hashtextextended` of that text, 64 bits, the same on every version of Postgres
//! (on machines of one byte order, in databases of one encoding). The digest of a range is the
//! number of its rows and the sum of their hashes: independent of any order, and the digests of
//! ranges add up to the table's. It finds every accident; it is no signature against somebody who
//! constructs rows of a given hash.

use tokio_postgres::Client;

use super::place::Place;
use super::readers::Role;
use crate::catalog::quote::{identifier, literal, qualified};

/// How a column's text is made unmistakable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Its text never holds a control character.
    Closed,
    /// Text itself: any bytes.
    Text,
    /// Of another type whose text may hold any bytes.
    Open,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct DigestColumn {
    name: String,
    form: Form,
    not_null: bool,
}

/// The rows of one table as both sides hash them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowDigest {
    primary: ReadFrom,
    secondary: ReadFrom,
    /// By name.
    columns: Vec<DigestColumn>,
}

/// What one side's rows are read from, and the table that holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ReadFrom {
    relation: String,
    table: String,
}

/// A function call takes at most 100 arguments, and a column needs up to three.
const COLUMNS_AT_ONCE: usize = 30;

const COLUMNS: &str = "\
SELECT a.attname::text, a.attnotnull, b.oid = ANY ('{text,varchar,bpchar}'::regtype[]),
       b.oid = ANY ('{bool,int2,int4,int8,oid,float4,float8,numeric,money,date,time,timetz,timestamp,timestamptz,interval,uuid,bytea,inet,cidr,macaddr,macaddr8,bit,varbit,json,jsonb,xid8,pg_lsn}'::regtype[])
  FROM pg_attribute a
 CROSS JOIN LATERAL (
    WITH RECURSIVE base AS (
        SELECT t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = a.atttypid
        UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM base JOIN pg_type t ON t.oid = base.typbasetype WHERE base.typtype = 'd')
    SELECT base.oid FROM base WHERE base.typtype <> 'd') b
 WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname::text COLLATE \"C\"";

impl RowDigest {
    /// Reads the table's columns on the primary; the same text is then used on both sides. The session
    /// must have the [pinned settings](crate::catalog::PINNED_SETTINGS).
    pub(super) async fn load(
        client: &Client,
        place: &Place,
        schema: &str,
        name: &str,
    ) -> Result<Self, tokio_postgres::Error> {
        let table = qualified(schema, name);
        let rows = client.query(COLUMNS, &[&place.relation]).await?;
        let columns = rows.iter().map(|row| DigestColumn {
            name: row.get(0),
            not_null: row.get(1),
            form: match (row.get(2), row.get(3)) {
                // The other side's column may be of a type that is like text and not text.
                (true, _) if place.is_face => Form::Open,
                (true, _) => Form::Text,
                (_, true) => Form::Closed,
                _ => Form::Open,
            },
        });
        Ok(Self {
            primary: ReadFrom {
                relation: place.relation.clone(),
                table: place.table.clone(),
            },
            secondary: ReadFrom {
                relation: table.clone(),
                table,
            },
            columns: columns.collect(),
        })
    }

    pub fn column_names(&self) -> Vec<String> {
        self.columns.iter().map(|column| column.name.clone()).collect()
    }

    const fn of(&self, role: Role) -> &ReadFrom {
        match role {
            Role::Primary => &self.primary,
            Role::Secondary => &self.secondary,
        }
    }

    /// What that side's rows are read from, quoted.
    pub fn relation(&self, role: Role) -> &str {
        &self.of(role).relation
    }

    /// The text of a row `t`.
    pub fn row_text(&self) -> String {
        let parts: Vec<String> = self
            .columns
            .chunks(COLUMNS_AT_ONCE)
            .map(|columns| {
                let fields: Vec<String> = columns.iter().map(DigestColumn::fields).collect();
                format!("concat_ws(E'\\x1F', {})", fields.join(", "))
            })
            .collect();
        match &parts[..] {
            [] => "''".to_owned(),
            [only] => only.clone(),
            several => format!("concat_ws(E'\\x1F', {})", several.join(", ")),
        }
    }

    /// The hash of a row `t`: a bigint.
    pub fn row_hash(&self) -> String {
        hash(&self.row_text(), 0)
    }

    /// Rows and the sum of their hashes (as text, it may exceed a bigint), of the rows `t` for
    /// which `condition` holds.
    pub fn sum_sql(&self, role: Role, condition: &str) -> String {
        format!(
            "SELECT count(*), COALESCE(sum({}), 0)::text FROM ONLY {} AS t WHERE {condition}",
            self.row_hash(),
            self.relation(role)
        )
    }

    /// Whether the file that the table has now is the one that the transaction's snapshot knows.
    /// Asked after reading, while the table is still locked against a change.
    pub fn unchanged_sql(&self, role: Role) -> String {
        format!(
            "SELECT c.relfilenode = pg_relation_filenode(c.oid) FROM pg_class c WHERE c.oid = to_regclass({})",
            literal(&self.of(role).table)
        )
    }

    /// The same over the whole table with the settings it needs, for psql.
    pub fn psql(&self) -> String {
        if self.primary.relation == self.secondary.relation {
            return self.psql_on(Role::Secondary);
        }
        format!(
            "/* primary */ {} /* secondary */ {}",
            self.psql_on(Role::Primary),
            self.psql_on(Role::Secondary)
        )
    }

    fn psql_on(&self, role: Role) -> String {
        format!(
            "BEGIN; SET LOCAL search_path = pg_catalog; SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL TimeZone = 'UTC'; \
             SET LOCAL IntervalStyle = 'postgres'; SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex'; \
             SET LOCAL lc_monetary = 'C'; SELECT count(*) || ' ' || COALESCE(sum({}), 0) FROM ONLY {} AS t; COMMIT",
            self.row_hash(),
            self.relation(role)
        )
    }
}

impl DigestColumn {
    fn fields(&self) -> String {
        let column = format!("t.{}", identifier(&self.name));
        let value = match self.form {
            Form::Closed => column.clone(),
            Form::Text => format!("octet_length({column}), {column}"),
            Form::Open => format!("octet_length({column}::text), {column}"),
        };
        if self.not_null {
            value
        } else {
            format!("{value}, CASE WHEN {column} IS NULL THEN E'\\x1E' END")
        }
    }
}

/// 64 bits of a text.
pub fn hash(text: &str, seed: u8) -> String {
    format!("hashtextextended({text} COLLATE \"C\", {seed})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(columns: &[(&str, Form, bool)]) -> RowDigest {
        let table = || ReadFrom {
            relation: "\"s\".\"t\"".into(),
            table: "\"s\".\"t\"".into(),
        };
        RowDigest {
            primary: table(),
            secondary: table(),
            columns: columns
                .iter()
                .map(|&(name, form, not_null)| DigestColumn {
                    name: name.to_owned(),
                    form,
                    not_null,
                })
                .collect(),
        }
    }

    #[test]
    fn texts_of_rows() {
        for (columns, expected) in [
            (vec![], "''"),
            (vec![("a", Form::Closed, true)], "concat_ws(E'\\x1F', t.\"a\")"),
            (
                vec![("a", Form::Closed, false), ("b", Form::Text, true)],
                "concat_ws(E'\\x1F', t.\"a\", CASE WHEN t.\"a\" IS NULL THEN E'\\x1E' END, octet_length(t.\"b\"), t.\"b\")",
            ),
            (
                vec![("c", Form::Open, true)],
                "concat_ws(E'\\x1F', octet_length(t.\"c\"::text), t.\"c\")",
            ),
        ] {
            assert_eq!(digest(&columns).row_text(), expected);
        }
    }

    #[test]
    fn no_call_has_too_many_arguments() {
        let names: Vec<String> = (0..200).map(|number| format!("c{number}")).collect();
        let columns: Vec<(&str, Form, bool)> = names.iter().map(|name| (name.as_str(), Form::Text, false)).collect();
        let text = digest(&columns).row_text();
        let inner = text.matches("concat_ws").count() - 1;
        assert_eq!(inner, 200_usize.div_ceil(COLUMNS_AT_ONCE));
    }

    #[test]
    fn sums() {
        let sql = digest(&[("a", Form::Closed, true)]).sum_sql(Role::Primary, "true");
        assert_eq!(
            sql,
            "SELECT count(*), COALESCE(sum(hashtextextended(concat_ws(E'\\x1F', t.\"a\") COLLATE \"C\", 0)), 0)::text FROM ONLY \"s\".\"t\" AS t WHERE true"
        );
    }
}
