//! Whether this secondary follows this primary, asked before an applier touches either.
//!
//! A watermark means something only beside the journal that it was taken from. Where proxy.yaml names
//! the database of another pair, or a server was restored from an older copy, the two do not belong
//! together, and to read on from it would pass over changes without anybody noticing. So both sides
//! bear the pair's name (`pgtandem.side.pair`, made up when a secondary begins from nothing), the
//! primary records below which transaction its journal has been emptied, and:
//!
//! | found | done |
//! | --- | --- |
//! | another pair's name, or another side's | refused |
//! | the secondary takes itself for the primary | refused: its copy is older than a switchover |
//! | the watermark lies ahead of the primary | refused: the primary is the older copy |
//! | the journal is emptied beyond the watermark | goes on; every table needs seeding |
//! | no watermark, while somebody else's applier reads the journal | refused: two would empty it for each other |

use tokio_postgres::Client;

use super::session::{WatermarkRow, purpose, read_watermark};
use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::snapshot::Snapshot;
use crate::control::Side;
use crate::journal::read::{Unsigned, lsn};
use crate::journal::{self, JournalError, SideRole};

/// What the two sides are to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kin {
    /// The secondary has followed nobody yet.
    Strangers,
    /// A pair, by this name.
    Pair(String),
    /// A pair that was begun before pairs had names.
    Unnamed,
    /// A pair, and the journal no longer has all that the secondary lacks.
    Gap(String),
}

/// Why every table needs seeding after [`Kin::Gap`].
const GAP: &str =
    "this side was restored from an older copy, and the journal no longer has all that came since: changes are missing";

struct Primary {
    pair: Option<String>,
    /// The journal may lack what transactions below have written.
    emptied: u64,
    xmax: u64,
    log_end: u64,
}

struct Secondary {
    pair: Option<String>,
    side: String,
    watermark: Option<WatermarkRow>,
}

/// Looks at both; changes nothing.
///
/// # Errors
/// They do not belong together.
pub(super) async fn look(primary: &Client, secondary: &Client, config: &ApplierConfig) -> Result<Kin, ApplyError> {
    // In this order: the watermark of an applier at work is never ahead of what the primary has later.
    let there = look_at_secondary(secondary).await?;
    let here = look_at_primary(primary, config).await?;
    let Some(there) = there else {
        return Ok(Kin::Strangers);
    };
    if there.side != config.secondary.side.as_str() {
        return Err(ApplyError::Journal(JournalError::WrongSide {
            found: there.side,
            expected: config.secondary.side.to_string(),
        }));
    }
    refuse_a_former_primary(secondary, config).await?;
    judge(&here, &there, config.primary.side).map_err(ApplyError::Inconsistent)
}

/// Where nobody else's applier is connected to the primary. Its own connections are not there yet, and
/// those of a former holder of the lease are soon gone.
pub(super) async fn refuse_to_displace(primary: &Client, config: &ApplierConfig) -> Result<(), ApplyError> {
    let row = primary
        .query_one(
            "SELECT EXISTS (SELECT FROM pgtandem.side WHERE pair IS NOT NULL)
                AND EXISTS (SELECT FROM pg_catalog.pg_stat_activity a
                             WHERE a.application_name = $1 AND a.usename = current_user AND a.pid <> pg_catalog.pg_backend_pid()
                               AND a.datname = pg_catalog.current_database())",
            &[&format!("pgtandem {}", purpose(config.epoch))],
        )
        .await
        .map_err(doing("look for other appliers"))?;
    if row.get(0) {
        return Err(ApplyError::Inconsistent(format!(
            "{} is being mirrored to another database just now; stop that proxy before {} takes its place",
            config.primary.describe(),
            config.secondary.describe()
        )));
    }
    Ok(())
}

/// Gives a pair its name where it has none: on the primary first, for a secondary that bears it
/// counts as following.
pub(super) async fn name_pair(primary: &Client, secondary: &Client) -> Result<String, ApplyError> {
    let pair: String = primary
        .query_one(
            "UPDATE pgtandem.side SET pair = pg_catalog.gen_random_uuid()::text RETURNING pair",
            &[],
        )
        .await
        .map_err(doing("name the pair"))?
        .get(0);
    adopt(secondary, &pair).await?;
    Ok(pair)
}

pub(super) async fn adopt(secondary: &Client, pair: &str) -> Result<(), ApplyError> {
    secondary
        .execute(
            "UPDATE pgtandem.side SET pair = $1 WHERE pair IS DISTINCT FROM $1",
            &[&pair],
        )
        .await
        .map_err(doing("name the pair"))?;
    Ok(())
}

/// What came in the gap is lost to the secondary.
pub(super) async fn mark_gap(secondary: &Client) -> Result<(), ApplyError> {
    tracing::error!("{GAP}; every table needs seeding");
    secondary
        .execute("UPDATE pgtandem.seeding SET state = 'unseeded', note = $1", &[&GAP])
        .await
        .map_err(doing("mark all tables for seeding"))?;
    Ok(())
}

async fn look_at_primary(primary: &Client, config: &ApplierConfig) -> Result<Primary, ApplyError> {
    if journal::read_state(primary).await?.is_none() {
        return Err(ApplyError::NotInstalled(config.primary.describe()));
    }
    let row = primary
        .query_one(
            "SELECT pair, emptied, pg_current_snapshot()::text, pg_current_wal_insert_lsn() FROM pgtandem.side",
            &[],
        )
        .await
        .map_err(doing("read pgtandem.side"))?;
    let snapshot: Snapshot = row.get::<_, &str>(2).parse()?;
    Ok(Primary {
        pair: row.get(0),
        emptied: row.get::<_, Option<Unsigned>>(1).map_or(0, |emptied| emptied.0),
        xmax: snapshot.xmax(),
        log_end: row.get::<_, Unsigned>(3).0,
    })
}

/// `None`: nothing is installed there. It may be of an earlier version.
async fn look_at_secondary(secondary: &Client) -> Result<Option<Secondary>, ApplyError> {
    let installed: bool = secondary
        .query_one("SELECT to_regclass('pgtandem.watermark') IS NOT NULL", &[])
        .await
        .map_err(doing("look for schema pgtandem"))?
        .get(0);
    if !installed {
        return Ok(None);
    }
    let row = secondary
        .query_opt("SELECT s.side, to_jsonb(s) ->> 'pair' FROM pgtandem.side s", &[])
        .await
        .map_err(doing("read pgtandem.side"))?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Secondary {
        side: row.get(0),
        pair: row.get(1),
        watermark: read_watermark(secondary).await?,
    }))
}

/// A flip turns the old primary before anybody follows the new one.
async fn refuse_a_former_primary(secondary: &Client, config: &ApplierConfig) -> Result<(), ApplyError> {
    match journal::read_state(secondary).await? {
        Some(state) if state.role == SideRole::Primary && state.epoch < config.epoch => {
            Err(ApplyError::Inconsistent(format!(
                "{} takes itself for the primary, in epoch {}, and {} is it in epoch {}: it was restored from a copy older than the last switchover, and takes writes. {}",
                config.secondary.describe(),
                state.epoch,
                config.primary.describe(),
                config.epoch,
                begin_anew(config.secondary.side)
            )))
        }
        _ => Ok(()),
    }
}

fn begin_anew(secondary: Side) -> String {
    format!("To begin anew, drop schema pgtandem on {secondary} and run `pgtandem backfill`")
}

fn judge(primary: &Primary, secondary: &Secondary, primary_side: Side) -> Result<Kin, String> {
    let secondary_side = primary_side.other();
    let Some(watermark) = &secondary.watermark else {
        return Ok(Kin::Strangers);
    };
    let pair = match (&primary.pair, &secondary.pair) {
        (Some(here), Some(there)) if here == there => Some(here.clone()),
        (Some(here), None) => Some(here.clone()),
        (None, None) => None,
        _ => {
            return Err(format!(
                "{secondary_side} does not follow this {primary_side} but another database: proxy.yaml names the database of another pair, \
                 {primary_side} was given to another secondary since, or one of the two was restored from a copy. {}",
                begin_anew(secondary_side)
            ));
        }
    };
    let reached = watermark.target.as_ref();
    let position = reached.map_or(watermark.position, |target| target.position.max(watermark.position));
    let seen = watermark.snapshot.xmax();
    let xmax = reached.map_or(seen, |target| target.snapshot.xmax().max(seen));
    if position > primary.log_end || xmax > primary.xmax {
        return Err(format!(
            "{secondary_side} has more than {primary_side} has: it was brought up to {} and transaction {xmax}, {primary_side} stands at {} and transaction {}. \
             {primary_side} was restored from an older copy, or is another server. {}",
            lsn(position),
            lsn(primary.log_end),
            primary.xmax,
            begin_anew(secondary_side)
        ));
    }
    Ok(match pair {
        Some(pair) if watermark.snapshot.xmin() < primary.emptied => Kin::Gap(pair),
        Some(pair) => Kin::Pair(pair),
        None => Kin::Unnamed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::session::Target;

    fn primary(pair: Option<&str>, emptied: u64) -> Primary {
        Primary {
            pair: pair.map(str::to_owned),
            emptied,
            xmax: 100,
            log_end: 1000,
        }
    }

    fn secondary(pair: Option<&str>, snapshot: &str, position: u64) -> Secondary {
        Secondary {
            pair: pair.map(str::to_owned),
            side: "new".into(),
            watermark: Some(WatermarkRow {
                epoch: 1,
                primary_side: "legacy".into(),
                round: 7,
                snapshot: snapshot.parse().unwrap(),
                position,
                target: None,
                outside: None,
            }),
        }
    }

    fn judged(primary: &Primary, secondary: &Secondary) -> Result<Kin, String> {
        judge(primary, secondary, Side::Legacy)
    }

    #[test]
    fn a_pair_is_told_by_its_name() {
        let follows = secondary(Some("a"), "90:95:90", 900);
        assert_eq!(judged(&primary(Some("a"), 90), &follows), Ok(Kin::Pair("a".into())));
        for other in [Some("b"), None] {
            let refused = judged(&primary(other, 0), &follows).unwrap_err();
            assert!(refused.contains("another pair"), "{refused}");
        }
        let unnamed = secondary(None, "90:95:90", 900);
        assert_eq!(judged(&primary(None, 0), &unnamed), Ok(Kin::Unnamed));
        assert_eq!(judged(&primary(Some("a"), 0), &unnamed), Ok(Kin::Pair("a".into())));
        let fresh = Secondary {
            watermark: None,
            ..follows
        };
        assert_eq!(judged(&primary(Some("b"), 0), &fresh), Ok(Kin::Strangers));
    }

    #[test]
    fn what_lies_ahead_of_the_primary_is_of_another_past() {
        let a = Some("a");
        for ahead in [secondary(a, "90:101:90", 900), secondary(a, "90:95:90", 1001)] {
            let refused = judged(&primary(a, 0), &ahead).unwrap_err();
            assert!(refused.contains("older copy"), "{refused}");
        }
        let mut in_pieces = secondary(a, "90:95:90", 900);
        if let Some(watermark) = &mut in_pieces.watermark {
            watermark.target = Some(Target {
                snapshot: "90:101:".parse().unwrap(),
                position: 1001,
                piece: 950,
            });
        }
        assert!(judged(&primary(a, 0), &in_pieces).is_err());
        assert_eq!(
            judged(&primary(a, 0), &secondary(a, "100:100:", 1000)),
            Ok(Kin::Pair("a".into()))
        );
    }

    #[test]
    fn a_journal_emptied_beyond_the_watermark_is_a_gap() {
        let follows = secondary(Some("a"), "90:95:90", 900);
        assert_eq!(judged(&primary(Some("a"), 91), &follows), Ok(Kin::Gap("a".into())));
    }
}
