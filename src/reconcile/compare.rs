//! One range of one table, compared in two snapshots of one cut, down to the rows that differ.

use std::collections::HashMap;

use tokio_postgres::{Client, Error, Row, SimpleQueryMessage};

use super::digest::{RowDigest, hash};
use super::key::{Boundary, KeyRange, WalkKey};
use super::readers::{Pair, Role};
use super::report::{DifferenceKind, Differing, DifferingRow};
use crate::catalog::quote::identifier;

/// A range of up to so many rows is looked at by buckets; a larger one is split first.
const LISTED_MAX: i64 = 20_000;
/// Into how many parts.
const PARTS: i64 = 16;
/// Rows of one bucket of a table that cannot be walked, about.
const BUCKET_ROWS: i64 = 4096;
const BUCKETS_MIN: i64 = 64;
/// Buckets whose rows are in memory at once.
const BUCKETS_AT_ONCE: usize = 64;

/// How a table is compared.
pub(super) struct Plan {
    pub digest: RowDigest,
    /// What identifies its rows, where anything does.
    pub key: Option<WalkKey>,
    /// Whether ranges of the key are known to hold the same rows on both sides.
    pub ordered: bool,
    /// A row `t` as the applier writes it.
    pub image: String,
    /// Row texts are shown, not their hashes.
    pub plain: bool,
    /// Differing rows to keep; all are counted.
    pub keep: usize,
}

/// What a range was found to be.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub rows: i64,
    pub primary: i128,
    pub secondary: i128,
    pub equal: bool,
    pub differing: Differing,
    pub found: Vec<DifferingRow>,
}

/// Rows and sum.
type Sum = (i64, i128);

/// A row's key and hash.
type Listed = (Boundary, i64);

/// Compares the range; `None` where one side's table was emptied or rewritten since the snapshots
/// were taken (TRUNCATE and such DDL leave no old rows behind), so that it must be read at another
/// cut.
///
/// The tables' locks are given back at once: a savepoint's locks end with it. A client's TRUNCATE
/// or DDL, which everybody else would queue behind, waits for one range and not for the batch.
pub(super) async fn compare(pair: &Pair, plan: &Plan, range: &KeyRange) -> Result<Option<Outcome>, Error> {
    let condition = match &plan.key {
        Some(key) => key.within(range),
        None => "true".to_owned(),
    };
    // One round trip: nearly all ranges are equal.
    let once = |role| {
        format!(
            "SAVEPOINT range; {}; {}; ROLLBACK TO SAVEPOINT range",
            plan.digest.sum_sql(role, &condition),
            plan.digest.unchanged_sql(role)
        )
    };
    let (on_primary, on_secondary) = (once(Role::Primary), once(Role::Secondary));
    let (here, there) = tokio::try_join!(whole(&pair.primary, &on_primary), whole(&pair.secondary, &on_secondary))?;
    let (Some(here), Some(there)) = (here, there) else {
        return Ok(None);
    };
    let mut outcome = Outcome {
        rows: here.0,
        primary: here.1,
        secondary: there.1,
        equal: here == there,
        ..Outcome::default()
    };
    if outcome.equal {
        return Ok(Some(outcome));
    }
    both(pair, "SAVEPOINT range").await?;
    let rows = here.0.max(there.0);
    match &plan.key {
        Some(key) if plan.ordered => narrow(pair, plan, key, range, (here, there), &mut outcome).await?,
        Some(key) => by_bucket_of_key(pair, plan, key, &condition, rows, &mut outcome).await?,
        None => by_bucket_of_row(pair, plan, rows, &mut outcome).await?,
    }
    let unchanged = |role| plan.digest.unchanged_sql(role);
    let (on_primary, on_secondary) = (unchanged(Role::Primary), unchanged(Role::Secondary));
    let (here, there) = tokio::try_join!(
        pair.primary.query_opt(&on_primary, &[]),
        pair.secondary.query_opt(&on_secondary, &[])
    )?;
    both(pair, "ROLLBACK TO SAVEPOINT range").await?;
    let is_whole = |row: Option<Row>| row.is_some_and(|row| row.get(0));
    Ok((is_whole(here) && is_whole(there)).then_some(outcome))
}

async fn both(pair: &Pair, sql: &str) -> Result<(), Error> {
    tokio::try_join!(pair.primary.batch_execute(sql), pair.secondary.batch_execute(sql))?;
    Ok(())
}

/// One side's sum, unless its table is not the one that the snapshot knows.
async fn whole(client: &Client, sql: &str) -> Result<Option<Sum>, Error> {
    let messages = client.simple_query(sql).await?;
    let mut rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let sum = rows
        .next()
        .and_then(|row| Some((row.get(0)?.parse().ok()?, row.get(1)?.parse().ok()?)));
    let unchanged = rows.next().is_some_and(|row| row.get(0) == Some("t"));
    Ok(sum.filter(|_| unchanged))
}

async fn sums(pair: &Pair, plan: &Plan, condition: &str) -> Result<(Sum, Sum), Error> {
    let sql = |role| plan.digest.sum_sql(role, condition);
    let (on_primary, on_secondary) = (sql(Role::Primary), sql(Role::Secondary));
    tokio::try_join!(sum(&pair.primary, &on_primary), sum(&pair.secondary, &on_secondary))
}

async fn sum(client: &Client, sql: &str) -> Result<Sum, Error> {
    let row = client.query_one(sql, &[]).await?;
    Ok((row.get(0), number(&row, 1)))
}

/// The server's own text of a whole number; 2^63 rows of 2^63 each fit.
fn number(row: &Row, column: usize) -> i128 {
    row.get::<_, &str>(column).parse().unwrap_or_default()
}

/// Bisection: a differing range is split until it can be listed.
async fn narrow(
    pair: &Pair,
    plan: &Plan,
    key: &WalkKey,
    range: &KeyRange,
    sums_found: (Sum, Sum),
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let mut left = vec![(range.clone(), sums_found)];
    while let Some((range, (here, there))) = left.pop() {
        let rows = here.0.max(there.0);
        if rows <= LISTED_MAX {
            by_bucket_of_key(pair, plan, key, &key.within(&range), rows, outcome).await?;
            continue;
        }
        let larger = if here.0 >= there.0 {
            Role::Primary
        } else {
            Role::Secondary
        };
        for part in split(pair.client(larger), larger, plan, key, &range, rows / PARTS).await? {
            let (here, there) = sums(pair, plan, &key.within(&part)).await?;
            if here != there {
                left.push((part, (here, there)));
            }
        }
    }
    Ok(())
}

/// The parts of a range, `rows` rows each on the side that was asked.
async fn split(
    client: &Client,
    role: Role,
    plan: &Plan,
    key: &WalkKey,
    range: &KeyRange,
    rows: i64,
) -> Result<Vec<KeyRange>, Error> {
    let sql = format!(
        "SELECT s.key FROM (SELECT {} AS key, row_number() OVER (ORDER BY {}) AS n FROM ONLY {} AS t WHERE {}) s
          WHERE s.n % {rows} = 0 ORDER BY s.n",
        key.as_text(),
        key.listed(),
        plan.digest.relation(role),
        key.within(range)
    );
    let boundaries: Vec<Boundary> = client.query(&sql, &[]).await?.iter().map(|row| row.get(0)).collect();
    let mut parts = super::key::ranges(boundaries);
    if let Some(first) = parts.first_mut() {
        first.after.clone_from(&range.after);
    }
    if let Some(last) = parts.last_mut() {
        last.upto.clone_from(&range.upto);
    }
    parts.retain(|part| part.after.is_none() || part.after != part.upto);
    Ok(parts)
}

/// Reads the keys and hashes of both sides' rows, and pairs them.
async fn list(pair: &Pair, plan: &Plan, key: &WalkKey, condition: &str, outcome: &mut Outcome) -> Result<(), Error> {
    let sql = |role| {
        format!(
            "SELECT {}, {} FROM ONLY {} AS t WHERE {condition}",
            key.as_text(),
            plan.digest.row_hash(),
            plan.digest.relation(role)
        )
    };
    let (here, there) = pair.query(sql).await?;
    let listed = |rows: Vec<Row>| rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<Listed>>();
    for unlike in differences(listed(here), listed(there)) {
        outcome.differing.count(unlike.kind);
        if outcome.found.len() >= plan.keep {
            continue;
        }
        let (primary, secondary) = if plan.plain {
            let condition = key.compare("=", &unlike.key);
            tokio::try_join!(
                row_text(pair, Role::Primary, plan, &condition),
                row_text(pair, Role::Secondary, plan, &condition)
            )?
        } else {
            (unlike.here.map(hex), unlike.there.map(hex))
        };
        outcome.found.push(DifferingRow {
            kind: unlike.kind,
            key: Some(unlike.key),
            primary,
            secondary,
            image: None,
        });
    }
    Ok(())
}

/// A key whose row is not the same on both sides, with the hashes it has there.
struct Unlike {
    kind: DifferenceKind,
    key: Boundary,
    here: Option<i64>,
    there: Option<i64>,
}

/// Which rows are on one side only, or differ; by key. Pure.
fn differences(here: Vec<Listed>, there: Vec<Listed>) -> Vec<Unlike> {
    let mut theirs: HashMap<Boundary, i64> = there.into_iter().collect();
    let mut found = Vec::new();
    for (key, hash) in here {
        let there = theirs.remove(&key);
        let kind = match there {
            Some(other) if other == hash => continue,
            Some(_) => DifferenceKind::Different,
            None => DifferenceKind::Missing,
        };
        let here = Some(hash);
        found.push(Unlike { kind, key, here, there });
    }
    let mut extra: Vec<Unlike> = theirs
        .into_iter()
        .map(|(key, hash)| Unlike {
            kind: DifferenceKind::Extra,
            key,
            here: None,
            there: Some(hash),
        })
        .collect();
    extra.sort_by(|one, other| one.key.cmp(&other.key));
    found.extend(extra);
    found
}

async fn row_text(pair: &Pair, role: Role, plan: &Plan, condition: &str) -> Result<Option<String>, Error> {
    let columns: Vec<String> = plan
        .digest
        .column_names()
        .iter()
        .map(|name| format!("t.{}", identifier(name)))
        .collect();
    let sql = format!(
        "SELECT ROW({})::text FROM ONLY {} AS t WHERE {condition}",
        columns.join(", "),
        plan.digest.relation(role)
    );
    Ok(pair.client(role).query_opt(&sql, &[]).await?.map(|row| row.get(0)))
}

fn hex(hash: i64) -> String {
    format!("{hash:016x}")
}

/// Of a power of two of buckets.
fn bucket_mask(rows: i64) -> i64 {
    let buckets = (rows / BUCKET_ROWS).max(BUCKETS_MIN).unsigned_abs();
    buckets.next_power_of_two() as i64 - 1
}

/// The buckets in which the two sides differ.
async fn differing_buckets(pair: &Pair, plan: &Plan, bucket: &str, condition: &str) -> Result<Vec<i64>, Error> {
    let sql = |role| {
        format!(
            "SELECT {bucket}, count(*), sum({})::text FROM ONLY {} AS t WHERE {condition} GROUP BY 1",
            plan.digest.row_hash(),
            plan.digest.relation(role)
        )
    };
    let (here, there) = pair.query(sql).await?;
    let sums = |rows: Vec<Row>| {
        let sum = |row: &Row| (row.get::<_, i64>(0), (row.get::<_, i64>(1), number(row, 2)));
        rows.iter().map(sum).collect::<HashMap<i64, Sum>>()
    };
    let (here, mut there) = (sums(here), sums(there));
    let mut differing: Vec<i64> = here
        .iter()
        .filter(|(bucket, sum)| there.remove(bucket).as_ref() != Some(sum))
        .map(|(bucket, _)| *bucket)
        .collect();
    differing.extend(there.into_keys());
    differing.sort_unstable();
    Ok(differing)
}

fn in_buckets(bucket: &str, chosen: &[i64]) -> String {
    let listed: Vec<String> = chosen.iter().map(i64::to_string).collect();
    format!("{bucket} = ANY ('{{{}}}'::bigint[])", listed.join(","))
}

/// Rows grouped by a hash of their key, in whatever order the two sides keep them: only the rows of
/// buckets that differ are listed one by one.
async fn by_bucket_of_key(
    pair: &Pair,
    plan: &Plan,
    key: &WalkKey,
    condition: &str,
    rows: i64,
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let text = format!("concat_ws(E'\\x1F', {})", key.listed());
    let bucket = format!("({} & {})", hash(&text, 1), bucket_mask(rows));
    let differing = differing_buckets(pair, plan, &bucket, condition).await?;
    for chosen in differing.chunks(BUCKETS_AT_ONCE) {
        let condition = format!("{condition} AND {}", in_buckets(&bucket, chosen));
        list(pair, plan, key, &condition, outcome).await?;
    }
    Ok(())
}

/// Rows that nothing identifies: as a multiset. Each hash must be there equally often.
async fn by_bucket_of_row(pair: &Pair, plan: &Plan, rows: i64, outcome: &mut Outcome) -> Result<(), Error> {
    let row_hash = plan.digest.row_hash();
    let bucket = format!("({row_hash} & {})", bucket_mask(rows));
    for chosen in differing_buckets(pair, plan, &bucket, "true")
        .await?
        .chunks(BUCKETS_AT_ONCE)
    {
        let sql = |role| {
            format!(
                "SELECT {row_hash}, count(*) FROM ONLY {} AS t WHERE {} GROUP BY 1",
                plan.digest.relation(role),
                in_buckets(&bucket, chosen)
            )
        };
        let (here, there) = pair.query(sql).await?;
        let counts = |rows: Vec<Row>| {
            rows.iter()
                .map(|row| (row.get(0), row.get(1)))
                .collect::<Vec<(i64, i64)>>()
        };
        let surplus = surplus(&counts(here), &counts(there));
        let room = plan.keep.saturating_sub(outcome.found.len());
        let shown: Vec<i64> = surplus.iter().map(|(hash, _)| *hash).take(room).collect();
        let (mut ours, theirs) = tokio::try_join!(
            images(pair, Role::Primary, plan, &shown),
            images(pair, Role::Secondary, plan, &shown)
        )?;
        ours.extend(theirs);
        for (hash, by) in surplus {
            let kind = if by > 0 {
                DifferenceKind::Missing
            } else {
                DifferenceKind::Extra
            };
            for _ in 0..by.unsigned_abs() {
                outcome.differing.count(kind);
                if outcome.found.len() >= plan.keep {
                    continue;
                }
                let image = ours.get(&hash).cloned();
                let text = if plan.plain { image.clone() } else { Some(hex(hash)) };
                let (primary, secondary) = match kind {
                    DifferenceKind::Missing => (text, None),
                    _ => (None, text),
                };
                outcome.found.push(DifferingRow {
                    kind,
                    key: None,
                    primary,
                    secondary,
                    image,
                });
            }
        }
    }
    Ok(())
}

/// How much more often each hash is on the first side. Pure.
fn surplus(here: &[(i64, i64)], there: &[(i64, i64)]) -> Vec<(i64, i64)> {
    let mut by_hash: HashMap<i64, i64> = HashMap::new();
    for (hash, count) in here {
        *by_hash.entry(*hash).or_default() += count;
    }
    for (hash, count) in there {
        *by_hash.entry(*hash).or_default() -= count;
    }
    let mut left: Vec<(i64, i64)> = by_hash.into_iter().filter(|(_, by)| *by != 0).collect();
    left.sort_unstable();
    left
}

/// The images of rows with these hashes; rows of one hash are the same row.
async fn images(pair: &Pair, role: Role, plan: &Plan, hashes: &[i64]) -> Result<HashMap<i64, String>, Error> {
    if hashes.is_empty() {
        return Ok(HashMap::new());
    }
    let row_hash = plan.digest.row_hash();
    let sql = format!(
        "SELECT {row_hash}, min({} COLLATE \"C\") FROM ONLY {} AS t WHERE {row_hash} = ANY ($1::bigint[]) GROUP BY 1",
        plan.image,
        plan.digest.relation(role)
    );
    let rows = pair.client(role).query(&sql, &[&hashes]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_paired_by_key() {
        let rows = |rows: &[(&str, i64)]| -> Vec<Listed> {
            rows.iter()
                .map(|(key, hash)| (vec![(*key).to_owned()], *hash))
                .collect()
        };
        let found = differences(
            rows(&[("1", 10), ("2", 20), ("3", 30)]),
            rows(&[("4", 40), ("3", 31), ("1", 10)]),
        );
        let found: Vec<(DifferenceKind, &str)> = found
            .iter()
            .map(|unlike| (unlike.kind, unlike.key[0].as_str()))
            .collect();
        assert_eq!(
            found,
            [
                (DifferenceKind::Missing, "2"),
                (DifferenceKind::Different, "3"),
                (DifferenceKind::Extra, "4")
            ]
        );
    }

    #[test]
    fn multisets() {
        assert_eq!(
            surplus(&[(1, 2), (2, 1), (3, 5)], &[(1, 2), (3, 2), (4, 1)]),
            [(2, 1), (3, 3), (4, -1)]
        );
    }

    #[test]
    fn buckets_are_a_power_of_two() {
        for (rows, mask) in [(0, 63), (1_000_000, 255), (10_000_000, 4095)] {
            assert_eq!(bucket_mask(rows), mask, "{rows}");
        }
    }
}
