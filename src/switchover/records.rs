//! `pgtandem.flip`, `flip_step` and `proxy`: what a flip's participants tell each other, and what
//! is left to read of it. Statements only; what they mean is in [`super::machine`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio_postgres::{Client, GenericClient, Row};

use super::machine::{FlipId, Kind, Step};
use super::recover::Recorded;
use super::sessions::Survey;
use crate::catalog::quote::literal;
use crate::control::{Control, Epoch, Phase, Side};
use crate::journal::{LOCK_CLASS, LOCK_FLIP, SideRole, SlotState};
use crate::upstream::control::error_chain;

/// What every proxy listens to.
pub const CHANNEL: &str = "pgtandem_flip";

/// A proxy that has not beaten for so long is taken for dead or cut off.
pub const SILENCE_MAX: Duration = Duration::from_secs(4);

/// A row of `pgtandem.flip`.
#[derive(Debug, Clone)]
pub struct FlipRow {
    pub id: FlipId,
    pub kind: Kind,
    pub from: Side,
    /// Where it leads.
    pub to: Control,
    pub coordinator: String,
    pub forced: Option<String>,
    pub step: Step,
    /// Nobody holds the coordinator's lock, or it has fallen silent, or its time is over.
    pub orphaned: bool,
}

/// A row of `pgtandem.proxy`.
#[derive(Debug, Clone)]
pub struct ProxyRow {
    pub id: String,
    pub name: String,
    pub address: String,
    pub version: String,
    pub phase: String,
    pub epoch: Epoch,
    pub clock_offset_ms: f64,
    /// Since its last beat.
    pub silent: Duration,
    pub sessions: Survey,
    pub flip: Option<FlipId>,
    pub answer: Option<String>,
    pub detail: Option<Value>,
}

/// One side as a proxy finds it.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// `None`: pgtandem is not installed there.
    pub role: Option<Recorded>,
    /// The last flip recorded there.
    pub flip: Option<FlipRow>,
}

/// Who registers.
#[derive(Debug, Clone)]
pub struct Member {
    /// This process's.
    pub id: String,
    pub name: String,
    pub address: String,
}

/// A side's recorded role, as recovery knows it.
pub fn recorded(role: SideRole, epoch: Epoch) -> Recorded {
    match role {
        SideRole::Primary | SideRole::Off => Recorded::Primary(epoch),
        SideRole::Secondary { .. } | SideRole::Fenced => Recorded::Secondary(epoch),
    }
}

/// Registers the proxy, or keeps it fresh. What left long ago goes.
pub async fn beat(
    client: &Client,
    me: &Member,
    control: Control,
    sessions: &Survey,
) -> Result<(), tokio_postgres::Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    client
        .batch_execute(&format!(
            "INSERT INTO pgtandem.proxy AS p (id, name, address, version, phase, epoch, clock_offset_ms, sessions)
             VALUES ({id}, {name}, {address}, {version}, {phase}, {epoch},
                     {now} - 1000 * EXTRACT(epoch FROM pg_catalog.clock_timestamp())::float8, {sessions}::jsonb)
             ON CONFLICT (id) DO UPDATE SET phase = EXCLUDED.phase, epoch = EXCLUDED.epoch,
                 clock_offset_ms = EXCLUDED.clock_offset_ms, sessions = EXCLUDED.sessions, beat = pg_catalog.clock_timestamp();
             DELETE FROM pgtandem.proxy WHERE beat < pg_catalog.clock_timestamp() - interval '10 minutes'",
            id = literal(&me.id),
            name = literal(&me.name),
            address = literal(&me.address),
            version = literal(env!("CARGO_PKG_VERSION")),
            phase = literal(control.phase.as_str()),
            epoch = control.epoch.0,
            now = now.as_secs_f64() * 1000.0,
            sessions = literal(&serde_json::to_string(sessions).unwrap_or_else(|_| "{}".into())),
        ))
        .await
}

/// A proxy that stops is not waited for.
pub async fn leave(client: &Client, me: &Member) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute(&format!(
            "DELETE FROM pgtandem.proxy WHERE id = {}; NOTIFY {CHANNEL}",
            literal(&me.id)
        ))
        .await
}

/// What a proxy has to say in a flip.
pub async fn answer(
    client: &Client,
    me: &Member,
    flip: &str,
    answer: &str,
    detail: &Value,
) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute(&format!(
            "UPDATE pgtandem.proxy SET flip = {}, answer = {}, detail = {}::jsonb, beat = pg_catalog.clock_timestamp()
              WHERE id = {}; NOTIFY {CHANNEL}",
            literal(flip),
            literal(answer),
            literal(&detail.to_string()),
            literal(&me.id)
        ))
        .await
}

/// Every proxy that has beaten lately.
pub async fn proxies(client: &Client) -> Result<Vec<ProxyRow>, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT id, name, address, version, phase, epoch, clock_offset_ms,
                    EXTRACT(epoch FROM pg_catalog.clock_timestamp() - beat)::float8, flip, answer, detail::text,
                    sessions::text
               FROM pgtandem.proxy ORDER BY name, id",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| ProxyRow {
            id: row.get(0),
            name: row.get(1),
            address: row.get(2),
            version: row.get(3),
            phase: row.get(4),
            epoch: epoch(row, 5),
            clock_offset_ms: row.get(6),
            silent: Duration::from_secs_f64(row.get::<_, f64>(7).max(0.0)),
            flip: row.get(8),
            answer: row.get(9),
            detail: row
                .get::<_, Option<&str>>(10)
                .and_then(|text| serde_json::from_str(text).ok()),
            sessions: row
                .get::<_, Option<&str>>(11)
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default(),
        })
        .collect())
}

const FLIP_COLUMNS: &str = "f.id, f.kind, f.from_side, f.to_side, f.epoch, f.phase, f.coordinator, f.forced, f.step";

/// The side's role and its last flip.
pub async fn look(client: &Client) -> Result<Look, tokio_postgres::Error> {
    let installed = client
        .query_one(
            "SELECT to_regclass('pgtandem.state') IS NOT NULL AND to_regclass('pgtandem.flip_step') IS NOT NULL",
            &[],
        )
        .await?
        .get::<_, bool>(0);
    match installed {
        true => look_at(client).await,
        false => Ok(Look::default()),
    }
}

/// The same where pgtandem is known to be installed: clients are held meanwhile.
pub async fn look_at(client: &Client) -> Result<Look, tokio_postgres::Error> {
    let row = client
        .query_one(
            &format!(
                "SELECT {FLIP_COLUMNS}, pg_catalog.clock_timestamp() > f.deadline OR NOT EXISTS (
                            SELECT FROM pg_catalog.pg_locks l
                             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
                               AND l.classid = {LOCK_CLASS}::oid AND l.objid = {LOCK_FLIP}::oid
                               AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
                        OR EXISTS (SELECT FROM pgtandem.proxy p
                                    WHERE p.name = f.coordinator AND p.beat < pg_catalog.clock_timestamp() - {silence}),
                        s.state
                   FROM (SELECT pg_catalog.pg_sequence_last_value('pgtandem.state'::regclass) AS state) s
                   LEFT JOIN (SELECT * FROM pgtandem.flip ORDER BY began DESC LIMIT 1) f ON true",
                silence = interval(SILENCE_MAX)
            ),
            &[],
        )
        .await?;
    let state: Option<i64> = row.get(10);
    Ok(Look {
        role: state
            .and_then(SlotState::unpack)
            .map(|state| recorded(state.side.role, state.side.epoch)),
        flip: flip_of(&row),
    })
}

/// One flip.
pub async fn find(client: &Client, id: &str) -> Result<Option<FlipRow>, tokio_postgres::Error> {
    let sql = format!("SELECT {FLIP_COLUMNS}, true FROM pgtandem.flip f WHERE f.id = $1");
    Ok(client.query_opt(&sql, &[&id]).await?.as_ref().and_then(flip_of))
}

/// One flip, locked until the transaction's end.
pub async fn find_for_update(client: &impl GenericClient, id: &str) -> Result<Option<FlipRow>, tokio_postgres::Error> {
    let row = client
        .query_opt(
            &format!("SELECT {FLIP_COLUMNS}, true FROM pgtandem.flip f WHERE f.id = $1 FOR UPDATE"),
            &[&id],
        )
        .await?;
    Ok(row.as_ref().and_then(flip_of))
}

/// `None` also for what a later version has written.
fn flip_of(row: &Row) -> Option<FlipRow> {
    let text = |column| row.get::<_, Option<&str>>(column);
    let to: Side = text(3)?.parse().ok()?;
    Some(FlipRow {
        id: text(0)?.to_owned(),
        kind: if text(1)? == Kind::Rehearsal.as_str() {
            Kind::Rehearsal
        } else {
            Kind::Flip
        },
        from: text(2)?.parse().ok()?,
        to: Control {
            phase: phase_of(text(5)?)?,
            primary: to,
            epoch: epoch(row, 4),
        },
        coordinator: text(6)?.to_owned(),
        forced: text(7).map(str::to_owned),
        step: Step::parse(text(8)?)?,
        orphaned: row.get(9),
    })
}

fn epoch(row: &Row, column: usize) -> Epoch {
    Epoch(u64::try_from(row.get::<_, i64>(column)).unwrap_or_default())
}

fn phase_of(text: &str) -> Option<Phase> {
    serde_json::from_value(Value::String(text.to_owned())).ok()
}

/// Statements that write a flip's beginning.
pub fn begin_sql(flip: &FlipRow, who: &str, measured: &Value, patience: Duration) -> String {
    let forced = flip.forced.as_deref().map_or_else(|| "NULL".to_owned(), literal);
    format!(
        "INSERT INTO pgtandem.flip (id, kind, from_side, to_side, epoch, phase, coordinator, forced, step, deadline)
         VALUES ({id}, '{kind}', '{from}', '{to}', {epoch}, '{phase}', {coordinator}, {forced}, '{step}',
                 pg_catalog.clock_timestamp() + {patience});
         INSERT INTO pgtandem.flip_step (flip, number, who, step, measured)
         VALUES ({id}, 1, {who}, '{step}', {measured}::jsonb);
         NOTIFY {CHANNEL}",
        id = literal(&flip.id),
        kind = flip.kind.as_str(),
        from = flip.from,
        to = flip.to.primary,
        epoch = flip.to.epoch,
        phase = flip.to.phase,
        coordinator = literal(&flip.coordinator),
        step = flip.step,
        patience = interval(patience),
        who = literal(who),
        measured = literal(&measured.to_string()),
    )
}

/// A query that takes a flip from one of `expected` to `step` and says whether it did.
pub fn go_sql(id: &str, expected: &[Step], step: Step, who: &str, measured: &Value, patience: Duration) -> String {
    let expected: Vec<String> = expected.iter().map(|step| format!("'{step}'")).collect();
    format!(
        "SELECT pgtandem.flip_go({}, ARRAY[{}], '{step}', {}, {}::jsonb, {})",
        literal(id),
        expected.join(", "),
        literal(who),
        literal(&measured.to_string()),
        interval(patience),
    )
}

fn interval(duration: Duration) -> String {
    format!("interval '{} milliseconds'", duration.as_millis())
}

/// A flip with its steps, as it is shown.
pub type Told = (FlipTold, Vec<StepTold>);

#[derive(Debug, Clone)]
pub struct FlipTold {
    pub row: FlipRow,
    pub began: String,
    pub ended: Option<String>,
    pub outcome: Option<String>,
}

#[derive(Debug, Clone)]
pub struct StepTold {
    pub at: String,
    /// Until the next one began.
    pub took_ms: Option<f64>,
    pub who: String,
    pub step: Step,
    pub measured: Value,
}

const RFC3339: &str = "'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'";

/// Whether a side records flips at all.
pub async fn is_installed(client: &Client) -> Result<bool, String> {
    let row = client
        .query_one("SELECT to_regclass('pgtandem.flip_step') IS NOT NULL", &[])
        .await
        .map_err(|error| error_chain(&error))?;
    Ok(row.get(0))
}

/// The flips and rehearsals recorded on one side, the latest first.
pub async fn history(client: &Client, limit: i64) -> Result<Vec<Told>, String> {
    let told = |error| error_chain(&error);
    let rows = client
        .query(
            &format!(
                "SELECT {FLIP_COLUMNS}, false, pg_catalog.to_char(f.began AT TIME ZONE 'UTC', {RFC3339}),
                        pg_catalog.to_char(f.ended AT TIME ZONE 'UTC', {RFC3339}), f.outcome
                   FROM pgtandem.flip f ORDER BY f.began DESC LIMIT $1"
            ),
            &[&limit],
        )
        .await
        .map_err(told)?;
    let mut history = Vec::new();
    for row in &rows {
        let Some(flip) = flip_of(row) else { continue };
        let steps = client
            .query(
                &format!(
                    "SELECT pg_catalog.to_char(at AT TIME ZONE 'UTC', {RFC3339}), who, step, measured::text,
                            1000 * EXTRACT(epoch FROM pg_catalog.lead(at) OVER (ORDER BY number) - at)::float8
                       FROM pgtandem.flip_step WHERE flip = $1 ORDER BY number"
                ),
                &[&flip.id],
            )
            .await
            .map_err(told)?;
        let steps = steps
            .iter()
            .filter_map(|row| {
                Some(StepTold {
                    at: row.get(0),
                    took_ms: row.get(4),
                    who: row.get(1),
                    step: Step::parse(row.get(2))?,
                    measured: serde_json::from_str(row.get(3)).unwrap_or_default(),
                })
            })
            .collect();
        history.push((
            FlipTold {
                row: flip,
                began: row.get(10),
                ended: row.get(11),
                outcome: row.get(12),
            },
            steps,
        ));
    }
    Ok(history)
}
