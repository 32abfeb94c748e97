//! What is recorded on the secondary of a backfill, besides the ranges, which their own
//! transactions record.

use tokio_postgres::Client;

use super::plan::Plan;
use super::status::Counts;
use crate::catalog::Oid;
use crate::control::Epoch;
use crate::reconcile::key::{Boundary, KeyRange};

/// A table that an unfinished backfill has begun, as recorded.
#[derive(Debug, Default)]
pub(super) struct Begun {
    /// Of the key whose values the bounds are.
    pub key: Option<Vec<String>>,
    /// In the order of their numbers.
    pub ranges: Vec<DoneRange>,
}

#[derive(Debug, Clone)]
pub(super) struct DoneRange {
    pub number: i64,
    pub keys: KeyRange,
    pub counts: Counts,
}

/// Records that a backfill of these tables runs; what an earlier one left unfinished stays.
pub(super) async fn begin(secondary: &mut Client, epoch: Epoch, plans: &[&Plan]) -> Result<(), tokio_postgres::Error> {
    let transaction = secondary.transaction().await?;
    let epoch = epoch.0 as i64;
    let current = transaction
        .query_opt("SELECT FROM pgtandem.backfill WHERE epoch = $1", &[&epoch])
        .await?;
    if current.is_none() {
        // Of another direction: that one's OIDs and bounds mean nothing here.
        transaction
            .batch_execute(
                "DELETE FROM pgtandem.backfill_table; DELETE FROM pgtandem.backfill_range; DELETE FROM pgtandem.backfill_refused",
            )
            .await?;
    }
    transaction
        .execute(
            "INSERT INTO pgtandem.backfill AS b (epoch, state) VALUES ($1, 'running')
             ON CONFLICT (one) DO UPDATE SET epoch = EXCLUDED.epoch, state = 'running', note = NULL,
                 began = CASE WHEN b.state = 'running' THEN b.began ELSE clock_timestamp() END, ended = NULL",
            &[&epoch],
        )
        .await?;
    for plan in plans {
        transaction
            .execute(
                "INSERT INTO pgtandem.backfill_table AS t (rel, schema, name, state, rows_expected, bytes_expected)
                 VALUES ($1, $2, $3, 'waiting', $4, $5)
                 ON CONFLICT (rel) DO UPDATE SET schema = EXCLUDED.schema, name = EXCLUDED.name, note = NULL,
                     state = CASE WHEN t.state = 'copying' THEN t.state ELSE 'waiting' END,
                     rows_expected = EXCLUDED.rows_expected, bytes_expected = EXCLUDED.bytes_expected",
                &[
                    &plan.rel,
                    &plan.schema,
                    &plan.name,
                    &(plan.rows_expected as i64),
                    &(plan.bytes_expected as i64),
                ],
            )
            .await?;
    }
    transaction.commit().await
}

/// How far an earlier backfill came with a table that it has not finished.
pub(super) async fn begun(secondary: &Client, rel: Oid) -> Result<Option<Begun>, tokio_postgres::Error> {
    let table = secondary
        .query_opt(
            "SELECT t.key FROM pgtandem.backfill_table t JOIN pgtandem.seeding s ON s.rel = t.rel
              WHERE t.rel = $1 AND t.state = 'copying' AND s.state = 'seeding'",
            &[&rel],
        )
        .await?;
    let Some(table) = table else { return Ok(None) };
    let rows = secondary
        .query(
            "SELECT number, low, high, read, skipped, failed, bytes FROM pgtandem.backfill_range WHERE rel = $1 ORDER BY number",
            &[&rel],
        )
        .await?;
    let count = |row: &tokio_postgres::Row, index: usize| row.get::<_, i64>(index) as u64;
    let ranges = rows.iter().map(|row| {
        let (read, skipped, failed) = (count(row, 3), count(row, 4), count(row, 5));
        DoneRange {
            number: row.get(0),
            keys: KeyRange {
                after: row.get(1),
                upto: row.get(2),
            },
            counts: Counts {
                read,
                skipped,
                failed,
                written: read.saturating_sub(skipped + failed),
                bytes: count(row, 6),
            },
        }
    });
    Ok(Some(Begun {
        key: table.get(0),
        ranges: ranges.collect(),
    }))
}

/// From where the next range of a table is cut.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Onward {
    pub after: Option<Boundary>,
    pub number: i64,
}

impl Onward {
    pub(super) const BEGINNING: Self = Self { after: None, number: 1 };

    /// Behind the range that ends with this key; none where that was the last one.
    pub(super) fn behind(upto: Option<&Boundary>, number: i64) -> Option<Self> {
        upto.map(|upto| Self {
            after: Some(upto.clone()),
            number: number + 1,
        })
    }
}

/// The ranges that are missing between those that are done, and from where the rest is still to
/// be cut; `None` when the last one is done.
pub(super) fn missing(done: &[DoneRange]) -> (Vec<(i64, KeyRange)>, Option<Onward>) {
    let mut gaps = Vec::new();
    let mut next = Some(Onward::BEGINNING);
    for range in done {
        if let Some(Onward { after, number }) = next
            && after != range.keys.after
        {
            let upto = range.keys.after.clone();
            gaps.push((number, KeyRange { after, upto }));
        }
        next = Onward::behind(range.keys.upto.as_ref(), range.number);
    }
    (gaps, next)
}

/// The table's rows are in: from here on it is `synced`, unless rows of it were refused, are held
/// in quarantine, or something happened to it meanwhile. Returns what is recorded of it then, and
/// why it is not synced.
pub(super) async fn finish(
    secondary: &mut Client,
    rel: Oid,
    refused: u64,
) -> Result<(&'static str, Option<String>), tokio_postgres::Error> {
    let transaction = secondary.transaction().await?;
    let held: i64 = transaction
        .query_one(
            "SELECT count(DISTINCT c.id) FROM pgtandem.quarantine_change c WHERE c.rel = $1 AND NOT c.void",
            &[&rel],
        )
        .await?
        .get(0);
    let why = if refused > 0 {
        Some(format!(
            "its backfill is complete but for {refused} rows that this side refused (pgtandem.backfill_refused); mend the cause and copy it again"
        ))
    } else if held > 0 {
        Some(format!(
            "while it was copied, {held} transactions on it went into quarantine; retry or discard them and copy it again"
        ))
    } else {
        None
    };
    let state = if why.is_some() { "unseeded" } else { "synced" };
    let turned = transaction
        .execute(
            "UPDATE pgtandem.seeding SET state = $2, note = $3 WHERE rel = $1 AND state = 'seeding' AND paused IS NULL",
            &[&rel, &state, &why],
        )
        .await?;
    let (state, why) = match (turned, why) {
        (0, _) => (
            "failed",
            Some("something happened to it while it was copied".to_owned()),
        ),
        (_, Some(why)) => ("refused", Some(why)),
        (_, None) => ("done", None),
    };
    transaction
        .execute(
            "UPDATE pgtandem.backfill_table SET state = $2, note = $3 WHERE rel = $1",
            &[&rel, &state, &why],
        )
        .await?;
    transaction.commit().await?;
    Ok((state, why))
}

pub(super) async fn note_table(
    secondary: &Client,
    rel: Oid,
    state: &str,
    note: Option<&str>,
) -> Result<(), tokio_postgres::Error> {
    secondary
        .execute(
            "UPDATE pgtandem.backfill_table SET state = $2, note = $3 WHERE rel = $1",
            &[&rel, &state, &note],
        )
        .await
        .map(|_| ())
}

pub(super) async fn end(secondary: &Client, state: &str, note: Option<&str>) -> Result<(), tokio_postgres::Error> {
    secondary
        .execute(
            "UPDATE pgtandem.backfill SET state = $1, note = $2, ended = clock_timestamp()",
            &[&state, &note],
        )
        .await
        .map(|_| ())
}

/// One table of a recorded backfill, for the status.
pub(super) struct RecordedTable {
    pub name: String,
    pub state: String,
    pub note: Option<String>,
    pub rows_expected: u64,
    pub counts: Counts,
}

/// The backfill that this side records as running.
pub(super) async fn unfinished(
    secondary: &Client,
    epoch: Epoch,
) -> Result<Option<Vec<RecordedTable>>, tokio_postgres::Error> {
    let running = secondary
        .query_opt(
            "SELECT FROM pgtandem.backfill WHERE state = 'running' AND epoch = $1",
            &[&(epoch.0 as i64)],
        )
        .await?;
    if running.is_none() {
        return Ok(None);
    }
    let rows = secondary
        .query(
            "SELECT t.schema || '.' || t.name, t.state, t.note, t.rows_expected,
                    COALESCE(sum(r.read), 0)::bigint, COALESCE(sum(r.skipped), 0)::bigint,
                    COALESCE(sum(r.failed), 0)::bigint, COALESCE(sum(r.bytes), 0)::bigint
               FROM pgtandem.backfill_table t LEFT JOIN pgtandem.backfill_range r ON r.rel = t.rel
              GROUP BY t.rel ORDER BY 1",
            &[],
        )
        .await?;
    let count = |row: &tokio_postgres::Row, index: usize| row.get::<_, i64>(index) as u64;
    let tables = rows.iter().map(|row| {
        let (read, skipped, failed) = (count(row, 4), count(row, 5), count(row, 6));
        RecordedTable {
            name: row.get(0),
            state: row.get(1),
            note: row.get(2),
            rows_expected: count(row, 3),
            counts: Counts {
                read,
                skipped,
                failed,
                written: read.saturating_sub(skipped + failed),
                bytes: count(row, 7),
            },
        }
    });
    Ok(Some(tables.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(number: i64, after: Option<&str>, upto: Option<&str>) -> DoneRange {
        let bound = |text: Option<&str>| text.map(|text| vec![text.to_owned()]);
        DoneRange {
            number,
            keys: KeyRange {
                after: bound(after),
                upto: bound(upto),
            },
            counts: Counts::default(),
        }
    }

    #[test]
    fn what_is_missing_after_a_crash() {
        let bound = |text: &str| Some(vec![text.to_owned()]);
        assert_eq!(missing(&[]), (vec![], Some(Onward::BEGINNING)));
        let done = [
            done(1, None, Some("10")),
            done(3, Some("20"), Some("30")),
            done(6, Some("50"), Some("60")),
        ];
        let gap = |number, after: &str, upto: &str| {
            (
                number,
                KeyRange {
                    after: bound(after),
                    upto: bound(upto),
                },
            )
        };
        assert_eq!(
            missing(&done),
            (
                vec![gap(2, "10", "20"), gap(4, "30", "50")],
                Some(Onward {
                    after: bound("60"),
                    number: 7
                })
            )
        );
    }

    #[test]
    fn the_last_range_may_be_done_before_others() {
        let (gaps, rest) = missing(&[done(2, Some("5"), None)]);
        assert_eq!(rest, None);
        assert_eq!(
            gaps,
            [(
                1,
                KeyRange {
                    after: None,
                    upto: Some(vec!["5".into()])
                }
            )]
        );
    }
}
