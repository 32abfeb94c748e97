//! What a proxy does while another one applies: asks for the lease, and tells from the two
//! databases alone how far the other one is.

use std::time::Duration;

use tokio::time::Instant;

use super::kin;
use super::lease::Lease;
use super::session::{WatermarkRow, connect_primary, read_watermark};
use super::status::{ApplierStatus, Seeding, TableStatus, WatermarkStatus};
use super::tables::{VERIFIED, verified};
use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::snapshot::Snapshot;
use crate::journal::read::{lsn, window_sql};
use crate::upstream::control::Control;

pub(super) struct Follower<'a> {
    lease: &'a Lease,
    primary: Control,
    /// The ticket of whoever waits for a cut, and the primary's snapshot after it was drawn. Under
    /// load there may never be a moment at which nothing waits in the journal.
    asked: Option<(u64, Snapshot)>,
}

/// How far the secondary was at one moment.
pub(super) struct Sight {
    /// The stored watermark, where it is this direction's.
    pub watermark: Option<WatermarkRow>,
    /// Nothing waits in the journal beyond the watermark.
    pub caught_up: bool,
    /// The ticket up to which a round that began after it has been applied.
    pub reached: Option<u64>,
    looked: Instant,
}

impl<'a> Follower<'a> {
    pub(super) async fn connect(config: &ApplierConfig, lease: &'a Lease) -> Result<Self, ApplyError> {
        let primary = connect_primary(config, "follower").await?;
        // The watermark of another pair would say nothing of this primary.
        kin::look(&primary, lease.connection(), config).await?;
        Ok(Self {
            lease,
            primary,
            asked: None,
        })
    }

    /// The one that applies may be about to install what is looked at here.
    async fn is_installed(&self) -> Result<bool, ApplyError> {
        let row = self
            .lease
            .connection()
            .query_one("SELECT to_regclass('pgtandem.watermark') IS NOT NULL", &[])
            .await
            .map_err(doing("look for schema pgtandem"))?;
        Ok(row.get(0))
    }

    /// `ticket`: of whoever waits for a cut, where somebody does.
    pub(super) async fn look(&mut self, config: &ApplierConfig, ticket: Option<u64>) -> Result<Sight, ApplyError> {
        let looked = Instant::now();
        if let (None, Some(ticket)) = (&self.asked, ticket) {
            self.asked = Some((ticket, self.snapshot_now().await?));
        }
        let watermark = if self.is_installed().await? {
            read_watermark(self.lease.connection()).await?
        } else {
            None
        };
        let watermark = watermark.filter(|watermark| watermark.epoch == config.epoch.0);
        let caught_up = match &watermark {
            Some(watermark) if watermark.target.is_none() => {
                let window = window_sql(&watermark.snapshot, None);
                let waits = self
                    .primary
                    .query_one(&format!("SELECT EXISTS (SELECT FROM {window} w)"), &[])
                    .await
                    .map_err(doing("look into the journal"))?;
                !waits.get::<_, bool>(0)
            }
            _ => false,
        };
        let passed = matches!(
            (&watermark, &self.asked),
            (Some(watermark), Some((_, asked))) if watermark.target.is_none() && watermark.snapshot.covers(asked)
        );
        let reached = if caught_up {
            self.asked = None;
            ticket
        } else if passed {
            self.asked.take().map(|(ticket, _)| ticket)
        } else {
            None
        };
        Ok(Sight {
            watermark,
            caught_up,
            reached,
            looked,
        })
    }

    async fn snapshot_now(&self) -> Result<Snapshot, ApplyError> {
        let row = self
            .primary
            .query_one("SELECT pg_current_snapshot()::text", &[])
            .await
            .map_err(doing("take a snapshot of the primary"))?;
        Ok(row.get::<_, &str>(0).parse()?)
    }

    /// What the secondary records, for the status.
    pub(super) async fn report(&self, sight: &Sight) -> Result<Report, ApplyError> {
        let secondary = self.lease.connection();
        let applier = self.lease.holder().await?;
        let recorded = match &sight.watermark {
            Some(_) => Some(Recorded {
                age: age_of_watermark(secondary).await?,
                tables: read_tables(secondary).await?,
                strays: count_strays(secondary).await?,
            }),
            None => None,
        };
        Ok(Report { applier, recorded })
    }
}

pub(super) struct Report {
    applier: Option<String>,
    recorded: Option<Recorded>,
}

struct Recorded {
    /// Since the watermark was stored.
    age: Duration,
    tables: Vec<TableStatus>,
    strays: u64,
}

impl ApplierStatus {
    pub(super) fn take_over(&mut self, sight: &Sight, report: Report) {
        self.applier = report.applier;
        let (Some(watermark), Some(recorded)) = (&sight.watermark, report.recorded) else {
            return;
        };
        // A round's end is a moment at which the two were equal. While nothing comes no round
        // is stored, and a look that finds nothing waiting is such a moment.
        let equal = if sight.caught_up {
            Some(sight.looked)
        } else {
            sight
                .looked
                .checked_sub(recorded.age)
                .filter(|_| watermark.target.is_none())
        };
        self.caught_up_at = self.caught_up_at.max(equal);
        self.behind = !sight.caught_up;
        self.round = watermark.round;
        self.watermark = Some(WatermarkStatus {
            snapshot: watermark.snapshot.to_string(),
            position: lsn(watermark.position),
            in_pieces: watermark.target.is_some(),
        });
        self.diverged = recorded.tables.iter().map(|table| table.diverged).sum();
        self.tables = recorded.tables;
        self.strays = recorded.strays;
    }
}

async fn age_of_watermark(secondary: &Control) -> Result<Duration, ApplyError> {
    let row = secondary
        .query_opt(
            "SELECT GREATEST(extract(epoch FROM clock_timestamp() - applied_at), 0)::float8 FROM pgtandem.watermark",
            &[],
        )
        .await
        .map_err(doing("read the watermark's age"))?;
    Ok(row.map_or(Duration::ZERO, |row| {
        Duration::try_from_secs_f64(row.get(0)).unwrap_or_default()
    }))
}

async fn read_tables(secondary: &Control) -> Result<Vec<TableStatus>, ApplyError> {
    let rows = secondary
        .query(
            &format!(
                "SELECT s.schema, s.name, s.state, s.paused, s.note,
                    (SELECT count(*) FROM pgtandem.divergence d WHERE d.schema = s.schema AND d.name = s.name), {VERIFIED}
               FROM pgtandem.seeding s LEFT JOIN pgtandem.verified v USING (schema, name) ORDER BY s.schema, s.name"
            ),
            &[],
        )
        .await
        .map_err(doing("read pgtandem.seeding"))?;
    Ok(rows
        .iter()
        .map(|row| TableStatus {
            schema: row.get(0),
            name: row.get(1),
            seeding: Seeding::parse(row.get(2)),
            paused: row.get(3),
            note: row.get(4),
            diverged: row.get::<_, i64>(5) as u64,
            verified: verified(row, 6),
        })
        .collect())
}

/// Writes of stray writers that the secondary recorded.
pub(super) async fn count_strays(secondary: &Control) -> Result<u64, ApplyError> {
    let row = secondary
        .query_one("SELECT COALESCE(sum(writes), 0)::bigint FROM pgtandem.stray", &[])
        .await
        .map_err(doing("count stray writers"))?;
    Ok(row.get::<_, i64>(0) as u64)
}
