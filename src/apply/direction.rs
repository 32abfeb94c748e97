//! The first watermark of a new direction, taken while nobody can write on the new primary.

use std::collections::HashMap;

use serde_json::{Value, json};
use tokio_postgres::{Client, Row};

use super::seeding::FINGERPRINT;
use super::{ApplyError, doing};
use crate::catalog::quote::literal;
use crate::catalog::{Oid, PINNED_SETTINGS};
use crate::control::{Epoch, Side};

/// Why a direction could not be begun.
#[derive(Debug, thiserror::Error)]
#[error("begin the new direction: {0}")]
pub struct BeginError(String);

impl From<ApplyError> for BeginError {
    fn from(error: ApplyError) -> Self {
        Self(error.to_string())
    }
}

/// Makes `secondary` follow `primary` from now on, in `epoch`. To be called under the fence,
/// after the last round of the old direction and before anyone may write on `primary`.
///
/// The watermark is a snapshot of the new primary as it is now. What its journal still holds
/// of an earlier epoch is seen by that snapshot, so it is never applied. The tables are those of
/// the old direction the other way round: what was synced is synced.
pub async fn begin_direction(
    primary: &Client,
    secondary: &mut Client,
    primary_side: Side,
    epoch: Epoch,
) -> Result<(), BeginError> {
    begin(primary, secondary, primary_side, epoch, Trial::No).await?;
    Ok(())
}

/// As [`begin_direction`], and takes it back: finds what would be in its way while nobody waits, and
/// keeps what takes time for [`begin_as_tried`].
pub async fn try_direction(
    primary: &Client,
    secondary: &mut Client,
    primary_side: Side,
    epoch: Epoch,
) -> Result<Tried, BeginError> {
    let tables = begin(primary, secondary, primary_side, epoch, Trial::Yes).await?;
    Ok(Tried(tables))
}

/// As [`begin_direction`], with what a trial has read. False, with nothing done, where the new
/// primary's definitions, or what is known of its tables, have changed since.
pub async fn begin_as_tried(
    primary: &Client,
    secondary: &mut Client,
    primary_side: Side,
    epoch: Epoch,
    Tried(tables): &Tried,
) -> Result<bool, BeginError> {
    let (head, standing) = Head::take(primary).await?;
    if standing != tables.standing {
        return Ok(false);
    }
    let record = tables.record_sql(&head, primary_side, epoch);
    write(secondary, &record, Trial::No).await?;
    Ok(true)
}

/// What a trial has read. In a database of a thousand tables that takes a second, for which clients
/// need not be held.
pub struct Tried(Tables);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trial {
    Yes,
    No,
}

async fn begin(
    primary: &Client,
    secondary: &mut Client,
    primary_side: Side,
    epoch: Epoch,
    trial: Trial,
) -> Result<Tables, ApplyError> {
    let tables = Tables::read(primary, secondary).await?;
    let (head, _) = Head::take(primary).await?;
    let record = tables.record_sql(&head, primary_side, epoch);
    write(secondary, &record, trial).await?;
    Ok(tables)
}

/// What tables are read from, beside the catalogs that [`FINGERPRINT`] watches: `(key, rows)`.
const WATCHED_TOO: [(&str, &str); 4] = [
    ("oid", "pg_type WHERE oid >= 16384"),
    ("oid", "pg_proc WHERE pronamespace = 'pgtandem'::regnamespace"),
    ("rel", "pgtandem.seeding"),
    ("rel", "pgtandem.transform"),
];

/// An expression that changes with every definition, and with what is known of the tables; much cheaper
/// than to read them.
fn standing_sql() -> String {
    let more = WATCHED_TOO.map(|(key, rows)| {
        format!("(SELECT concat(count(*), ':', sum(hashint8({key}::bigint * 4294967296 + xmin::text::bigint)::bigint)) FROM {rows})")
    });
    format!("concat_ws(' ', ({FINGERPRINT}), {})", more.join(", "))
}

/// Where a direction begins.
struct Head {
    snapshot: String,
    position: String,
    /// The old direction's last.
    round: i64,
    /// Tables of which the new primary lacks something.
    left_behind: Vec<Oid>,
}

impl Head {
    /// With [`standing_sql`] in the same snapshot.
    async fn take(primary: &Client) -> Result<(Self, String), ApplyError> {
        let row = primary
            .query_one(
                &format!(
                    "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text,
                            COALESCE((SELECT w.round FROM pgtandem.watermark w), 0), ARRAY({LEFT_BEHIND}), {}",
                    standing_sql()
                ),
                &[],
            )
            .await
            .map_err(doing("take the first snapshot"))?;
        let head = Self {
            snapshot: row.get(0),
            position: row.get(1),
            round: row.get(2),
            left_behind: row.get(3),
        };
        Ok((head, row.get(4)))
    }
}

/// The new direction's tables.
struct Tables {
    /// [`standing_sql`] before they were read.
    standing: String,
    /// Rows of `pgtandem.seeding`.
    rows: Value,
    faces: HashMap<Oid, Vec<Behind>>,
}

impl Tables {
    async fn read(primary: &Client, secondary: &Client) -> Result<Self, ApplyError> {
        primary
            .batch_execute(PINNED_SETTINGS)
            .await
            .map_err(doing("prepare the connection"))?;
        let (_, standing) = Head::take(primary).await?;
        // What the applier's DDL changed here went past the hook: the records of captured tables
        // are brought up to date, or the next DDL would take it for its own.
        primary
            .batch_execute(
                "UPDATE pgtandem.captured c
                    SET schema = s.schema, name = s.name, shape = s.shape, filenode = s.filenode,
                        attributes = s.attributes, attribute_count = s.attribute_count, names = s.names
                   FROM pgtandem.shape s
                  WHERE s.rel = c.rel AND (s.schema, s.name, s.shape, s.filenode, s.attributes, s.attribute_count, s.names)
                        IS DISTINCT FROM (c.schema, c.name, c.shape, c.filenode, c.attributes, c.attribute_count, c.names)",
            )
            .await
            .map_err(doing("refresh the captured tables"))?;
        let tables = primary
            .query(
                // What is put together from several tables is no better than the worst of them.
                "SELECT h.rel, s.rel, h.schema, h.name, CASE WHEN o.synced THEN s.state ELSE 'unseeded' END, COALESCE(s.paused, o.paused), s.note,
                        h.columns, h.shape, h.filenode, h.attributes, h.rel <> h.source, h.exact
                   FROM pgtandem.seeding s JOIN pgtandem.mirrored h ON h.source = s.local
                  CROSS JOIN LATERAL (SELECT bool_and(o.state = 'synced') OR cardinality(h.sources) = 1 AS synced, min(o.paused) AS paused
                                        FROM pgtandem.seeding o WHERE o.local = ANY (h.sources)) o",
                &[],
            )
            .await
            .map_err(doing("read the old direction's tables"))?;
        let faces = faces_of(secondary).await?;
        let rows = tables.iter().map(|row| turned_round(row, &faces)).collect();
        Ok(Self { standing, rows, faces })
    }

    /// Statements that make the direction's records, all at once: clients are held meanwhile.
    fn record_sql(&self, head: &Head, primary_side: Side, epoch: Epoch) -> String {
        let tables_of = |rel: &Oid| match self.faces.get(rel) {
            Some(tables) => tables.iter().map(|table| table.oid.to_string()).collect(),
            None => vec![rel.to_string()],
        };
        let left_behind: Vec<String> = head.left_behind.iter().flat_map(tables_of).collect();
        format!(
            "SET LOCAL synchronous_commit = on; DELETE FROM pgtandem.seeding;
             INSERT INTO pgtandem.seeding (rel, local, schema, name, state, paused, note, columns, shape, filenode, attributes)
             SELECT rel, local, schema, name, state, paused, note, columns, shape, filenode, attributes
               FROM pg_catalog.json_to_recordset({rows}::json) AS t(rel oid, local oid, schema text, name text, state text, paused text,
                    note text, columns text, shape text, filenode oid, attributes text);
             -- A forced flip leaves what is in quarantine, or was discarded, on the old primary only.
             UPDATE pgtandem.seeding SET state = 'unseeded',
                    note = 'a forced switchover left transactions behind that the new primary never had'
              WHERE local = ANY ('{{{left_behind}}}'::oid[]);
             INSERT INTO pgtandem.watermark AS w (epoch, primary_side, round, snapshot, position)
             VALUES ({epoch}, '{primary_side}', {round}, {snapshot}, {position}::pg_lsn)
             ON CONFLICT (one) DO UPDATE SET epoch = EXCLUDED.epoch, primary_side = EXCLUDED.primary_side,
                 round = GREATEST(w.round, EXCLUDED.round), snapshot = EXCLUDED.snapshot, position = EXCLUDED.position,
                 target = NULL, target_position = NULL, piece = NULL, outside = NULL, applied_at = pg_catalog.clock_timestamp()",
            rows = literal(&self.rows.to_string()),
            left_behind = left_behind.join(","),
            epoch = epoch.0,
            round = head.round,
            snapshot = literal(&head.snapshot),
            position = literal(&head.position),
        )
    }
}

async fn write(secondary: &mut Client, record: &str, trial: Trial) -> Result<(), ApplyError> {
    let transaction = secondary
        .transaction()
        .await
        .map_err(doing("begin the new direction"))?;
    transaction
        .batch_execute(record)
        .await
        .map_err(doing("begin the new direction"))?;
    let ended = match trial {
        Trial::Yes => transaction.rollback().await,
        Trial::No => transaction.commit().await,
    };
    ended.map_err(doing("begin the new direction"))
}

/// A row of `pgtandem.seeding` for the new direction, from what the old one knew of the table.
fn turned_round(row: &Row, faces: &HashMap<Oid, Vec<Behind>>) -> Value {
    let (rel, old): (Oid, Oid) = (row.get(0), row.get(1));
    let behind = faces.get(&old).and_then(|tables| {
        let same_name = |table: &&Behind| (table.schema.as_str(), table.name.as_str()) == (row.get(2), row.get(3));
        tables.iter().find(same_name).or_else(|| tables.first())
    });
    let local = behind.map_or(old, |table| table.oid);
    let [schema, name, state, paused, note, columns, shape, attributes] =
        [2, 3, 4, 5, 6, 7, 8, 10].map(|index| row.get::<_, Option<&str>>(index));
    let (has_way_back, exact): (bool, bool) = (row.get(11), row.get(12));
    let (state, paused, note) = if faces.contains_key(&old) && !has_way_back {
        (Some("unseeded"), Some(NO_WAY_BACK), note)
    } else if !exact && state == Some("synced") {
        // Compared when the new direction begins; what the inverse gives need not be what was
        // there before (a dropped column).
        (Some("unseeded"), paused, Some(COMPUTED_BACK))
    } else {
        (state, paused, note)
    };
    json!({
        "rel": rel, "local": local, "schema": schema, "name": name, "state": state, "paused": paused, "note": note,
        "columns": columns, "shape": shape, "filenode": row.get::<_, Oid>(9), "attributes": attributes,
    })
}

/// Why a table is not mirrored after a forced flip.
const NO_WAY_BACK: &str = "transform: it has no way back to the other side's shape";
/// Why a table is compared after a flip.
const COMPUTED_BACK: &str = "transform: its rows are computed back by expressions, and are compared first";

/// A table behind a face.
struct Behind {
    oid: Oid,
    schema: String,
    name: String,
}

/// The tables behind the old primary's faces.
async fn faces_of(primary: &Client) -> Result<HashMap<Oid, Vec<Behind>>, ApplyError> {
    let rows = primary
        .query(
            "SELECT t.rel, c.oid, n.nspname::text, c.relname::text FROM pgtandem.transform t
               JOIN pg_class c ON c.oid = ANY (t.sources) JOIN pg_namespace n ON n.oid = c.relnamespace",
            &[],
        )
        .await
        .map_err(doing("read the mapping of the two schemas"))?;
    let mut faces: HashMap<Oid, Vec<Behind>> = HashMap::new();
    for row in &rows {
        faces.entry(row.get(0)).or_default().push(Behind {
            oid: row.get(1),
            schema: row.get(2),
            name: row.get(3),
        });
    }
    Ok(faces)
}

/// The old primary's tables of which the new one lacks something. The entries stay there, under
/// the old epoch, for whoever wants to look at them.
const LEFT_BEHIND: &str = "\
SELECT c.rel FROM pgtandem.quarantine_change c JOIN pgtandem.quarantine q ON q.id = c.id
 WHERE NOT c.void AND c.rel <> 0 AND q.epoch = (SELECT w.epoch FROM pgtandem.watermark w)
 UNION
SELECT s.rel FROM pgtandem.seeding s JOIN pgtandem.divergence d ON (d.schema, d.name) = (s.schema, s.name)
 WHERE d.kind = 'discarded'";
