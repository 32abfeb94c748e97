//! Reading the journal by snapshots: the changes visible now and not in the snapshot before.
//!
//! That is exactly: of the transactions whose changes we see, those that the earlier snapshot
//! did not see, i.e. ids from its xmax on, and those that were in progress then. No gaps to
//! track, nothing twice, nothing missed. Reading "position greater than the last one seen"
//! instead loses transactions that commit late; [`ReadBy::Position`] does that, so that a test
//! can show that it would notice.

use std::error::Error;

use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Client, Row, Statement};

use super::horizon::Horizons;
use super::joined::Joined;
use crate::catalog::Oid;
use crate::catalog::snapshot::Snapshot;

/// How rounds are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadBy {
    #[default]
    Snapshot,
    /// The classic mistake. For the test that proves that the storm can fail.
    Position,
}

/// What a journal record stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A row inserted, updated or deleted: one old image consumed, one new image produced.
    Row,
    Truncate,
    /// DDL inside the writer's transaction.
    Ddl,
    /// DDL that may not be in a transaction, recorded after it succeeded.
    DdlOutside,
}

impl Operation {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'R' => Some(Self::Row),
            b'T' => Some(Self::Truncate),
            b'S' => Some(Self::Ddl),
            b'O' => Some(Self::DdlOutside),
            _ => None,
        }
    }

    /// Whether its transaction's changes are ordered one by one, not as a whole.
    pub const fn is_barrier(self) -> bool {
        !matches!(self, Self::Row)
    }
}

/// One captured effect, borrowed from the rows it was read with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<'a> {
    /// Where it stands in the primary's log.
    pub position: u64,
    pub xid: u64,
    pub rel: Oid,
    pub operation: Operation,
    pub old: Option<&'a [u8]>,
    pub new: Option<&'a [u8]>,
}

/// A journal row of a kind that this version does not know.
#[derive(Debug, thiserror::Error)]
#[error("the journal holds a record this version cannot read: {0}")]
pub struct UnknownRecord(String);

impl<'a> Change<'a> {
    pub fn from_row(row: &'a Row) -> Result<Self, UnknownRecord> {
        let read = || -> Result<Option<Self>, tokio_postgres::Error> {
            let operation = Operation::from_byte(row.try_get::<_, i8>(3)? as u8);
            Ok(match operation {
                Some(operation) => Some(Self {
                    position: row.try_get::<_, Unsigned>(0)?.0,
                    xid: row.try_get::<_, Unsigned>(1)?.0,
                    rel: row.try_get(2)?,
                    operation,
                    old: row.try_get::<_, Option<Raw<'_>>>(4)?.map(|raw| raw.0),
                    new: row.try_get::<_, Option<Raw<'_>>>(5)?.map(|raw| raw.0),
                }),
                None => None,
            })
        };
        match read() {
            Ok(Some(change)) => Ok(change),
            Ok(None) => Err(UnknownRecord("unknown operation".into())),
            Err(error) => Err(UnknownRecord(error.to_string())),
        }
    }

    pub fn size(&self) -> usize {
        self.old.map_or(0, <[u8]>::len) + self.new.map_or(0, <[u8]>::len)
    }
}

/// pg_lsn and xid8 as they are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsigned(pub u64);

impl<'a> FromSql<'a> for Unsigned {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(u64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        // xid8 has no constant in tokio-postgres; its OID is fixed.
        *ty == Type::PG_LSN || ty.oid() == 5069
    }
}

/// A text value's bytes: the databases' encoding may be SQL_ASCII, so not every text is UTF-8.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a>(pub &'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TEXT
    }
}

/// A log position as Postgres writes it, for SQL text.
pub fn lsn(position: u64) -> String {
    format!("{:X}/{:X}", position >> 32, position & 0xffff_ffff)
}

/// The journal's rows between two snapshots as a subquery; `until` of `None` is "all that this
/// transaction sees". Values are written into the text: for the parts of a long backlog.
pub fn window_sql(since: &Snapshot, until: Option<&Snapshot>) -> String {
    let listed: Vec<String> = since.in_progress().iter().map(|xid| format!("'{xid}'")).collect();
    let mut arms = Vec::new();
    for slot in 0..3 {
        arms.push(format!(
            "SELECT pos, xid, rel, op, old, new FROM pgtandem.change_{slot} WHERE xid >= '{}'::xid8",
            since.xmax()
        ));
        if !listed.is_empty() {
            arms.push(format!(
                "SELECT pos, xid, rel, op, old, new FROM pgtandem.change_{slot} WHERE xid = ANY (ARRAY[{}]::xid8[])",
                listed.join(",")
            ));
        }
    }
    let visible = until.map_or_else(String::new, |until| {
        format!(" WHERE pg_visible_in_snapshot(w.xid, '{until}'::pg_snapshot)")
    });
    format!("(SELECT * FROM ({}) w{visible})", arms.join(" UNION ALL "))
}

/// The prepared form of the same for ordinary rounds: `$1` the earlier snapshot's xmax, `$2`
/// what was in progress then, `$3` the most rows to read, `$4` the most bytes of images: of what
/// lies beyond, only that it is there (the last column), so that neither side has to hold it.
/// (octet_length does not fetch a value that is stored apart.) `$5`: where to begin to look.
fn window_statement(read_by: ReadBy, shapes: &Shapes) -> String {
    let condition = match read_by {
        ReadBy::Snapshot => "xid >= $1::text::xid8 OR xid = ANY ($2::text[]::xid8[])",
        ReadBy::Position => "pos > $1::text::pg_lsn AND $2::text[] IS NOT NULL",
    };
    let arms: Vec<String> = (0..3)
        .map(|slot| {
            format!(
                "SELECT pos, xid, rel, op, old, new FROM pgtandem.change_{slot} WHERE pos >= $5::text::pg_lsn AND ({condition})"
            )
        })
        .collect();
    // Rows that are put together from others are fewer than these: whether some are missing is told here.
    let cut_off = if shapes.joined.is_empty() {
        ""
    } else {
        " OR count(*) OVER () >= $3::bigint"
    };
    let window = format!(
        "SELECT pos, xid, rel, op, CASE WHEN upto <= $4::bigint THEN old END AS old, CASE WHEN upto <= $4::bigint THEN new END AS new,
                upto > $4::bigint{cut_off} AS beyond
           FROM (SELECT l.*, sum(COALESCE(octet_length(old), 0) + COALESCE(octet_length(new), 0)) OVER (ROWS UNBOUNDED PRECEDING) AS upto
                   FROM (SELECT * FROM ({}) w LIMIT $3::bigint) l) s",
        arms.join(" UNION ALL ")
    );
    if !shapes.joined.is_empty() {
        return joined_statement(&window, &shapes.joined);
    }
    if shapes.transformed {
        format!(
            "SELECT {}, w.beyond FROM {}",
            TRANSFORMED,
            transformed_from(&format!("({window}) w"))
        )
    } else {
        window
    }
}

/// The round's rows where some tables' rows are put together to one table's.
fn joined_statement(window: &str, joined: &[Joined]) -> String {
    let parts = parts_of(joined);
    let arms: Vec<String> = joined
        .iter()
        .map(|one| {
            format!(
                "SELECT pos, xid, rel, op, old, new, beyond FROM {} j",
                one.sql("placed")
            )
        })
        .collect();
    format!(
        "WITH w AS MATERIALIZED ({window}),
              placed AS (SELECT w.*, true AS inside, CASE WHEN bool_or(op <> 'R' AND rel <> ALL ({parts})) OVER same THEN pos ELSE max(pos) OVER same END AS place
                           FROM w WINDOW same AS (PARTITION BY xid))
         SELECT {TRANSFORMED}, w.beyond FROM {} WHERE w.rel <> ALL ({parts})
         UNION ALL SELECT * FROM (SELECT pos, xid, rel, op, old, new, beyond FROM w WHERE beyond LIMIT 1) b
         UNION ALL {}",
        transformed_from("w"),
        arms.join(" UNION ALL ")
    )
}

fn parts_of(joined: &[Joined]) -> String {
    let rels: Vec<String> = joined
        .iter()
        .flat_map(|one| &one.parts)
        .map(|part| part.rel.to_string())
        .collect();
    format!("ARRAY[{}]::oid[]", rels.join(","))
}

/// A journal row `w` as the other side has it, by [`transformed_from`]: of a table whose rows have
/// another shape there, once for each table that they go to.
const TRANSFORMED: &str = "w.pos, w.xid, COALESCE(f.rel, w.rel) AS rel, w.op, \
     CASE WHEN f.rel IS NULL THEN w.old ELSE pgtandem.transformed(f.rel, w.old) END AS old, \
     CASE WHEN f.rel IS NULL THEN w.new ELSE pgtandem.transformed(f.rel, w.new) END AS new";

fn transformed_from(window: &str) -> String {
    format!("{window} LEFT JOIN pgtandem.transform f ON f.source = w.rel AND cardinality(f.sources) = 1")
}

/// What must be known of the tables whose rows have another shape on the other side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shapes {
    /// There are any.
    pub transformed: bool,
    pub joined: Vec<Joined>,
}

impl Shapes {
    /// A part of a long backlog as the other side has it, with a column `place`: the journal rows of
    /// `target` whose place is in it. `place`: the place of a row `w`, as SQL, where `t.top` is the
    /// highest position of its transaction; `within`: the condition on a column of that name. `all`:
    /// what came since the old snapshot, beyond the target as well.
    pub fn backlog_sql(&self, target: &str, all: &str, place: &str, within: &str) -> String {
        let tops = format!("(SELECT xid, max(pos) AS top FROM {target} v GROUP BY xid) t");
        let placed = format!(
            "(SELECT * FROM (SELECT w.*, {place} AS place FROM {target} w JOIN {tops} ON t.xid = w.xid) p WHERE {within})"
        );
        if !self.transformed {
            return placed;
        }
        let from = transformed_from(&format!("{placed} w"));
        if self.joined.is_empty() {
            return format!("(SELECT {TRANSFORMED}, w.place FROM {from})");
        }
        let arms: Vec<String> = self
            .joined
            .iter()
            .map(|one| {
                format!(
                    " UNION ALL SELECT pos, xid, rel, op, old, new, place FROM {} j WHERE {within}",
                    one.sql("placed")
                )
            })
            .collect();
        format!(
            "(WITH placed AS MATERIALIZED (
                SELECT w.*, {place} AS place, t.xid IS NOT NULL AS inside, false AS beyond FROM {all} w LEFT JOIN {tops} ON t.xid = w.xid)
              SELECT {TRANSFORMED}, w.place FROM {from} WHERE w.rel <> ALL ({}){})",
            parts_of(&self.joined),
            arms.concat()
        )
    }
}

/// The statements of an ordinary round, prepared once per connection to the primary.
pub struct RoundReader {
    window: Statement,
    head: Statement,
    shapes: Statement,
    read_by: ReadBy,
    /// Where to begin to look.
    pub horizons: Horizons,
}

/// How much a read may bring into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    pub rows: i64,
    pub bytes: i64,
}

/// What one read of the primary gave, all as of one snapshot.
pub struct RoundRead {
    pub snapshot: Snapshot,
    /// The end of the log, taken after the snapshot: everything it sees lies before.
    pub position: u64,
    /// How far the log is known to be on disk.
    pub flushed: u64,
    /// The state sequence's value.
    pub state: Option<i64>,
    pub rows: Vec<Row>,
    /// There is more than was asked for: some rows are missing, or have no images.
    pub too_large: bool,
    /// The definitions of the tables asked for.
    pub shapes: Vec<Shape>,
}

/// What a table's rows look like in the snapshot of the read (see view `pgtandem.shape`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub rel: Oid,
    pub shape: String,
    pub filenode: Oid,
    pub attributes: String,
}

impl RoundReader {
    pub async fn prepare(client: &Client, read_by: ReadBy, known: &Shapes) -> Result<Self, tokio_postgres::Error> {
        let shapes = if known.transformed {
            "pgtandem.mirrored"
        } else {
            "pgtandem.shape"
        };
        Ok(Self {
            window: client.prepare(&window_statement(read_by, known)).await?,
            head: client
                .prepare(
                    "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn(), pg_current_wal_flush_lsn(),
                            pg_sequence_last_value('pgtandem.state'::regclass)",
                )
                .await?,
            shapes: client
                .prepare(&format!(
                    "SELECT rel, shape, filenode, attributes FROM {shapes} WHERE rel = ANY ($1)"
                ))
                .await?,
            read_by,
            horizons: Horizons::default(),
        })
    }

    /// Reads what came since `since` in one snapshot of the caller's choosing: the transaction
    /// is opened before (REPEATABLE READ, READ ONLY) and ended after by the caller, who sends
    /// all of it without waiting in between.
    pub async fn read(
        &mut self,
        client: &Client,
        since: &Snapshot,
        last_position: u64,
        most: Most,
        rels: &[Oid],
    ) -> Result<RoundRead, RoundReadError> {
        let first = match self.read_by {
            ReadBy::Snapshot => since.xmax().to_string(),
            ReadBy::Position => lsn(last_position),
        };
        let listed: Vec<String> = since.in_progress().iter().map(u64::to_string).collect();
        let horizon = lsn(self.horizons.of(since));
        // One more shows that there are more.
        let rows_max = most.rows.saturating_add(1);
        let window_parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [&first, &listed, &rows_max, &most.bytes, &horizon];
        // Sent back to back in this order, answered in it: one round trip.
        let (begun, head, rows, shapes) = tokio::join!(
            biased;
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            client.query_one(&self.head, &[]),
            client.query(&self.window, &window_parameters),
            self.shapes_of(client, rels),
        );
        begun?;
        let head = head?;
        let rows = rows?;
        let mut too_large = rows.len() as i64 > most.rows;
        for row in &rows {
            too_large |= row.try_get::<_, bool>(6)?;
        }
        let snapshot: Snapshot = head.try_get::<_, &str>(0)?.parse()?;
        let position = head.try_get::<_, Unsigned>(1)?.0;
        Ok(RoundRead {
            snapshot,
            position,
            flushed: head.try_get::<_, Unsigned>(2)?.0,
            state: head.try_get(3)?,
            rows,
            too_large,
            shapes: shapes?,
        })
    }

    pub async fn shapes_of(&self, client: &Client, rels: &[Oid]) -> Result<Vec<Shape>, tokio_postgres::Error> {
        if rels.is_empty() {
            return Ok(Vec::new());
        }
        let rows = client.query(&self.shapes, &[&rels]).await?;
        Ok(rows
            .iter()
            .map(|row| Shape {
                rel: row.get(0),
                shape: row.get(1),
                filenode: row.get(2),
                attributes: row.get(3),
            })
            .collect())
    }
}

/// Why a round could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RoundReadError {
    #[error("read a round: {}", crate::upstream::control::error_chain(.0))]
    Postgres(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Snapshot(#[from] crate::catalog::snapshot::NotASnapshot),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_as_postgres_writes_them() {
        assert_eq!(lsn(0), "0/0");
        assert_eq!(lsn(0x1_0000_00AB), "1/AB");
        assert_eq!(lsn(0xFFFF_FFFF), "0/FFFFFFFF");
    }

    #[test]
    fn a_window_names_every_slot_and_both_ends() {
        let since: Snapshot = "10:20:10,14".parse().unwrap();
        let sql = window_sql(&since, Some(&"30:30:".parse().unwrap()));
        for part in [
            "change_0",
            "change_1",
            "change_2",
            "xid >= '20'::xid8",
            "ARRAY['10','14']::xid8[]",
            "'30:30:'::pg_snapshot",
        ] {
            assert!(sql.contains(part), "{part}");
        }
    }
}
