//! Sequences follow the columns that own them: what they are called on the other side.

use std::collections::HashMap;

use tokio_postgres::Client;

/// `(schema, name)`
type Sequence = (String, String);

/// Sequences that a column owns: their name, and the column's.
const OWNED: &str = "\
    SELECT sn.nspname::text, s.relname::text, tn.nspname::text, t.relname::text, a.attname::text, t.oid AS table
      FROM pg_catalog.pg_class s JOIN pg_catalog.pg_namespace sn ON sn.oid = s.relnamespace
      JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = s.oid
                                 AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i')
      JOIN pg_catalog.pg_class t ON t.oid = d.refobjid JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
      JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
     WHERE s.relkind = 'S'";

/// The primary's sequences that have another name on the secondary, by what proxy.yaml's mapping has
/// installed on the primary. Owned ones follow their column, where that is carried over as it is;
/// others their schema.
pub async fn renamed(
    primary: &Client,
    secondary: &Client,
) -> Result<HashMap<Sequence, Sequence>, tokio_postgres::Error> {
    let installed = "SELECT to_regclass('pgtandem.transform') IS NOT NULL";
    if !primary.query_one(installed, &[]).await?.get::<_, bool>(0) {
        return Ok(HashMap::new());
    }
    let mut renamed = HashMap::new();
    let in_schemas = primary
        .query(
            "SELECT n.nspname::text, c.relname::text, x.other FROM pgtandem.transform_schema x
               JOIN pg_catalog.pg_namespace n ON n.nspname = x.name
               JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relkind = 'S'",
            &[],
        )
        .await?;
    for row in &in_schemas {
        let (schema, name, other): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        renamed.insert((schema, name.clone()), (other, name));
    }
    let here = primary
        .query(
            &format!(
                "SELECT o.nspname, o.relname, f.schema, f.name, p.pair ->> 0
                   FROM ({OWNED}) AS o(nspname, relname, schema, name, attname, rel)
                   JOIN pgtandem.transform f ON f.source = o.rel
                  CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(f.same) AS p(pair) WHERE p.pair ->> 1 = o.attname"
            ),
            &[],
        )
        .await?;
    if here.is_empty() {
        return Ok(renamed);
    }
    let there: HashMap<(String, String, String), Sequence> = secondary
        .query(OWNED, &[])
        .await?
        .iter()
        .map(|row| ((row.get(2), row.get(3), row.get(4)), (row.get(0), row.get(1))))
        .collect();
    for row in &here {
        let owner = (row.get(2), row.get(3), row.get(4));
        if let Some(sequence) = there.get(&owner) {
            renamed.insert((row.get(0), row.get(1)), sequence.clone());
        }
    }
    Ok(renamed)
}
