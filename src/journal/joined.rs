//! Changes of tables whose rows make up the rows of one table on the other side (a split table's
//! parts, after the flip), as changes of that one.
//!
//! A row there is a function of the parts' rows of one key, of which each part has one at most. So a
//! transaction's effect on the key is: out of the parts' rows before it, out of those after it. Its
//! place among the others is its highest position, or its change's own where it has a barrier, as
//! everywhere; that is a valid order of the changes of each part. Between two transactions that
//! touched different parts of a key any order is valid, and this is one. So the changes of a key form
//! a chain, each consuming the row that the one before produced, and they can be applied as a
//! difference, one by one, or up to any place.
//!
//! Where the chain begins nobody has recorded: the parts' rows of the key at the round's old snapshot.
//! They are those of now, less what all transactions since have produced, plus what these consumed.
//! "Now" is the snapshot of the reading transaction, which sees the journal and the tables alike.

use crate::catalog::Oid;
use crate::catalog::quote::identifier;

/// One table of the other side, and those that it is put together from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Under which OID its changes leave the journal.
    pub rel: Oid,
    /// The function that gives its image out of one image, or NULL, for each part.
    pub function: String,
    pub parts: Vec<JoinedPart>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedPart {
    pub rel: Oid,
    /// As it is written in SQL.
    pub relation: String,
    /// The key's columns, in the same order in every part.
    pub key: Vec<String>,
}

impl Joined {
    /// Its changes, with columns pos, xid, rel, op, old, new, place and beyond. `changes` names a
    /// relation with all changes that the transaction sees and the old snapshot did not: pos, xid, rel,
    /// op, old, new, `place`, `inside` (whether it is to be applied), `beyond`.
    pub fn sql(&self, changes: &str) -> String {
        let parts = || 1..=self.parts.len();
        let width = self.parts.first().map_or(0, |part| part.key.len());
        let each = |of: &dyn Fn(usize) -> String| parts().map(of).collect::<Vec<_>>().join(", ");
        let key_of = |prefix: &str| {
            let columns: Vec<String> = (1..=width).map(|at| format!("{prefix}k{at}")).collect();
            columns.join(", ")
        };
        let equal = |one: &str, other: &str| {
            let columns: Vec<String> = (1..=width).map(|at| format!("{one}.k{at} = {other}.k{at}")).collect();
            columns.join(" AND ")
        };
        let key = key_of("");
        let images: Vec<String> = self
            .parts
            .iter()
            .enumerate()
            .map(|(at, part)| part.images(at + 1, changes))
            .collect();
        let now: Vec<String> = self
            .parts
            .iter()
            .enumerate()
            .map(|(at, part)| part.now(at + 1))
            .collect();
        format!(
            "(WITH images AS MATERIALIZED ({images}),
                   touched AS MATERIALIZED (SELECT DISTINCT {key} FROM images WHERE inside),
                   -- The parts' rows at the old snapshot.
                   before AS (
                     SELECT {key}, {first} FROM (
                       SELECT part, {key}, img FROM (
                         {now}
                         UNION ALL SELECT i.part, {of_image}, i.img, -i.n FROM images i JOIN touched u ON {touched_image}) s
                        GROUP BY part, {key}, img HAVING sum(n) > 0) s
                      GROUP BY {key}),
                   -- What each transaction left of each key in each part.
                   steps AS (
                     SELECT {key}, xid, max(pos) AS pos, max(place) AS place, bool_or(beyond) AS beyond, {left} FROM (
                       SELECT part, {key}, xid, max(pos) AS pos, max(place) AS place, bool_or(beyond) AS beyond,
                              bool_or(n <> 0) AS changed, max(img) FILTER (WHERE n > 0) AS img FROM (
                         SELECT part, {key}, xid, img, sum(n) AS n, max(pos) AS pos, max(place) AS place, bool_or(beyond) AS beyond
                           FROM images WHERE inside GROUP BY part, {key}, xid, img) s
                        GROUP BY part, {key}, xid) s
                      GROUP BY {key}, xid)
              SELECT pos, xid, {rel}::oid AS rel, 'R'::\"char\" AS op, {function}({olds}) AS old, {function}({news}) AS new, place, beyond FROM (
                SELECT a.*, {lags} FROM (
                  SELECT g.*, {afters} FROM (
                    SELECT s.*, {firsts}, {counts} FROM steps s LEFT JOIN before b ON {step_before}
                    WINDOW chain AS (PARTITION BY {of_step} ORDER BY s.place, s.xid)) g) a
                WINDOW chain AS (PARTITION BY {key} ORDER BY place, xid)) f)",
            images = images.join(" UNION ALL "),
            first = each(&|at| format!("max(img) FILTER (WHERE part = {at}) AS b{at}")),
            now = now.join(" UNION ALL "),
            of_image = key_of("i."),
            touched_image = equal("i", "u"),
            left = each(&|at| format!(
                "COALESCE(bool_or(changed) FILTER (WHERE part = {at}), false) AS c{at}, max(img) FILTER (WHERE part = {at}) AS n{at}"
            )),
            rel = self.rel,
            function = self.function,
            olds = each(&|at| format!("o{at}")),
            news = each(&|at| format!("a{at}")),
            lags = each(&|at| format!("lag(a{at}, 1, b{at}) OVER chain AS o{at}")),
            // Up to the next change of the part its row is what the last one left: only that one is not NULL.
            afters = each(&|at| format!(
                "CASE WHEN g{at} = 0 THEN b{at} ELSE max(n{at}) OVER (PARTITION BY {key}, g{at}) END AS a{at}"
            )),
            firsts = each(&|at| format!("b.b{at}")),
            counts = each(&|at| format!("count(*) FILTER (WHERE s.c{at}) OVER chain AS g{at}")),
            step_before = equal("s", "b"),
            of_step = key_of("s."),
        )
    }
}

impl JoinedPart {
    fn key_of(&self, row: &str) -> String {
        let columns = self.key.iter().enumerate();
        let columns: Vec<String> = columns
            .map(|(at, name)| format!("{row}.{} AS k{}", identifier(name), at + 1))
            .collect();
        columns.join(", ")
    }

    /// The part's images, old ones counted as -1.
    fn images(&self, at: usize, changes: &str) -> String {
        format!(
            "SELECT {at} AS part, {key}, o.xid, o.pos, o.place, o.inside, o.beyond, o.img, o.n
               FROM (SELECT c.xid, c.pos, c.place, c.inside, c.beyond, i.img COLLATE \"C\" AS img, i.n, i.img::{relation} AS r
                       FROM {changes} c CROSS JOIN LATERAL (VALUES (c.old, -1), (c.new, 1)) AS i(img, n)
                      WHERE c.rel = {rel} AND c.op = 'R' AND i.img IS NOT NULL OFFSET 0) o",
            key = self.key_of("(o.r)"),
            relation = self.relation,
            rel = self.rel,
        )
    }

    /// The rows of the touched keys as the transaction sees them.
    fn now(&self, at: usize) -> String {
        let columns = self.key.iter().enumerate();
        let on: Vec<String> = columns
            .map(|(at, name)| format!("t.{} = u.k{}", identifier(name), at + 1))
            .collect();
        format!(
            "SELECT {at} AS part, {key}, ROW(t.*)::text COLLATE \"C\" AS img, 1 AS n FROM touched u JOIN ONLY {relation} t ON {on}",
            key = self.key_of("t"),
            relation = self.relation,
            on = on.join(" AND "),
        )
    }
}
