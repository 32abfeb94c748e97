//! The first watermark of a new direction, taken while nobody can write on the new primary.

use std::collections::HashMap;

use serde_json::{Value, json};
use tokio_postgres::{Client, Row};

use super::session::read_watermark;
use super::{ApplyError, doing};
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
    let begun = begin(primary, secondary, primary_side, epoch, Trial::No).await;
    begun.map_err(BeginError::from)
}

/// As [`begin_direction`], and takes it back: finds what would be in its way while nobody waits, and
/// leaves both servers with what they need for it at hand.
pub async fn try_direction(
    primary: &Client,
    secondary: &mut Client,
    primary_side: Side,
    epoch: Epoch,
) -> Result<(), BeginError> {
    let begun = begin(primary, secondary, primary_side, epoch, Trial::Yes).await;
    begun.map_err(BeginError::from)
}

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
) -> Result<(), ApplyError> {
    primary
        .batch_execute(PINNED_SETTINGS)
        .await
        .map_err(doing("prepare the connection"))?;
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
    let head = primary
        .query_one(
            "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text",
            &[],
        )
        .await
        .map_err(doing("take the first snapshot"))?;
    let (snapshot, position): (String, String) = (head.get(0), head.get(1));
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
    let tables_of = |rel: Oid| match faces.get(&rel) {
        Some(tables) => tables.iter().map(|table| table.oid).collect(),
        None => vec![rel],
    };
    let left_behind = held_or_discarded(primary).await?;
    let left_behind: Vec<Oid> = left_behind.into_iter().flat_map(tables_of).collect();
    let old_round = read_watermark(primary).await?.map_or(0, |watermark| watermark.round);

    let transaction = secondary
        .transaction()
        .await
        .map_err(doing("begin the new direction"))?;
    transaction
        .batch_execute("SET LOCAL synchronous_commit = on; DELETE FROM pgtandem.seeding")
        .await
        .map_err(doing("begin the new direction"))?;
    let recorded: Vec<Value> = tables.iter().map(|row| turned_round(row, &faces)).collect();
    // All at once: clients are held meanwhile.
    transaction
        .execute(
            "INSERT INTO pgtandem.seeding (rel, local, schema, name, state, paused, note, columns, shape, filenode, attributes)
             SELECT rel, local, schema, name, state, paused, note, columns, shape, filenode, attributes
               FROM pg_catalog.json_to_recordset($1::text::json) AS t(rel oid, local oid, schema text, name text, state text, paused text,
                    note text, columns text, shape text, filenode oid, attributes text)",
            &[&Value::from(recorded).to_string()],
        )
        .await
        .map_err(doing("record the new direction's tables"))?;
    // A forced flip leaves what is in quarantine, or was discarded, on the old primary only.
    transaction
        .execute(
            "UPDATE pgtandem.seeding SET state = 'unseeded',
                    note = 'a forced switchover left transactions behind that the new primary never had'
              WHERE local = ANY ($1)",
            &[&left_behind],
        )
        .await
        .map_err(doing("record the new direction's tables"))?;
    transaction
        .execute(
            "INSERT INTO pgtandem.watermark AS w (epoch, primary_side, round, snapshot, position)
             VALUES ($1, $2, $3, $4, $5::text::pg_lsn)
             ON CONFLICT (one) DO UPDATE SET epoch = EXCLUDED.epoch, primary_side = EXCLUDED.primary_side,
                 round = GREATEST(w.round, EXCLUDED.round), snapshot = EXCLUDED.snapshot, position = EXCLUDED.position,
                 target = NULL, target_position = NULL, piece = NULL, outside = NULL, applied_at = clock_timestamp()",
            &[
                &(epoch.0 as i64),
                &primary_side.as_str(),
                &(old_round as i64),
                &snapshot,
                &position,
            ],
        )
        .await
        .map_err(doing("store the first watermark"))?;
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
async fn held_or_discarded(primary: &Client) -> Result<Vec<Oid>, ApplyError> {
    let rows = primary
        .query(
            "SELECT c.rel FROM pgtandem.quarantine_change c JOIN pgtandem.quarantine q ON q.id = c.id
              WHERE NOT c.void AND c.rel <> 0 AND q.epoch = (SELECT w.epoch FROM pgtandem.watermark w)
             UNION
             SELECT s.rel FROM pgtandem.seeding s JOIN pgtandem.divergence d ON (d.schema, d.name) = (s.schema, s.name)
              WHERE d.kind = 'discarded'",
            &[],
        )
        .await
        .map_err(doing("look for what the old direction left behind"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
