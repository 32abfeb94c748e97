//! Where the rows of a mirrored table are read on the primary: in the table, or through the face of a
//! table that has another shape there (see [`crate::transform`]).

use tokio_postgres::Client;

use super::key::{WalkKey, walk_key};
use crate::catalog::quote::qualified;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// What rows are read from.
    pub relation: String,
    /// The table that holds them.
    pub table: String,
    /// A face: rows have no place of their own, and no index is built on it.
    pub is_face: bool,
    /// By which rows are walked, in the columns of `relation`.
    pub key: Option<WalkKey>,
}

impl Place {
    /// A table of this name, as it is.
    pub(super) async fn table(client: &Client, schema: &str, name: &str) -> Result<Self, tokio_postgres::Error> {
        let table = qualified(schema, name);
        Ok(Self {
            relation: table.clone(),
            key: walk_key(client, schema, name).await?,
            table,
            is_face: false,
        })
    }

    /// Of what is mirrored under this name.
    pub(super) async fn on_primary(primary: &Client, schema: &str, name: &str) -> Result<Self, tokio_postgres::Error> {
        let face = primary
            .query_opt(
                "SELECT pg_catalog.format('pgtandem.%I', t.face), n.nspname::text, c.relname::text, t.same::text
                   FROM pgtandem.transform t JOIN pg_catalog.pg_class c ON c.oid = t.source JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE t.schema = $1 AND t.name = $2",
                &[&schema, &name],
            )
            .await?;
        let Some(face) = face else {
            return Self::table(primary, schema, name).await;
        };
        let (schema, name): (&str, &str) = (face.get(1), face.get(2));
        // Our own; on a surprise there is no key, which is slow and right.
        let same: Vec<(String, String, bool)> = serde_json::from_str(face.get(3)).unwrap_or_default();
        Ok(Self {
            relation: face.get(0),
            key: walk_key(primary, schema, name)
                .await?
                .and_then(|key| renamed(key, &same)),
            table: qualified(schema, name),
            is_face: true,
        })
    }
}

/// The key in the other side's names; `None` where a column of it has another type there, so that no
/// index serves it.
fn renamed(mut key: WalkKey, same: &[(String, String, bool)]) -> Option<WalkKey> {
    for column in &mut key.columns {
        let (to, _, _) = same.iter().find(|(_, from, alike)| *alike && *from == column.name)?;
        column.name.clone_from(to);
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::key::KeyColumn;

    #[test]
    fn a_key_is_walked_where_its_columns_are_the_same() {
        let key = |names: &[&str]| WalkKey {
            columns: names
                .iter()
                .map(|&name| KeyColumn {
                    name: name.into(),
                    type_name: "integer".into(),
                    order: None,
                })
                .collect(),
        };
        let same = [
            ("id".into(), "kdnr".into(), true),
            ("big".into(), "small".into(), false),
        ];
        assert_eq!(renamed(key(&["kdnr"]), &same), Some(key(&["id"])));
        assert_eq!(renamed(key(&["kdnr", "small"]), &same), None);
        assert_eq!(renamed(key(&["other"]), &same), None);
    }
}
