//! The rows of two answers side by side: which belong together, which a rule makes the same, which the
//! statement leaves open. Pure.

use std::collections::{BTreeSet, HashMap};

use super::alike::{Cell, alike};
use super::answer::{Answer, keys};
use super::rules::ColumnPlan;
use crate::sql::{NotComparable, ReadFacts, Unstable};

/// Differing rows of each side that are laid side by side.
pub(super) const PAIRED_ROWS_MAX: usize = 200;
/// Rows of equal other columns that are tried against one another for a tolerance.
const TRIED_MAX: usize = 1000;

/// Which of our rows is which of theirs: by the keys where there are any, else by how many
/// values they share; a single value is taken for the one that stands at the same place.
pub(super) fn pair(
    keys: &[usize],
    primary: &Answer,
    secondary: &Answer,
    ours: &[usize],
    theirs: &[usize],
) -> Vec<(usize, usize)> {
    let cells = |answer, rows: &[usize]| -> Vec<(usize, Vec<Cell<'_>>)> {
        let rows = rows.iter().take(PAIRED_ROWS_MAX);
        rows.filter_map(|&row| Some((row, Answer::cells(answer, row)?)))
            .collect()
    };
    let (ours, mut theirs) = (cells(primary, ours), cells(secondary, theirs));
    let mut pairs = Vec::new();
    for (our, one) in ours {
        let best = if keys.is_empty() {
            let shared = |other: &[Cell<'_>]| one.iter().zip(other).filter(|(one, other)| one == other).count();
            // Of equally good ones the first.
            (0..theirs.len()).rev().max_by_key(|&at| shared(&theirs[at].1))
        } else {
            let same = |other: &[Cell<'_>]| keys.iter().all(|&at| one.get(at) == other.get(at));
            theirs.iter().position(|(_, other)| same(other))
        };
        if let Some(at) = best {
            pairs.push((our, theirs.remove(at).0));
        }
    }
    pairs
}

/// Takes off the rows that are the same by the rules. Says whether an ignore was needed for that;
/// `None` where there are more rows than are kept.
pub(super) fn settle(
    plans: &[ColumnPlan],
    primary: &Answer,
    secondary: &Answer,
    ours: &mut Vec<usize>,
    theirs: &mut Vec<usize>,
) -> Option<bool> {
    let ruled = |at: usize| plans.get(at).is_some_and(|plan| plan.ignored || plan.how.is_some());
    let plain = |cells: &[Cell<'_>]| -> Vec<Option<Vec<u8>>> {
        let unruled = cells.iter().enumerate().filter(|(at, _)| !ruled(*at));
        unruled.map(|(_, cell)| cell.map(<[u8]>::to_vec)).collect()
    };
    // By the columns without a rule.
    let mut there: HashMap<Vec<Option<Vec<u8>>>, Vec<usize>> = HashMap::new();
    for &row in theirs.iter() {
        there.entry(plain(&secondary.cells(row)?)).or_default().push(row);
    }
    let (mut left, mut taken, mut ignored) = (Vec::new(), BTreeSet::new(), false);
    for &row in ours.iter() {
        let one = primary.cells(row)?;
        let same = |other: &[Cell<'_>]| {
            plans
                .iter()
                .enumerate()
                .all(|(at, plan)| plan.ignored || alike(plan.how, cell_at(&one, at), cell_at(other, at)))
        };
        let candidates = there.get_mut(&plain(&one));
        let found = candidates.and_then(|rows| {
            let tried = rows.iter().take(TRIED_MAX);
            let at = tried
                .clone()
                .position(|&their| secondary.cells(their).is_some_and(|other| same(&other)))?;
            Some(rows.remove(at))
        });
        let Some(their) = found else {
            left.push(row);
            continue;
        };
        taken.insert(their);
        let other = secondary.cells(their)?;
        ignored |= plans
            .iter()
            .enumerate()
            .any(|(at, plan)| plan.ignored && cell_at(&one, at) != cell_at(&other, at));
    }
    *ours = left;
    theirs.retain(|row| !taken.contains(row));
    Some(ignored)
}

fn cell_at<'a>(cells: &[Cell<'a>], at: usize) -> Cell<'a> {
    cells.get(at).copied().flatten()
}

/// Where in `answer` the rows stand that `other` does not have as often.
pub(super) fn surplus(answer: &Answer, other: &Answer) -> Vec<usize> {
    let mut there: HashMap<u128, usize> = HashMap::new();
    for hash in &other.hashes {
        *there.entry(*hash).or_default() += 1;
    }
    let mut surplus = Vec::new();
    for (at, hash) in answer.hashes.iter().enumerate() {
        match there.get_mut(hash) {
            Some(count) if *count > 0 => *count -= 1,
            _ => surplus.push(at),
        }
    }
    surplus
}

/// Whether answers of different rows may both be right.
pub(super) fn left_open(facts: &ReadFacts, primary: &Answer, secondary: &Answer) -> Option<NotComparable> {
    let same_count = primary.digest.rows == secondary.digest.rows;
    match facts.unstable {
        // How many rows come is not left open, except to a sample.
        Some(Unstable::Sample) => return Some(NotComparable::Sample),
        Some(Unstable::LimitWithoutOrder) if same_count => return Some(NotComparable::LimitWithoutOrder),
        Some(Unstable::OrderDependentFunction) if same_count => return Some(NotComparable::OrderDependentFunction),
        Some(Unstable::DistinctOnWithoutOrder) if same_count => return Some(NotComparable::DistinctOn),
        Some(_) | None => {}
    }
    if !(facts.limited && same_count) {
        return None;
    }
    // ORDER BY with LIMIT: where several rows share the last keys, which of them come is open.
    // A single last row may be tied with rows beyond the limit, too; but were it taken for open,
    // ORDER BY key LIMIT 1 would never show a difference.
    let (ours, theirs) = (keys(facts, primary)?, keys(facts, secondary)?);
    let last = ours.last()?;
    let tied = ours.iter().rev().take_while(|key| *key == last).count();
    let before = ours.len() - tied;
    let sorted = |answer: &Answer| {
        let mut hashes = answer.hashes[..before].to_vec();
        hashes.sort_unstable();
        hashes
    };
    let open = tied > 1 && ours == theirs && sorted(primary) == sorted(secondary);
    open.then_some(NotComparable::LimitWithoutOrder)
}
