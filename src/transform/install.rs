//! A side's tables as the other side has them, put where the tables are: a view and a function for
//! each face, and one function that knows them all.

use std::collections::BTreeMap;

use tokio_postgres::{Client, Transaction};
use xxhash_rust::xxh3::xxh3_64;

use super::Face;
use crate::catalog::Oid;
use crate::catalog::quote::{identifier, literal};

/// What [`install`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// OIDs under which tables were mirrored until now and are not any more: tables and faces.
    pub left: Vec<Oid>,
    /// The tables whose rows have another shape from now on.
    pub sources: Vec<Oid>,
}

impl Changed {
    pub fn is_empty(&self) -> bool {
        self.left.is_empty() && self.sources.is_empty()
    }
}

/// Makes the side's faces these ones, in one transaction. A face that stays as it was keeps its OID.
/// `fresh`: the other side has no rows of any of them yet, so what the journal holds is all there is.
pub async fn install(
    client: &mut Client,
    faces: &[Face],
    schemas: &BTreeMap<String, String>,
    fresh: bool,
) -> Result<Changed, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction
        .batch_execute("SET LOCAL search_path = pg_catalog; SET LOCAL client_min_messages = warning; LOCK TABLE pgtandem.transform")
        .await?;
    let mut changed = Changed::default();
    let recorded = transaction
        .query(
            "SELECT t.rel, t.sources, t.face, t.definition, EXISTS (SELECT FROM pg_class v WHERE v.oid = t.rel) FROM pgtandem.transform t",
            &[],
        )
        .await?;
    let mut kept: Vec<String> = Vec::new();
    for row in &recorded {
        let (face, definition): (String, String) = (row.get(2), row.get(3));
        if row.get(4)
            && faces
                .iter()
                .any(|wanted| wanted.name() == face && wanted.definition() == definition)
        {
            kept.push(face);
            continue;
        }
        changed.left.push(row.get(0));
        changed.sources.extend(row.get::<_, Vec<Oid>>(1));
        remove(&transaction, row.get(0), &face).await?;
    }
    for face in faces.iter().filter(|face| !kept.contains(&face.name())) {
        put(&transaction, face).await?;
        changed.left.extend(face.sources());
        changed.sources.extend(face.sources());
    }
    let (names, others): (Vec<&String>, Vec<&String>) = schemas.iter().unzip();
    transaction
        .execute("DELETE FROM pgtandem.transform_schema", &[])
        .await?;
    transaction
        .execute(
            "INSERT INTO pgtandem.transform_schema SELECT * FROM unnest($1::text[], $2::text[])",
            &[&names, &others],
        )
        .await?;
    if !changed.is_empty() {
        know_all(&transaction).await?;
    }
    if !fresh {
        transaction
            .execute(
                "UPDATE pgtandem.captured SET was_empty = false WHERE rel = ANY ($1)",
                &[&changed.sources],
            )
            .await?;
    }
    transaction.commit().await?;
    Ok(changed)
}

async fn remove(transaction: &Transaction<'_>, rel: Oid, name: &str) -> Result<(), tokio_postgres::Error> {
    let name = identifier(name);
    transaction
        .batch_execute(&format!(
            "DELETE FROM pgtandem.transform WHERE rel = {rel};
             DROP VIEW IF EXISTS pgtandem.{name}; DROP FUNCTION IF EXISTS pgtandem.{name}"
        ))
        .await
}

async fn put(transaction: &Transaction<'_>, face: &Face) -> Result<(), tokio_postgres::Error> {
    let same = serde_json::to_string(&face.same).unwrap_or_default();
    transaction.batch_execute(&face.objects()).await?;
    transaction
        .execute(
            "INSERT INTO pgtandem.transform (rel, face, source, schema, name, columns, same, exact, definition, sources)
             SELECT c.oid, c.relname, $2, $3, $4, $5, $6::text::jsonb, $7, $8, $9 FROM pg_class c
              WHERE c.relnamespace = 'pgtandem'::regnamespace AND c.relname = $1::text",
            &[
                &face.name(),
                &face.source_oid,
                &face.target.schema,
                &face.target.table,
                &face.columns_json(),
                &same,
                &face.exact,
                &face.definition(),
                &face.sources(),
            ],
        )
        .await?;
    Ok(())
}

/// The function that finds the face of an image.
async fn know_all(transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
    let rows = transaction
        .query(
            "SELECT rel, face FROM pgtandem.transform WHERE cardinality(sources) = 1 ORDER BY rel",
            &[],
        )
        .await?;
    let arms: String = rows
        .iter()
        .map(|row| {
            format!(
                "WHEN {} THEN RETURN pgtandem.{}(image); ",
                row.get::<_, Oid>(0),
                identifier(row.get(1))
            )
        })
        .collect();
    let body = if arms.is_empty() {
        "BEGIN RETURN image; END".to_owned()
    } else {
        format!("BEGIN CASE rel {arms}ELSE RETURN image; END CASE; END")
    };
    transaction
        .batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION pgtandem.transformed(rel oid, image text) RETURNS text
             LANGUAGE plpgsql STABLE AS {};
             REVOKE ALL ON FUNCTION pgtandem.transformed(oid, text) FROM PUBLIC",
            literal(&body)
        ))
        .await
}

impl Face {
    /// Of the view and of the function: names of the other side may be longer than one may be.
    pub fn name(&self) -> String {
        let target = self.target.to_string();
        let begin: String = target
            .chars()
            .take(12)
            .filter(|c| c.is_ascii_alphanumeric() || *c == '.')
            .collect();
        format!("as_{begin}_{:016x}", xxh3_64(target.as_bytes()))
    }

    /// What the face is made from.
    fn definition(&self) -> String {
        format!(
            "{} {} {} {}",
            self.source_oid,
            self.exact,
            self.columns_json(),
            self.objects()
        )
    }

    fn objects(&self) -> String {
        let name = identifier(&self.name());
        let values: Vec<&str> = self.columns.iter().map(|column| column.sql.as_str()).collect();
        let images = vec!["text"; self.sources().len()].join(", ");
        let missing: Vec<String> = self
            .required_images()
            .iter()
            .map(|at| format!("${at} IS NULL"))
            .collect();
        // What cannot be computed is no image: the secondary refuses it, with these words.
        let body = format!(
            "#variable_conflict use_column
             DECLARE mapped text;
             BEGIN
                 IF {} THEN
                     RETURN NULL;
                 END IF;
                 SELECT ROW({})::text INTO mapped {};
                 RETURN mapped;
             EXCEPTION WHEN OTHERS THEN
                 RETURN 'transform: ' || SQLERRM;
             END",
            missing.join(" OR "),
            values.join(", "),
            self.from_images()
        );
        format!(
            "CREATE VIEW pgtandem.{name} AS SELECT {} {};
             CREATE FUNCTION pgtandem.{name}({images}) RETURNS text
             LANGUAGE plpgsql STABLE SET search_path = pg_catalog AS {};
             REVOKE ALL ON FUNCTION pgtandem.{name}({images}) FROM PUBLIC",
            self.select_list(),
            self.from_tables(),
            literal(&body)
        )
    }
}
