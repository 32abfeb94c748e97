//! Every object of a database with what its statements are made from, as the catalogs have it:
//! the ground on which one side's definitions are brought in line with the other's. What is
//! temporary, an extension's, or in schema `pgtandem` is no part of it.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio_postgres::Client;

use super::Oid;

/// Kind (`table`, `column`, `index`, …) and name, ready to be pasted into SQL.
pub type Key = (String, String);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The table or other object that it goes with, by name.
    pub root: String,
    pub owner: String,
    /// What its statements are made from; the fields depend on the kind (objects.sql).
    pub recipe: Value,
    pub depends: Vec<Key>,
}

/// Objects of one database.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Objects {
    /// The server's major version.
    pub major: u32,
    pub by_key: BTreeMap<Key, Object>,
}

impl Objects {
    /// Reads all of them. The session has the [pinned settings](super::PINNED_SETTINGS).
    pub async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        Self::read_by(client, SQL).await
    }

    /// The same by the function in schema `pgtandem`, which is planned well in any session.
    pub async fn read_installed(client: &Client) -> Result<Self, tokio_postgres::Error> {
        Self::read_by(client, "SELECT * FROM pgtandem.objects($1)").await
    }

    async fn read_by(client: &Client, sql: &str) -> Result<Self, tokio_postgres::Error> {
        let major = client
            .query_one("SELECT current_setting('server_version_num')::int / 10000", &[])
            .await?
            .get::<_, i32>(0);
        let rows = client.query(sql, &[&None::<Vec<Oid>>]).await?;
        let rows = rows.iter().map(|row| {
            let texts: [String; 6] = std::array::from_fn(|index| row.get(index));
            texts
        });
        Ok(Self::from_rows(major as u32, rows))
    }

    /// Rows of [`SQL`]: kind, name, root, owner, recipe, dependencies.
    pub fn from_rows(major: u32, rows: impl Iterator<Item = [String; 6]>) -> Self {
        let by_key = rows
            .map(|[kind, name, root, owner, recipe, depends]| {
                let object = Object {
                    root,
                    owner,
                    recipe: serde_json::from_str(&recipe).unwrap_or_default(),
                    depends: serde_json::from_str(&depends).unwrap_or_default(),
                };
                ((kind, name), object)
            })
            .collect();
        Self { major, by_key }
    }

    /// A table's columns, by name.
    pub fn columns_of(&self, table: &str) -> impl Iterator<Item = &Object> {
        let first = ("column".to_owned(), format!("{table}."));
        let listed = self.by_key.range(first.clone()..);
        let table = table.to_owned();
        listed
            .take_while(move |(key, _)| key.0 == first.0 && key.1.starts_with(&first.1))
            .map(|(_, object)| object)
            .filter(move |object| object.root == table)
    }

    pub fn get(&self, kind: &str, name: &str) -> Option<&Object> {
        self.by_key.get(&(kind.to_owned(), name.to_owned()))
    }
}

/// `$1`: the OIDs of the roots that are wanted, or NULL for all.
pub const SQL: &str = include_str!("objects.sql");
