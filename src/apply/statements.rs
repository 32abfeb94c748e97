//! The SQL that writes one table's difference on the secondary. Pure: text from a table's
//! definition.
//!
//! Images are cast to the table's row type by the secondary itself, so the proxy knows no
//! type. The short statements count on finding what the invariant promises (each old image
//! exactly once, no row where a new one goes) and say by their row count whether they did; only
//! when they did not, the round is written again by the careful ones, which record what was
//! different and end at the primary's image all the same.

use super::held::KeyPlaces;
use crate::catalog::quote::{identifier, literal};
use crate::catalog::table::{Generated, Table, UniqueColumns};

/// Where a statement takes its images from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// `$1::text[]`
    Parameter,
    /// `pgtandem.net`: what the server computed from a piece too large for the proxy.
    Net,
}

/// Which images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Images {
    Gone,
    Come,
}

/// How one table is written.
#[derive(Debug, Clone)]
pub struct Writer {
    table: Table,
    target: String,
    /// The type that an image is cast to: the table's own row type, or one with the primary's
    /// column order.
    row_type: String,
    /// How the secondary writes a row `t` as the primary's image.
    row_text: String,
    /// Where the key's columns stand in an image.
    pub key_positions: Vec<usize>,
    /// Where those of every unique constraint stand.
    pub key_places: KeyPlaces,
    /// Whether an old and a new image with one key may be joined into an UPDATE.
    pub updates: bool,
}

impl Writer {
    /// `image_columns` are the primary's column names in its order.
    pub fn new(table: Table, image_columns: &[String]) -> Self {
        let target = table.qualified();
        let same_order = table.columns.iter().map(|column| &column.name).eq(image_columns);
        let row_type = if same_order { target.clone() } else { image_type(&table) };
        let row_text = if same_order && !table.has_virtual_columns() {
            "(t.*)::text".to_owned()
        } else {
            let fields: Vec<String> = image_columns
                .iter()
                .map(|name| match table.columns.iter().find(|column| column.name == *name) {
                    Some(column) if column.generated != Generated::Virtual => format!("t.{}", identifier(name)),
                    _ => "NULL".to_owned(),
                })
                .collect();
            format!("ROW({})::text", fields.join(", "))
        };
        let places = |unique: &UniqueColumns| -> Vec<usize> {
            let columns = unique.columns.iter();
            columns
                .filter_map(|name| image_columns.iter().position(|column| column == name))
                .collect()
        };
        let key_positions: Vec<usize> = table.key.as_ref().map_or_else(Vec::new, places);
        let key_places = KeyPlaces {
            uniques: table.uniques.iter().map(places).collect(),
        };
        // A GENERATED ALWAYS identity cannot be set by UPDATE; inside the key it keeps its value.
        let identity_outside_key = table.columns.iter().any(|column| {
            column.identity_always && !table.key.as_ref().is_some_and(|key| key.columns.contains(&column.name))
        });
        let settable = settable(&table).next().is_some();
        Self {
            updates: table.key_alone && !identity_outside_key && settable,
            target,
            row_type,
            row_text,
            key_positions,
            key_places,
            table,
        }
    }

    /// How the secondary writes a row `t` as the primary's image.
    pub fn row_text(&self) -> &str {
        &self.row_text
    }

    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The statement that makes [`Self::row_type`], where the secondary's own order differs.
    pub fn create_image_type(&self, image_columns: &[String]) -> Option<String> {
        if self.row_type == self.target {
            return None;
        }
        let columns: Vec<String> = image_columns
            .iter()
            .filter_map(|name| self.table.columns.iter().find(|column| column.name == *name))
            .map(|column| format!("{} {}", identifier(&column.name), column.type_name))
            .collect();
        Some(format!(
            "DROP TYPE IF EXISTS {0}; CREATE TYPE {0} AS ({1})",
            self.row_type,
            columns.join(", ")
        ))
    }

    fn images(&self, source: Source, images: Images) -> String {
        let from = match (source, images) {
            (Source::Parameter, _) => "unnest($1::text[]) AS i(img)".to_owned(),
            (Source::Net, Images::Gone) => {
                "(SELECT img FROM pgtandem.net, generate_series(1, -n) WHERE n < 0) AS i".to_owned()
            }
            (Source::Net, Images::Come) => {
                "(SELECT img FROM pgtandem.net, generate_series(1, n) WHERE n > 0) AS i".to_owned()
            }
        };
        // OFFSET 0 keeps the planner from parsing the image again for every field.
        format!(
            "(SELECT i.img, i.img::{} AS r FROM {from} OFFSET 0) AS o",
            self.row_type
        )
    }

    fn same_key(&self, key: &UniqueColumns) -> String {
        let terms: Vec<String> = key
            .columns
            .iter()
            .zip(&key.operators)
            .map(|(column, operator)| format!("t.{0} {operator} (o.r).{0}", identifier(column)))
            .collect();
        terms.join(" AND ")
    }

    /// What switches off, and on again, the application's triggers and rules that would fire
    /// even for a replica: the primary's have had their effects captured; and row security where
    /// it is forced on the owner. Inside the round's
    /// transaction, so that nobody else sees them off.
    pub fn silence(&self) -> Option<(String, String)> {
        let mut off = Vec::new();
        let mut on = Vec::new();
        for (kind, listed) in [
            ("TRIGGER", &self.table.always_triggers),
            ("RULE", &self.table.always_rules),
        ] {
            for entry in listed {
                let (mode, name) = entry.split_at(1);
                let name = identifier(name);
                let mode = if mode == "A" { "ALWAYS" } else { "REPLICA" };
                off.push(format!("DISABLE {kind} {name}"));
                on.push(format!("ENABLE {mode} {kind} {name}"));
            }
        }
        if self.table.hides_rows {
            off.push("NO FORCE ROW LEVEL SECURITY".to_owned());
            on.push("FORCE ROW LEVEL SECURITY".to_owned());
        }
        (!off.is_empty()).then(|| {
            let alter = |actions: &[String]| format!("ALTER TABLE ONLY {} {}", self.target, actions.join(", "));
            (alter(&off), alter(&on))
        })
    }

    /// Deletes the old images that are there as they should be; its row count says how many.
    pub fn delete(&self, source: Source) -> String {
        match &self.table.key {
            Some(key) => format!(
                "DELETE FROM ONLY {} AS t USING {} WHERE {} AND {} = o.img COLLATE \"C\"",
                self.target,
                self.images(source, Images::Gone),
                self.same_key(key),
                self.row_text
            ),
            None => self.delete_by_text(source),
        }
    }

    /// Without a key: exactly as many matching rows go as there are old images.
    fn delete_by_text(&self, source: Source) -> String {
        format!(
            "WITH o AS (SELECT img, count(*) AS n FROM {} GROUP BY img),
                  m AS (SELECT t.ctid AS at, row_number() OVER (PARTITION BY o.img) AS r, o.n
                          FROM ONLY {} AS t JOIN o ON {} = o.img COLLATE \"C\")
             DELETE FROM ONLY {} AS t WHERE t.ctid = ANY (ARRAY (SELECT m.at FROM m WHERE m.r <= m.n))",
            self.images(source, Images::Gone),
            self.target,
            self.row_text,
            self.target
        )
    }

    /// `$1` old images, `$2` new ones of the same keys.
    pub fn update(&self) -> Option<String> {
        let key = self.table.key.as_ref().filter(|_| self.updates)?;
        let assignments: Vec<String> = settable(&self.table)
            .map(|name| format!("{0} = (o.r).{0}", identifier(name)))
            .collect();
        Some(format!(
            "UPDATE ONLY {} AS t SET {} FROM (SELECT i.old, i.new::{} AS r FROM unnest($1::text[], $2::text[]) AS i(old, new) OFFSET 0) AS o
              WHERE {} AND {} = o.old COLLATE \"C\"",
            self.target,
            assignments.join(", "),
            self.row_type,
            self.same_key(key),
            self.row_text
        ))
    }

    pub fn insert(&self, source: Source) -> String {
        let written: Vec<String> = self
            .table
            .columns
            .iter()
            .filter(|column| column.generated == Generated::No)
            .map(|column| identifier(&column.name))
            .collect();
        if written.is_empty() {
            // A table without columns: a row is a row.
            return format!(
                "INSERT INTO {} SELECT FROM {}",
                self.target,
                self.images(source, Images::Come)
            );
        }
        let values: Vec<String> = written.iter().map(|name| format!("(o.r).{name}")).collect();
        format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}",
            self.target,
            written.join(", "),
            values.join(", "),
            self.images(source, Images::Come)
        )
    }

    /// Records, before the careful deletion, the old images that are not there as they should
    /// be.
    pub fn record_missing(&self, source: Source) -> String {
        let found = self.images(source, Images::Gone);
        match &self.table.key {
            Some(key) => format!(
                "{} CASE WHEN t.ctid IS NULL THEN 'missing' ELSE 'different' END, {}
                   FROM {found} LEFT JOIN ONLY {} AS t ON {}
                  WHERE t.ctid IS NULL OR {} <> o.img COLLATE \"C\"",
                self.record(),
                key_text(key),
                self.target,
                self.same_key(key),
                self.row_text
            ),
            None => format!(
                "WITH o AS (SELECT img, count(*) AS n FROM {found} GROUP BY img),
                      f AS (SELECT o.img, count(*) AS n FROM ONLY {} AS t JOIN o ON {} = o.img COLLATE \"C\" GROUP BY o.img)
                 {} 'missing', md5(o.img) FROM o LEFT JOIN f USING (img), generate_series(1, o.n - COALESCE(f.n, 0))",
                self.target,
                self.row_text,
                self.record()
            ),
        }
    }

    /// Deletes whatever stands under the images' keys (all rows alike without a key).
    pub fn delete_carefully(&self, source: Source) -> String {
        match &self.table.key {
            Some(key) => self.delete_where(source, Images::Gone, key),
            None => self.delete_by_text(source),
        }
    }

    /// For every unique index that the primary has as well: what records, and what removes, rows
    /// that stand where new ones go. `theirs` are the columns of the primary's unique indexes. A
    /// row in the way of an index that only the secondary has may be one that belongs there.
    pub fn make_room(&self, source: Source, theirs: &[Vec<String>]) -> Vec<(String, String)> {
        self.table
            .uniques
            .iter()
            .filter(|unique| theirs.iter().any(|columns| same_set(columns, &unique.columns)))
            .map(|unique| {
                let record = format!(
                    "{} 'unexpected', {} FROM {} JOIN ONLY {} AS t ON {}",
                    self.record(),
                    key_text(unique),
                    self.images(source, Images::Come),
                    self.target,
                    self.same_key(unique)
                );
                (record, self.delete_where(source, Images::Come, unique))
            })
            .collect()
    }

    fn delete_where(&self, source: Source, images: Images, unique: &UniqueColumns) -> String {
        format!(
            "DELETE FROM ONLY {} AS t USING {} WHERE {}",
            self.target,
            self.images(source, images),
            self.same_key(unique)
        )
    }

    fn record(&self) -> String {
        format!(
            "INSERT INTO pgtandem.divergence (round, schema, name, kind, key)
             SELECT (SELECT w.round FROM pgtandem.watermark w), {}, {},",
            literal(&self.table.schema),
            literal(&self.table.name)
        )
    }
}

fn same_set(one: &[String], other: &[String]) -> bool {
    one.len() == other.len() && one.iter().all(|column| other.contains(column))
}

fn key_text(key: &UniqueColumns) -> String {
    let fields: Vec<String> = key
        .columns
        .iter()
        .map(|column| format!("(o.r).{}", identifier(column)))
        .collect();
    format!("ROW({})::text", fields.join(", "))
}

/// The composite type with the primary's column order, for a table whose own differs.
fn image_type(table: &Table) -> String {
    format!("pgtandem.image_{}", table.oid)
}

/// Columns that an UPDATE sets: not the key (its text is the same), not what the server
/// computes.
fn settable(table: &Table) -> impl Iterator<Item = &String> {
    let key = table.key.as_ref().map_or(&[][..], |key| &key.columns);
    table
        .columns
        .iter()
        .filter(|column| column.generated == Generated::No && !column.identity_always)
        .map(|column| &column.name)
        .filter(move |name| !key.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::table::Column;

    fn column(name: &str) -> Column {
        Column {
            name: name.to_owned(),
            type_name: "integer".into(),
            generated: Generated::No,
            identity_always: false,
        }
    }

    fn unique(columns: &[&str], primary: bool) -> UniqueColumns {
        UniqueColumns {
            primary,
            not_null: true,
            columns: columns.iter().map(|&name| name.to_owned()).collect(),
            operators: columns.iter().map(|_| "OPERATOR(pg_catalog.=)".to_owned()).collect(),
        }
    }

    fn table() -> Table {
        Table {
            oid: 7,
            schema: "S".into(),
            name: "t\"x".into(),
            columns: vec![column("a"), column("b"), column("c")],
            key: Some(unique(&["b"], true)),
            uniques: vec![unique(&["b"], true)],
            key_alone: true,
            always_triggers: vec![],
            always_rules: vec![],
            hides_rows: false,
        }
    }

    fn names(columns: &[&str]) -> Vec<String> {
        columns.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_same_order_needs_no_type_of_its_own() {
        let writer = Writer::new(table(), &names(&["a", "b", "c"]));
        assert_eq!(writer.key_positions, [1]);
        assert!(writer.updates);
        assert_eq!(writer.create_image_type(&names(&["a", "b", "c"])), None);
        let update = writer.update().unwrap();
        assert!(
            update.contains("SET \"a\" = (o.r).\"a\", \"c\" = (o.r).\"c\" FROM"),
            "{update}"
        );
        assert!(update.contains("i.new::\"S\".\"t\"\"x\""), "{update}");
    }

    #[test]
    fn another_order_gets_one() {
        let order = names(&["c", "b", "a"]);
        let writer = Writer::new(table(), &order);
        assert!(
            writer
                .create_image_type(&order)
                .unwrap()
                .contains("(\"c\" integer, \"b\" integer, \"a\" integer)")
        );
        assert!(
            writer
                .delete(Source::Parameter)
                .contains("ROW(t.\"c\", t.\"b\", t.\"a\")::text")
        );
    }

    #[test]
    fn generated_and_identity_columns() {
        let mut generated = table();
        generated.columns[0].generated = Generated::Stored;
        generated.columns[2].identity_always = true;
        let writer = Writer::new(generated.clone(), &names(&["a", "b", "c"]));
        assert!(!writer.updates, "an identity outside the key cannot be set");
        assert!(
            writer
                .insert(Source::Parameter)
                .contains("(\"b\", \"c\") OVERRIDING SYSTEM VALUE")
        );
        generated.columns[0].generated = Generated::Virtual;
        let writer = Writer::new(generated, &names(&["a", "b", "c"]));
        assert!(
            writer
                .delete(Source::Parameter)
                .contains("ROW(NULL, t.\"b\", t.\"c\")::text")
        );
    }

    #[test]
    fn triggers_that_fire_for_replicas_are_silenced() {
        let mut noisy = table();
        noisy.always_triggers = vec!["Aone".into(), "Rtwo".into()];
        let (off, on) = Writer::new(noisy, &names(&["a", "b", "c"])).silence().unwrap();
        assert!(
            off.ends_with("DISABLE TRIGGER \"one\", DISABLE TRIGGER \"two\""),
            "{off}"
        );
        assert!(
            on.ends_with("ENABLE ALWAYS TRIGGER \"one\", ENABLE REPLICA TRIGGER \"two\""),
            "{on}"
        );
        assert_eq!(Writer::new(table(), &names(&["a", "b", "c"])).silence(), None);
    }

    #[test]
    fn a_second_unique_index_forbids_updates() {
        let mut two = table();
        two.key_alone = false;
        two.uniques.push(unique(&["a", "c"], false));
        let writer = Writer::new(two, &names(&["a", "b", "c"]));
        assert_eq!(writer.update(), None);
        let theirs = [names(&["b"]), names(&["c", "a"])];
        assert_eq!(writer.make_room(Source::Net, &theirs).len(), 2);
        assert_eq!(writer.make_room(Source::Net, &theirs[..1]).len(), 1);
    }
}
