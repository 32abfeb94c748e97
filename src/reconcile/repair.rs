//! Verify, mend what differs, verify that again.
//!
//! The rows to mend come from a verification; what they are mended to is read anew at the cut at
//! which they are mended, so a row that changed meanwhile is brought to what it is then.

use tokio::sync::mpsc;

use super::place::Place;
use super::report::{DatabaseReport, Event, TableReport, TableResult};
use super::verify::{Chosen, Options, verify};
use super::{Sides, VerifyError};
use crate::apply::{Mend, MendRows, Mended};
use crate::catalog::PINNED_SETTINGS;
use crate::upstream::control::connect;

/// Rows mended at one cut: the applier stands still meanwhile.
const AT_ONE_CUT: usize = 5_000;
/// Differing rows of a table that one pass remembers.
const AT_ONE_PASS: usize = 50_000;
/// Further passes find what the one before had no room for.
const PASSES_MAX: usize = 20;

/// Mends what differs; the report is of the last verification. A dry run is a verification.
///
/// # Errors
/// As [`verify`]; or a table's rows cannot be mended, and why.
pub async fn repair(
    sides: &Sides,
    options: &Options,
    actor: &str,
    events: &mpsc::Sender<Event>,
) -> Result<DatabaseReport, VerifyError> {
    let mut looking = Options {
        keep: AT_ONE_PASS,
        ..options.clone()
    };
    if options.chosen == Chosen::All {
        mend_held(sides, actor, events).await?;
    }
    let mut report = look(sides, &looking, events).await?;
    for _ in 0..PASSES_MAX {
        let differing: Vec<&TableReport> = report
            .tables
            .iter()
            .filter(|table| table.result == TableResult::Different)
            .collect();
        let sequences = report.sequences.iter().any(|sequence| !sequence.equal);
        if differing.is_empty() && !sequences {
            break;
        }
        if sequences {
            mend(sides, Mend::Sequences).await?;
        }
        for table in &differing {
            mend_table(sides, table, actor, events).await?;
        }
        looking.chosen = match options.chosen {
            Chosen::All if sequences => Chosen::All,
            _ => Chosen::Named(differing.iter().map(|table| table.qualified()).collect()),
        };
        let again = look(sides, &looking, events).await?;
        clear_divergences(sides, &again).await?;
        report = merged(report, again);
    }
    let done = Event::Done {
        report: Box::new(report.clone()),
    };
    events.send(done).await.map_err(|_| VerifyError::Abandoned)?;
    Ok(report)
}

/// A verification whose end is not the end of it all.
async fn look(sides: &Sides, options: &Options, events: &mpsc::Sender<Event>) -> Result<DatabaseReport, VerifyError> {
    let (sender, mut heard) = mpsc::channel(8);
    let relay = async {
        while let Some(event) = heard.recv().await {
            if !matches!(event, Event::Done { .. }) && events.send(event).await.is_err() {
                // Dropping the receiver abandons the verification.
                return;
            }
        }
    };
    let verified = async {
        let sender = sender;
        verify(sides, options, &sender).await
    };
    let (report, ()) = tokio::join!(verified, async {
        relay.await;
    });
    report
}

/// The last word on each table.
fn merged(mut before: DatabaseReport, again: DatabaseReport) -> DatabaseReport {
    for table in again.tables {
        match before
            .tables
            .iter_mut()
            .find(|old| (&old.schema, &old.name) == (&table.schema, &table.name))
        {
            Some(old) => *old = table,
            None => before.tables.push(table),
        }
    }
    if !again.sequences.is_empty() {
        before.sequences = again.sequences;
    }
    before.cuts.extend(again.cuts);
    before.ended = again.ended;
    before.equal = before.tables.iter().all(|table| table.result == TableResult::Equal)
        && before.sequences.iter().all(|sequence| sequence.equal);
    before
}

async fn mend_table(
    sides: &Sides,
    table: &TableReport,
    actor: &str,
    events: &mpsc::Sender<Event>,
) -> Result<(), VerifyError> {
    let refused = |why: VerifyError| VerifyError::NotMended(format!("{}: {why}", table.qualified()));
    for rows in table.differing_rows.chunks(AT_ONE_CUT) {
        let keys: Vec<Vec<String>> = rows.iter().filter_map(|row| row.key.clone()).collect();
        let rows = if keys.is_empty() {
            let mut images: Vec<String> = rows.iter().filter_map(|row| row.image.clone()).collect();
            images.sort_unstable();
            images.dedup();
            MendRows::Images(images)
        } else {
            MendRows::Keys {
                columns: key_columns(sides, table).await?,
                keys,
            }
        };
        let order = Mend::Rows {
            schema: table.schema.clone(),
            name: table.name.clone(),
            rows,
            actor: actor.to_owned(),
        };
        let mended = mend(sides, order).await.map_err(refused)?;
        let event = Event::Mended {
            database: sides.database.clone(),
            table: table.qualified(),
            round: mended.round,
            deleted: mended.deleted,
            inserted: mended.inserted,
        };
        events.send(event).await.map_err(|_| VerifyError::Abandoned)?;
    }
    Ok(())
}

/// What is in quarantine first: its rows differ, and can only be mended together.
async fn mend_held(sides: &Sides, actor: &str, events: &mpsc::Sender<Event>) -> Result<(), VerifyError> {
    let actor = actor.to_owned();
    let mended = mend(sides, Mend::Held { actor }).await?;
    if mended.round == 0 {
        return Ok(());
    }
    let event = Event::Mended {
        database: sides.database.clone(),
        table: "all that was in quarantine".into(),
        round: mended.round,
        deleted: mended.deleted,
        inserted: mended.inserted,
    };
    events.send(event).await.map_err(|_| VerifyError::Abandoned)
}

async fn mend(sides: &Sides, order: Mend) -> Result<Mended, VerifyError> {
    sides.applier.mend(order).await.map_err(VerifyError::NotMended)
}

/// Name and type of the columns of its key.
async fn key_columns(sides: &Sides, table: &TableReport) -> Result<Vec<(String, String)>, VerifyError> {
    let client = connect(&sides.primary, "repair").await?;
    client.batch_execute(PINNED_SETTINGS).await?;
    let mut place = Place::on_primary(&client, &table.schema, &table.name).await?;
    if place.is_face {
        // Rows were told apart by the secondary's key.
        let secondary = connect(&sides.secondary, "repair").await?;
        secondary.batch_execute(PINNED_SETTINGS).await?;
        place = Place::table(&secondary, &table.schema, &table.name).await?;
    }
    let columns = place.key.map_or_else(Vec::new, |key| key.columns);
    Ok(columns
        .into_iter()
        .map(|column| (column.name, column.type_name))
        .collect())
}

/// What the rounds found and set right in these tables before they were found equal is settled.
async fn clear_divergences(sides: &Sides, report: &DatabaseReport) -> Result<(), VerifyError> {
    let client = connect(&sides.secondary, "repair").await?;
    for table in &report.tables {
        if let (TableResult::Equal, Some((first, _))) = (table.result, table.rounds) {
            client
                .execute(
                    "DELETE FROM pgtandem.divergence WHERE schema = $1 AND name = $2 AND round <= $3",
                    &[&table.schema, &table.name, &(first as i64)],
                )
                .await?;
        }
    }
    sides.applier.tables_changed();
    Ok(())
}
