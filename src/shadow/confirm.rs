//! Asks both sides again at a cut, where they must be equal whatever the clients write.
//!
//! While the applier is held, a transaction on the primary takes the round's exported snapshot
//! and one on the secondary a snapshot of its own; then the applier goes on. Each side's answer
//! is read in these snapshots, in text format. If they differ, the primary is asked a second
//! time in the same snapshot but in another transaction, so that a clock behind a "stable"
//! function gives itself away.
//!
//! Snapshots do not hold definitions: rewritten and truncated tables are empty in an older one, and
//! what a column is called or how a label is written is always as of now. Where definitions have
//! changed since the snapshot was taken, a difference says nothing, and another cut has to.

use std::sync::Arc;

use tokio::time::Duration;

use super::answer::Answer;
use super::catalog::{Catalog, read_both};
use super::compare::{Comparison, Difference, Kind, Verdict};
use super::connection::{Connection, ConnectionError};
use super::digest::Digest;
use super::log::BothSides;
use super::read::{Call, ShadowRead};
use super::rules::ReadRules;
use super::stats::{Failed, Outcome, Skipped};
use super::worker::{Worker, is_circumstance};
use crate::sql::{LexSettings, NotComparable, ReadFacts, Widened, widen_limit};

pub(super) enum Confirmed {
    Is(Outcome),
    Mismatch {
        round: u64,
        /// Of the answer, and the places of those that belong to a table's key.
        columns: Vec<String>,
        keys: Vec<usize>,
        found: Difference,
        sides: Box<BothSides<Digest>>,
    },
    /// Definitions changed meanwhile.
    Again,
}

/// What was asked last, and what the two sides said.
struct Asked<'a> {
    text: &'a [u8],
    facts: &'a ReadFacts,
    /// 0 for all.
    first_rows: u64,
    ours: Answer,
    theirs: Answer,
}

/// Rows to look at beyond a LIMIT whose choice is left open. Where there are more, it stays open:
/// the primary shall not read whole tables for a shadow.
const WIDENED_ROWS: u32 = 1000;
/// The applier is held while the snapshots are taken.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(3);

/// Changes with every definition that a read may rest on, and with every TRUNCATE; read in a
/// transaction it is as of its snapshot.
pub(super) const DEFINITIONS: &[u8] = b"\
SELECT (SELECT concat(count(*), ':', sum(hashint8(c.oid::bigint * 4294967296 + c.xmin::text::bigint)::bigint)) FROM pg_catalog.pg_class c
         WHERE c.relpersistence <> 't' AND c.relkind <> 't' AND c.oid >= 16384
           AND c.relnamespace IS DISTINCT FROM (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pgtandem')),
       (SELECT concat(count(*), ':', sum(hashint8(d.oid::bigint * 4294967296 + d.xmin::text::bigint)::bigint))
          FROM (SELECT a.attrelid AS oid, a.xmin FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
                 WHERE c.relpersistence <> 't' AND c.oid >= 16384 AND c.relkind IN ('r', 'p', 'v', 'm')
                UNION ALL SELECT oid, xmin FROM pg_catalog.pg_proc UNION ALL SELECT oid, xmin FROM pg_catalog.pg_enum
                UNION ALL SELECT oid, xmin FROM pg_catalog.pg_rewrite UNION ALL SELECT oid, xmin FROM pg_catalog.pg_policy) d)";

const BEGIN: &str = "begin isolation level repeatable read read only";

pub(super) async fn confirm(
    worker: &Worker,
    read: &ShadowRead,
    facts: &ReadFacts,
    rules: &ReadRules,
    secondary_call: &Call,
) -> Result<Confirmed, ConnectionError> {
    let primary_key = worker.key(read, read.control.primary);
    let secondary_key = worker.key(read, read.control.secondary());
    // Connections first: opening them takes longer than the applier should be held.
    let (mut primary, mut again, mut secondary) = tokio::try_join!(
        worker.connection(&primary_key),
        worker.connection(&primary_key),
        worker.connection(&secondary_key),
    )?;
    let Ok(held) = worker.cuts.hold_cut().await else {
        return Ok(Confirmed::Is(Outcome::Failed(Failed::NoCut)));
    };
    if !worker.is_current(read) {
        return Ok(Confirmed::Is(Outcome::Skipped(Skipped::Flip)));
    }
    let round = held.round;
    let snapshots = async {
        let import = begin_in(&held.primary_snapshot);
        let own = format!("{BEGIN}; select 1");
        tokio::try_join!(
            primary.command("take the round's snapshot on the primary", import.as_bytes()),
            again.command("take the round's snapshot on the primary", import.as_bytes()),
            secondary.command("take a snapshot on the secondary", own.as_bytes()),
        )
    };
    tokio::time::timeout(SNAPSHOT_PATIENCE, snapshots)
        .await
        .unwrap_or(Err(ConnectionError::Deadline))?;
    drop(held);
    let (defined, _) = patiently(worker, primary.digest(DEFINITIONS, &Call::Simple, 0)).await?;

    let first_rows = read.first_rows();
    let answers = async {
        tokio::try_join!(
            primary.answer(&read.text, &read.call, first_rows),
            secondary.answer(&read.text, secondary_call, first_rows)
        )
    };
    let (ours, theirs) = patiently(worker, answers).await?;
    let mut asked = Asked {
        text: &read.text,
        facts,
        first_rows,
        ours,
        theirs,
    };
    let (ours, theirs) = (&asked.ours, &asked.theirs);
    let mut catalog = worker.catalog.load_full();
    let mut verdict = match [ours, theirs].map(|answer| answer.digest.sqlstate()) {
        [Some("57014"), _] | [_, Some("57014")] => return Ok(Confirmed::Is(Outcome::Failed(Failed::Timeout))),
        [Some(code), _] | [_, Some(code)]
            if is_circumstance(code) && ours.digest.sqlstate != theirs.digest.sqlstate =>
        {
            return Ok(Confirmed::Is(Outcome::Failed(Failed::Connection)));
        }
        _ => {
            let mut verdict = comparison(rules, &catalog, facts, false).compare(ours, theirs);
            if matches!(&verdict, Verdict::Different(found) if found.kind == Kind::Type) {
                // Types of one name may have been made anew since the catalogs were read.
                if let (Some(now), _) = read_both(&worker.targets, read.control).await {
                    worker.catalog.store(Arc::new(now));
                }
                catalog = worker.catalog.load_full();
                verdict = comparison(rules, &catalog, facts, false).compare(ours, theirs);
            }
            verdict
        }
    };
    // Which rows a LIMIT lets through may be left open, but not which rows there are.
    let perhaps_open = match &verdict {
        Verdict::Open(NotComparable::LimitWithoutOrder) => true,
        Verdict::Different(_) => facts.limited && ours.digest.rows == theirs.digest.rows,
        Verdict::Open(_) | Verdict::Equal | Verdict::OrderTies | Verdict::Tolerated | Verdict::TooMany => false,
    };
    // The session's lexical settings are not known here; they only matter to backslashes.
    let widened = match &read.call {
        _ if !perhaps_open => None,
        // Of what a cursor would have given besides.
        _ if first_rows > 0 => crate::sql::single_read(read.script()).ok().map(|facts| Widened {
            text: read.text.to_vec(),
            facts: Arc::new(facts.clone()),
        }),
        Call::Prepared { .. } => None,
        _ if read.text.contains(&b'\\') => None,
        _ => widen_limit(&read.text, LexSettings::default(), WIDENED_ROWS + 1),
    };
    if let Some(widened) = &widened {
        let rows = match first_rows {
            0 => 0,
            _ => u64::from(WIDENED_ROWS) + 1,
        };
        let answers = async {
            tokio::try_join!(
                primary.answer(&widened.text, &read.call, rows),
                secondary.answer(&widened.text, secondary_call, rows)
            )
        };
        let (ours, theirs) = patiently(worker, answers).await?;
        let all_there =
            |answer: &Answer| answer.digest.sqlstate.is_none() && answer.digest.rows <= u64::from(WIDENED_ROWS);
        if all_there(&ours) && all_there(&theirs) {
            verdict = match comparison(rules, &catalog, &widened.facts, false).compare(&ours, &theirs) {
                Verdict::Equal | Verdict::OrderTies | Verdict::Tolerated => {
                    Verdict::Open(NotComparable::LimitWithoutOrder)
                }
                open_or_different => open_or_different,
            };
            asked = Asked {
                text: &widened.text,
                facts: &widened.facts,
                first_rows: rows,
                ours,
                theirs,
            };
        }
    }
    let confirmed = match verdict {
        Verdict::Equal => Confirmed::Is(Outcome::Transient),
        Verdict::OrderTies => Confirmed::Is(Outcome::OrderTies),
        Verdict::Tolerated => Confirmed::Is(Outcome::Tolerated),
        Verdict::Open(reason) => Confirmed::Is(Outcome::Partly(reason)),
        Verdict::TooMany => Confirmed::Is(Outcome::NotComparable(NotComparable::TooManyRows)),
        Verdict::Different(found) => {
            let second = patiently(worker, again.answer(asked.text, &read.call, asked.first_rows)).await?;
            // Asked after the answers, outside of the snapshot.
            end(worker, &mut again).await?;
            let (now, _) = patiently(worker, again.digest(DEFINITIONS, &Call::Simple, 0)).await?;
            let noise = comparison(rules, &catalog, asked.facts, true).compare(&asked.ours, &second);
            if now == defined {
                worker.asked_twice(read, !matches!(noise, Verdict::Different(_)));
            }
            match noise {
                _ if now != defined => Confirmed::Again,
                Verdict::Equal | Verdict::OrderTies | Verdict::Tolerated => Confirmed::Mismatch {
                    round,
                    columns: names(&asked.ours, &asked.theirs),
                    keys: key_places(&worker.catalog.load(), &asked.ours),
                    found,
                    sides: Box::new(BothSides {
                        primary: asked.ours.digest,
                        secondary: asked.theirs.digest,
                    }),
                },
                Verdict::Open(reason) => Confirmed::Is(Outcome::Partly(reason)),
                Verdict::TooMany | Verdict::Different(_) => {
                    Confirmed::Is(Outcome::NotComparable(NotComparable::NonDeterministic))
                }
            }
        }
    };
    for (key, mut connection) in [
        (primary_key.clone(), primary),
        (primary_key, again),
        (secondary_key, secondary),
    ] {
        if end(worker, &mut connection).await.is_ok() {
            worker.pool.give(key, connection);
        }
    }
    Ok(confirmed)
}

fn key_places(catalog: &Catalog, ours: &Answer) -> Vec<usize> {
    (0..ours.columns.len())
        .filter(|&at| catalog.is_key(ours.columns[at].origin))
        .collect()
}

/// Of the primary's answer; of the secondary's where that has none, being an error.
fn names(ours: &Answer, theirs: &Answer) -> Vec<String> {
    let columns = if ours.columns.is_empty() {
        &theirs.columns
    } else {
        &ours.columns
    };
    columns
        .iter()
        .map(|column| String::from_utf8_lossy(&column.name).into_owned())
        .collect()
}

const fn comparison<'a>(
    rules: &'a ReadRules,
    catalog: &'a Catalog,
    facts: &'a ReadFacts,
    one_server: bool,
) -> Comparison<'a> {
    Comparison {
        facts,
        rules,
        catalog,
        one_server,
    }
}

async fn end(worker: &Worker, connection: &mut Connection) -> Result<(), ConnectionError> {
    patiently(worker, connection.command("end the transaction", b"rollback")).await
}

fn begin_in(snapshot: &str) -> String {
    format!("{BEGIN}; set transaction snapshot '{}'", snapshot.replace('\'', "''"))
}

async fn patiently<T>(
    worker: &Worker,
    what: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, ConnectionError> {
    tokio::time::timeout(worker.patience(), what)
        .await
        .unwrap_or(Err(ConnectionError::Deadline))
}
