//! What is meant to differ: the definitions that belong to transformed tables, on either side. No
//! comparison calls them a difference, and nothing brings them in line.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::{Name, Transform};
use crate::catalog::definitions::DefinitionDifference;
use crate::catalog::objects::Objects;
use crate::control::Side;

/// Names as both catalogs' descriptions write them: of tables, with their indexes and the sequences
/// that their columns own, and of schemas.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hidden {
    names: BTreeSet<String>,
}

const BELONGING: &str = "\
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname)
  FROM unnest($1::text[], $2::text[]) AS w(schema, name)
  JOIN pg_namespace tn ON tn.nspname = w.schema JOIN pg_class t ON t.relnamespace = tn.oid AND t.relname = w.name
  JOIN pg_class c ON c.oid = t.oid OR c.oid IN (SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = t.oid)
                  OR c.oid IN (SELECT d.objid FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
                                WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid AND d.deptype IN ('a', 'i'))
  JOIN pg_namespace n ON n.oid = c.relnamespace
 UNION ALL SELECT quote_ident(s) FROM unnest($3::text[]) AS s
 UNION ALL
-- Types that nothing else uses.
SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(y.typname)
  FROM unnest($1::text[], $2::text[]) AS w(schema, name)
  JOIN pg_attribute a ON a.attrelid = to_regclass(format('%I.%I', w.schema, w.name)) AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_type y ON y.oid = a.atttypid AND y.typtype IN ('e', 'd', 'r') JOIN pg_namespace n ON n.oid = y.typnamespace
 WHERE n.nspname <> 'pg_catalog' AND NOT EXISTS (
    SELECT FROM pg_attribute o JOIN pg_class c ON c.oid = o.attrelid AND c.relkind IN ('r', 'p', 'f') JOIN pg_namespace cn ON cn.oid = c.relnamespace
     WHERE o.atttypid = y.oid AND NOT o.attisdropped AND (cn.nspname::text, c.relname::text) NOT IN (SELECT * FROM unnest($1::text[], $2::text[])))";

impl Hidden {
    /// Reads it of both sides.
    pub async fn read(transform: &Transform, legacy: &Client, new: &Client) -> Result<Self, tokio_postgres::Error> {
        let mut hidden = Self::default();
        if transform.is_empty() {
            return Ok(hidden);
        }
        for (side, client) in [(Side::Legacy, legacy), (Side::New, new)] {
            let tables = transform.tables(side);
            let (schemas, names): (Vec<&str>, Vec<&str>) = tables
                .iter()
                .map(|name| (name.schema.as_str(), name.table.as_str()))
                .unzip();
            let renamed: Vec<&str> = transform.schemas(side).collect();
            client.batch_execute("SET search_path = pg_catalog").await?;
            let rows = client.query(BELONGING, &[&schemas, &names, &renamed]).await?;
            hidden.names.extend(rows.iter().map(|row| row.get::<_, String>(0)));
        }
        Ok(hidden)
    }

    /// Whether a name is one of these, or of something that belongs to one: `public.t`,
    /// `public.t.column`, `relation public.t`, `table constraint c on public.t`.
    fn has(&self, name: &str) -> bool {
        let belongs = |word: &str| {
            self.names.iter().any(|hidden| {
                word.strip_prefix(hidden.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '(']))
            })
        };
        !self.names.is_empty() && (belongs(name) || name.split(' ').any(belongs))
    }

    pub fn leave_out_of(&self, differences: &mut Vec<DefinitionDifference>) {
        differences.retain(|found| !self.has(&found.name));
    }

    pub fn leave_out_of_objects(&self, objects: &mut Objects) {
        objects
            .by_key
            .retain(|(_, name), object| !self.has(name) && !self.has(&object.root));
    }
}

impl Transform {
    /// The tables of a side that are named in the mapping.
    pub fn tables(&self, side: Side) -> BTreeSet<Name> {
        let maps = self.tables.iter();
        match side {
            Side::Legacy => maps.map(|(name, _)| name.clone()).collect(),
            Side::New => maps
                .flat_map(|(_, map)| map.parts.iter().map(|part| part.to.clone()))
                .collect(),
        }
    }

    /// The schemas of a side that have another name on the other one.
    pub fn schemas(&self, side: Side) -> impl Iterator<Item = &str> {
        self.schemas.iter().map(move |(legacy, new)| match side {
            Side::Legacy => legacy.as_str(),
            Side::New => new.as_str(),
        })
    }

    /// Whether a side's table has another shape or name on the other one.
    pub fn concerns(&self, side: Side, schema: &str, table: &str) -> bool {
        let name = Name::new(schema, table);
        self.schemas(side).any(|renamed| renamed == schema)
            || match side {
                Side::Legacy => self.tables.contains_key(&name),
                Side::New => self
                    .tables
                    .values()
                    .any(|map| map.parts.iter().any(|part| part.to == name)),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_transformed_table() {
        let hidden = Hidden {
            names: ["public.t".to_owned(), "public.t_pkey".to_owned(), "sales".to_owned()].into(),
        };
        for (name, expected) in [
            ("public.t", true),
            ("public.t.a", true),
            ("relation public.t", true),
            ("table constraint c on public.t", true),
            ("public.t_pkey", true),
            ("public.t_other", false),
            ("public.other", false),
            ("sales", true),
            ("schema sales", true),
            ("sales.f(integer)", true),
            ("salesman", false),
        ] {
            assert_eq!(hidden.has(name), expected, "{name}");
        }
        assert!(!Hidden::default().has("public.t"));
    }
}
