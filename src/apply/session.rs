//! The applier's two connections and what it knows between rounds.
//!
//! Everything durable is on the secondary: a session starts by reading it, and is thrown away
//! after any error.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::faces::Faces;
use super::held::HeldKeys;
use super::kin::{self, Kin};
use super::lease::{Lease, end_leftovers};
use super::memory::Memory;
use super::quarantine::{EntryNumbers, QuarantineStatus};
use super::sequences::Sequences;
use super::tables::Tables;
use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{Oid, PINNED_SETTINGS, privileges};
use crate::control::Epoch;
use crate::journal::horizon::Lookout;
use crate::journal::read::{RoundReader, Unsigned};
use crate::journal::{self, SideRole};
use crate::upstream::control::{Control, connect};

/// A long backlog being applied in pieces: the target stays until its end is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub snapshot: Snapshot,
    pub position: u64,
    /// Whole transactions up to here are applied.
    pub piece: u64,
}

pub(super) struct Session {
    pub config: Arc<ApplierConfig>,
    /// The name that both sides bear.
    pub pair: String,
    /// The journal no longer has all that the secondary lacked when this session began.
    pub gap: bool,
    /// Reads rounds; may be inside a round's transaction.
    pub primary: Control,
    /// To the primary as well, for everything beside the reading: flushing, rotation, catalog,
    /// sequences.
    pub aside: Control,
    pub secondary: Control,
    pub own_role: String,
    pub reader: RoundReader,
    pub lookout: Lookout,
    pub tables: Tables,
    pub faces: Faces,
    /// DDL was run since they were read.
    pub tables_stale: bool,
    /// Everything that this snapshot sees is on the secondary.
    pub since: Snapshot,
    /// The end of the log when `since` was taken.
    pub position: u64,
    /// The snapshot stored on the secondary: `since`, or older when nothing came in between.
    pub durable: Snapshot,
    pub round: u64,
    pub target: Option<Target>,
    /// DDL outside transactions that was begun and not known to be done.
    pub outside: Option<String>,
    pub sequences: Sequences,
    /// What this round's transaction will have changed once it commits.
    pub cleared_in_round: HashSet<Oid>,
    pub diverged_in_round: HashMap<Oid, u64>,
    pub held_in_round: u64,
    pub entries: EntryNumbers,
    /// The error of the last transaction that was held.
    pub last_refusal: Option<String>,
    pub transactions_in_round: u64,
    /// The keys of everything in quarantine.
    pub held: HeldKeys,
    /// Transactions of this read, or of the target that is being reached in pieces, that are held.
    pub held_of_read: HashSet<u64>,
    pub quarantine: QuarantineStatus,
    pub memory: Arc<Memory>,
    pub progress: Progress,
}

/// Totals since the session began, for the status.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    pub changes: u64,
    pub transactions: u64,
}

/// Plans are made once and kept: tables grow after their statements were planned, and a plan
/// that searches a table row by row must not outlive the day it was small. So every search goes
/// by index, unless there is none.
const SECONDARY_SETTINGS: &str = "\
    SET synchronous_commit = on; SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; \
    SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off; SET max_parallel_workers_per_gather = 0; \
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_deferrable = off; SET row_security = off; SET client_min_messages = warning;";

const PRIMARY_SETTINGS: &str = "\
    SET synchronous_commit = on; SET enable_seqscan = off; SET jit = off; SET max_parallel_workers_per_gather = 0; \
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_deferrable = off; SET row_security = off; SET client_min_messages = warning;";

impl Session {
    /// Connects and reads how far the secondary is. The lease was taken before.
    pub(super) async fn connect(
        config: Arc<ApplierConfig>,
        lease: &Lease,
        memory: Arc<Memory>,
    ) -> Result<Self, ApplyError> {
        let aside = connect_primary(&config, &purpose(config.epoch)).await?;
        let mut kin = kin::look(&aside, lease.connection(), &config).await?;
        end_leftovers(lease.connection(), config.epoch).await?;
        let mut secondary = connect_secondary(&config).await?;
        become_replica(&secondary).await?;
        if kin == Kin::Strangers {
            kin::refuse_to_displace(&aside, &config).await?;
        }
        end_leftovers(&aside, config.epoch).await?;
        if let Kin::Gap(_) = kin {
            // A former applier may have gone on between the two looks.
            kin = kin::look(&aside, lease.connection(), &config).await?;
        }
        let primary = connect_primary(&config, &purpose(config.epoch)).await?;
        pass_any_bytes(&primary).await?;
        pass_any_bytes(&secondary).await?;
        not_overtaken(&secondary, &config).await?;
        // It may have been away when mirroring began. What is recorded there stays.
        let role = SideRole::from(config.stray_writers);
        journal::install(&mut secondary, config.secondary.side, role, config.epoch).await?;

        let pair = match &kin {
            Kin::Strangers | Kin::Unnamed => kin::name_pair(&aside, &secondary).await?,
            Kin::Pair(pair) | Kin::Gap(pair) => pair.clone(),
        };
        kin::adopt(&secondary, &pair).await?;
        if let Kin::Gap(_) = kin {
            kin::mark_gap(&secondary).await?;
        }
        let mut aside = aside;
        let faces = Faces::put(&config, &mut aside, &mut secondary).await?;
        let reader = RoundReader::prepare(&primary, config.read_by, &faces.shapes())
            .await
            .map_err(doing("prepare the reading of rounds"))?;
        let own_role = secondary
            .query_one("SELECT current_user::text", &[])
            .await
            .map_err(doing("ask for the proxy's own role"))?
            .get(0);
        let mut session = Self {
            tables: Tables::default(),
            faces,
            tables_stale: false,
            since: Snapshot::before_everything(),
            durable: Snapshot::before_everything(),
            position: 0,
            round: 0,
            target: None,
            outside: None,
            sequences: Sequences::default(),
            cleared_in_round: HashSet::new(),
            diverged_in_round: HashMap::new(),
            held_in_round: 0,
            entries: EntryNumbers::default(),
            last_refusal: None,
            transactions_in_round: 0,
            held: HeldKeys::default(),
            held_of_read: HashSet::new(),
            quarantine: QuarantineStatus::default(),
            memory,
            progress: Progress::default(),
            gap: matches!(kin, Kin::Gap(_)),
            pair,
            config,
            primary,
            aside,
            secondary,
            own_role,
            reader,
            lookout: Lookout::default(),
        };
        session.load_watermark().await?;
        session.refill_after_a_crash().await?;
        session.heed_halt().await?;
        session.load_held(None).await?;
        session.summarize_quarantine().await?;
        session.reload_tables().await?;
        Ok(session)
    }

    pub(super) async fn reload_tables(&mut self) -> Result<(), ApplyError> {
        self.tables = Tables::load(&self.secondary).await?;
        self.tables_stale = false;
        Ok(())
    }

    /// What DDL of this round has left, where rows follow it. Not after every statement: a script
    /// that makes a thousand tables would read them all a thousand times.
    pub(super) async fn refresh_tables(&mut self) -> Result<(), ApplyError> {
        if self.tables_stale {
            self.reload_tables().await?;
        }
        Ok(())
    }

    async fn load_watermark(&mut self) -> Result<(), ApplyError> {
        let found = read_watermark(&self.secondary).await?;
        let watermark = match found {
            Some(watermark) => watermark,
            None => {
                self.begin_from_nothing().await?;
                read_watermark(&self.secondary)
                    .await?
                    .ok_or_else(|| ApplyError::Inconsistent("the watermark is gone again".into()))?
            }
        };
        let here = (watermark.epoch, watermark.primary_side.as_str());
        if here != (self.config.epoch.0, self.config.primary.side.as_str()) {
            return Err(ApplyError::Deposed(format!(
                "the secondary follows {} in epoch {}, this applier {} in epoch {}",
                watermark.primary_side, watermark.epoch, self.config.primary.side, self.config.epoch
            )));
        }
        self.round = watermark.round;
        self.since = watermark.snapshot.clone();
        self.durable = watermark.snapshot;
        self.position = watermark.position;
        self.target = watermark.target;
        self.outside = watermark.outside;
        Ok(())
    }

    /// The first time: everything in the journal is still to come. If some of it is already
    /// gone (this secondary replaces another), no table can count as equal because it was empty
    /// when its capture began.
    async fn begin_from_nothing(&self) -> Result<(), ApplyError> {
        self.primary
            .batch_execute(
                "UPDATE pgtandem.captured SET was_empty = false
                  WHERE was_empty AND EXISTS (SELECT FROM pgtandem.side WHERE truncations > 0)",
            )
            .await
            .map_err(doing("begin mirroring"))?;
        self.secondary
            .execute(
                "INSERT INTO pgtandem.watermark (epoch, primary_side, round, snapshot, position)
                 VALUES ($1, $2, 0, $3, '0/0') ON CONFLICT DO NOTHING",
                &[
                    &(self.config.epoch.0 as i64),
                    &self.config.primary.side.as_str(),
                    &Snapshot::before_everything().to_string(),
                ],
            )
            .await
            .map_err(doing("begin mirroring"))?;
        Ok(())
    }
}

/// The row of `pgtandem.watermark`.
pub(super) struct WatermarkRow {
    pub epoch: u64,
    pub primary_side: String,
    pub round: u64,
    pub snapshot: Snapshot,
    pub position: u64,
    pub target: Option<Target>,
    pub outside: Option<String>,
}

pub(super) async fn read_watermark(secondary: &Client) -> Result<Option<WatermarkRow>, ApplyError> {
    let row = secondary
        .query_opt(
            "SELECT epoch, primary_side, round, snapshot, position, target, target_position, piece, outside FROM pgtandem.watermark",
            &[],
        )
        .await
        .map_err(doing("read the watermark"))?;
    let Some(row) = row else { return Ok(None) };
    let target = match (
        row.get::<_, Option<&str>>(5),
        row.get::<_, Option<Unsigned>>(6),
        row.get::<_, Option<Unsigned>>(7),
    ) {
        (Some(snapshot), Some(position), Some(piece)) => Some(Target {
            snapshot: snapshot.parse()?,
            position: position.0,
            piece: piece.0,
        }),
        _ => None,
    };
    Ok(Some(WatermarkRow {
        epoch: row.get::<_, i64>(0) as u64,
        primary_side: row.get(1),
        round: row.get::<_, i64>(2) as u64,
        snapshot: row.get::<_, &str>(3).parse()?,
        position: row.get::<_, Unsigned>(4).0,
        target,
        outside: row.get(8),
    }))
}

/// Tells the connections of whoever holds the lease from all others; with the epoch, since after
/// a flip the other direction's are on the same servers.
pub(crate) fn purpose(epoch: Epoch) -> String {
    format!("applier of epoch {epoch}")
}

pub(super) async fn connect_primary(config: &ApplierConfig, purpose: &str) -> Result<Control, ApplyError> {
    let primary = connect(&config.primary, purpose).await?;
    primary
        .batch_execute(&format!("{PINNED_SETTINGS} {PRIMARY_SETTINGS}"))
        .await
        .map_err(doing("prepare the connection to the primary"))?;
    Ok(primary)
}

/// An SQL_ASCII database holds bytes of any encoding, which its server would otherwise refuse to send
/// or to take as what they are not. Where only one side is of that kind, the other one decides.
async fn pass_any_bytes(client: &Client) -> Result<(), ApplyError> {
    client
        .batch_execute(
            "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)
              WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'",
        )
        .await
        .map_err(doing("set the encoding of rounds"))
}

async fn connect_secondary(config: &ApplierConfig) -> Result<Control, ApplyError> {
    let secondary = connect(&config.secondary, &purpose(config.epoch)).await?;
    secondary
        .batch_execute(&format!("{PINNED_SETTINGS} {SECONDARY_SETTINGS}"))
        .await
        .map_err(doing("prepare the connection to the secondary"))?;
    Ok(secondary)
}

/// A flip ends the connections of the old direction's appliers once it has turned the side that they
/// write to; one that connects after that must not go on, least of all with sequences.
async fn not_overtaken(secondary: &Client, config: &ApplierConfig) -> Result<(), ApplyError> {
    match journal::read_state(secondary).await? {
        Some(state) if state.role == SideRole::Primary && state.epoch >= config.epoch => Err(ApplyError::Flipped(
            format!("{} is the primary, in epoch {}", config.secondary.side, state.epoch),
        )),
        _ => Ok(()),
    }
}

/// As a replica, no foreign key and no trigger of the application fires for what is applied.
async fn become_replica(secondary: &Client) -> Result<(), ApplyError> {
    let set = secondary.batch_execute("SET session_replication_role = replica").await;
    match set {
        Ok(()) => Ok(()),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let sql = privileges::missing_replication_role(secondary)
                .await
                .map_err(doing("check privileges"))?;
            Err(ApplyError::Privileges(sql.unwrap_or_else(|| error.to_string())))
        }
        Err(error) => Err(doing("set session_replication_role")(error)),
    }
}
