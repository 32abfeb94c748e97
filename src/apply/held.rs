//! Which transactions must be held out because of those that already are. Pure.
//!
//! The secondary refuses a transaction; it is put into quarantine whole. What came later and
//! touched one of its keys would find the secondary without the quarantined change, so it is
//! held out as well, and so on. The state that this leaves is exact:
//!
//! > secondary = primary without the effects of the held transactions, which are on keys that no
//! > applied later transaction touches.
//!
//! Why. Take one key of one table and the changes on it in the order of their transactions'
//! places (a transaction's place is its highest position: who changes a row, or takes a unique
//! value, waits for the transaction before to end, so places order whatever shares a key). The
//! first held transaction on that key makes every later one a held one. So what is applied of
//! the key's changes is always a prefix: the row is as the primary had it before the first held
//! change, and no later image rests on one that is missing. Other keys are not concerned.
//! Held transactions are kept in the order of their places, so applying them later in that order
//! continues each key's prefix.
//!
//! One key of a row is its whole image: every change of a row consumes the image that the one
//! before produced. That is enough to follow rows, whatever constraints there are or will be; in a
//! table where none identifies rows, rows alike are interchangeable, so whoever touches an image
//! that a held transaction touched joins it, and the counts of all other images are right. Besides,
//! the value of every unique constraint on plain columns *as the secondary has it* is a key, since
//! a row that is still there keeps its unique values from others. A TRUNCATE that is held takes the whole table. What shares no key text all
//! the same (1.0 and 1.00 under one unique constraint, expression indexes, exclusion constraints)
//! is refused by the secondary when it comes, and so is held on its own account.
//!
//! Foreign keys are no dependency: in the applier's session none fires, on either side of one
//! the rows are as the primary has them, and the gate of the flip asks for an empty quarantine.

use std::collections::{HashMap, HashSet};

use xxhash_rust::xxh3::Xxh3;

use super::image;
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation};

/// More keys than this of one table are not kept one by one: the whole table is then held.
pub const KEYS_MAX: usize = 50_000;

/// Where the keys of a table stand in its images.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyPlaces {
    /// For each unique constraint on plain columns.
    pub uniques: Vec<Vec<usize>>,
}

/// The keys that a transaction touches in one table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    /// All of it: a TRUNCATE, or too many keys to keep.
    pub whole: bool,
    pub keys: HashSet<u128>,
}

impl Touched {
    fn add(&mut self, key: u128) {
        if !self.whole {
            self.keys.insert(key);
            if self.keys.len() > KEYS_MAX {
                self.take_whole();
            }
        }
    }

    fn take_whole(&mut self) {
        self.whole = true;
        self.keys = HashSet::new();
    }
}

/// A transaction of a round, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit<'a> {
    pub xid: u64,
    /// Its number among those of the round, in the order of places.
    pub order: usize,
    /// By position.
    pub changes: Vec<Change<'a>>,
}

impl<'a> Unit<'a> {
    /// Whether its place among the others matters beyond its keys.
    pub fn has_barrier(&self) -> bool {
        self.changes.iter().any(|change| change.operation.is_barrier())
    }

    /// The tables whose rows it changes or clears.
    pub fn rels(&self) -> HashSet<Oid> {
        self.changes
            .iter()
            .filter(|change| matches!(change.operation, Operation::Row | Operation::Truncate))
            .map(|change| change.rel)
            .collect()
    }

    /// What it touches of the tables for which `places` knows keys. What comes before a TRUNCATE
    /// of the same transaction is void, and touches nothing.
    pub fn touches(&self, places: impl Fn(Oid) -> Option<KeyPlaces>) -> HashMap<Oid, Touched> {
        let mut touched: HashMap<Oid, Touched> = HashMap::new();
        let mut known: HashMap<Oid, Option<KeyPlaces>> = HashMap::new();
        for change in &self.changes {
            let Some(places) = known.entry(change.rel).or_insert_with(|| places(change.rel)) else {
                continue;
            };
            match change.operation {
                Operation::Row => {
                    let table = touched.entry(change.rel).or_default();
                    for image in [change.old, change.new].into_iter().flatten() {
                        keys_of(image, places, |key| table.add(key));
                    }
                }
                Operation::Truncate => touched.entry(change.rel).or_default().take_whole(),
                Operation::Ddl | Operation::DdlOutside => {}
            }
        }
        touched
    }

    /// The tables that it clears.
    pub fn clears(&self) -> HashSet<Oid> {
        self.changes
            .iter()
            .filter(|change| change.operation == Operation::Truncate)
            .map(|change| change.rel)
            .collect()
    }
}

/// Every key of an image, hashed together with the columns that it is of: constraints may come and
/// go on the secondary while something is held.
fn keys_of(image: &[u8], places: &KeyPlaces, mut found: impl FnMut(u128)) {
    found(hash(&[], image));
    for positions in &places.uniques {
        // Null equals nothing.
        if let Some(key) = image::key(image, positions) {
            found(hash(positions, &key));
        }
    }
}

fn hash(columns: &[usize], bytes: &[u8]) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(&(columns.len() as u64).to_be_bytes());
    for column in columns {
        hasher.update(&(*column as u64).to_be_bytes());
    }
    hasher.update(bytes);
    hasher.digest128()
}

/// A round's changes by transaction, in the order of their places.
pub fn units<'a>(changes: &[Change<'a>]) -> Vec<Unit<'a>> {
    let mut by_xid: HashMap<u64, Unit<'a>> = HashMap::new();
    for change in changes {
        by_xid
            .entry(change.xid)
            .or_insert_with(|| Unit {
                xid: change.xid,
                order: 0,
                changes: Vec::new(),
            })
            .changes
            .push(*change);
    }
    let mut units: Vec<Unit<'a>> = by_xid.into_values().collect();
    for unit in &mut units {
        unit.changes.sort_by_key(|change| change.position);
    }
    units.sort_by_key(|unit| (unit.changes.last().map(|change| change.position), unit.xid));
    for (order, unit) in units.iter_mut().enumerate() {
        unit.order = order;
    }
    units
}

/// The keys of everything in quarantine. Entries have numbers in the order of their places.
#[derive(Debug, Clone, Default)]
pub struct HeldKeys {
    tables: HashMap<Oid, HeldTable>,
}

#[derive(Debug, Clone, Default)]
struct HeldTable {
    /// The first entry that holds all of the table.
    whole: Option<i64>,
    /// The first entry that holds the key.
    keys: HashMap<u128, i64>,
}

impl HeldKeys {
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Whether anything of this table is held.
    pub fn holds(&self, rel: Oid) -> bool {
        self.tables.contains_key(&rel)
    }

    /// The first entry, with a number below `before`, that shares a key with what is touched, in
    /// tables other than `freed`: those that the transaction itself empties or reshapes, which
    /// voids what is held of them.
    pub fn held_by(&self, touched: &HashMap<Oid, Touched>, freed: &HashSet<Oid>, before: i64) -> Option<i64> {
        let of_table = |(rel, touched): (&Oid, &Touched)| {
            let held = self.tables.get(rel).filter(|_| !freed.contains(rel))?;
            if touched.whole {
                return held.keys.values().copied().chain(held.whole).min();
            }
            let by_key = touched.keys.iter().filter_map(|key| held.keys.get(key).copied());
            by_key.chain(held.whole).min()
        };
        touched.iter().filter_map(of_table).min().filter(|&id| id < before)
    }

    pub fn add(&mut self, id: i64, touched: &HashMap<Oid, Touched>) {
        for (&rel, touched) in touched {
            if touched.whole {
                self.add_whole(id, rel);
            }
            for &key in &touched.keys {
                self.add_key(id, rel, key);
            }
        }
    }

    pub fn add_key(&mut self, id: i64, rel: Oid, key: u128) {
        let table = self.tables.entry(rel).or_default();
        let first = table.keys.entry(key).or_insert(id);
        *first = id.min(*first);
        if table.keys.len() > KEYS_MAX {
            let all = std::mem::take(&mut table.keys);
            table.whole = all.into_values().chain(table.whole).min();
        }
    }

    pub fn add_whole(&mut self, id: i64, rel: Oid) {
        let table = self.tables.entry(rel).or_default();
        table.whole = Some(table.whole.map_or(id, |first| first.min(id)));
    }

    /// The tables of which something is held.
    pub fn rels(&self) -> Vec<Oid> {
        self.tables.keys().copied().collect()
    }

    /// Nothing of this table is held any more.
    pub fn forget(&mut self, rel: Oid) {
        self.tables.remove(&rel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Short = (u64, u64, Oid, char, &'static str, &'static str);

    fn changes(short: &[Short]) -> Vec<Change<'static>> {
        let image = |text: &'static str| (!text.is_empty()).then_some(text.as_bytes());
        short
            .iter()
            .map(|&(position, xid, rel, kind, old, new)| Change {
                position,
                xid,
                rel,
                operation: if kind == 'T' {
                    Operation::Truncate
                } else {
                    Operation::Row
                },
                old: image(old),
                new: image(new),
            })
            .collect()
    }

    /// Table 7 has a key and a unique column, table 8 no key.
    fn places(rel: Oid) -> Option<KeyPlaces> {
        match rel {
            7 => Some(KeyPlaces {
                uniques: vec![vec![0], vec![1]],
            }),
            8 => Some(KeyPlaces::default()),
            _ => None,
        }
    }

    /// The transactions that are held once `refused` is, in order.
    fn held(short: &[Short], refused: u64) -> Vec<u64> {
        let changes = changes(short);
        let mut keys = HeldKeys::default();
        let mut held = Vec::new();
        for (at, unit) in units(&changes).iter().enumerate() {
            let touched = unit.touches(places);
            if unit.xid == refused || keys.held_by(&touched, &unit.clears(), i64::MAX).is_some() {
                held.push(unit.xid);
                keys.add(at as i64, &touched);
            } else {
                unit.clears().into_iter().for_each(|rel| keys.forget(rel));
            }
        }
        held
    }

    #[test]
    fn later_changes_of_the_same_key_follow_and_drag_their_transactions_along() {
        let short = [
            (1, 1, 7, 'I', "", "(1,a)"),
            (2, 2, 7, 'I', "", "(2,b)"),
            (3, 3, 7, 'U', "(1,a)", "(1,x)"),
            (4, 3, 7, 'I', "", "(3,c)"),
            (5, 4, 7, 'U', "(3,c)", "(3,d)"),
            (6, 5, 7, 'U', "(2,b)", "(2,y)"),
        ];
        assert_eq!(held(&short, 1), [1, 3, 4]);
        assert_eq!(held(&short, 3), [3, 4], "what came before stays applied");
        assert_eq!(held(&short, 5), [5]);
    }

    #[test]
    fn a_unique_value_is_a_key_too() {
        let short = [
            (1, 1, 7, 'D', "(1,a)", ""),
            (2, 2, 7, 'I', "", "(2,a)"),
            (3, 3, 7, 'I', "", "(3,c)"),
        ];
        assert_eq!(held(&short, 1), [1, 2]);
    }

    #[test]
    fn a_constraint_that_goes_meanwhile_frees_nothing() {
        let changes = changes(&[
            (1, 1, 7, 'U', "(1,a)", "(1,b)"),
            (2, 2, 7, 'U', "(1,b)", "(1,c)"),
            (3, 3, 7, 'I', "", "(2,b)"),
        ]);
        let units = units(&changes);
        let mut keys = HeldKeys::default();
        keys.add(1, &units[0].touches(places));
        for uniques in [vec![], vec![vec![0]], vec![vec![1]]] {
            let held = |unit: &Unit<'_>| {
                let touched = unit.touches(|_| {
                    Some(KeyPlaces {
                        uniques: uniques.clone(),
                    })
                });
                keys.held_by(&touched, &HashSet::new(), 9)
            };
            assert_eq!(held(&units[1]), Some(1), "{uniques:?}");
            assert_eq!(held(&units[2]).is_some(), uniques == [[1]], "{uniques:?}");
        }
    }

    #[test]
    fn nulls_share_nothing() {
        let short = [(1, 1, 7, 'I', "", "(1,)"), (2, 2, 7, 'I', "", "(2,)")];
        assert_eq!(held(&short, 1), [1]);
    }

    #[test]
    fn without_a_key_rows_alike_are_one_key() {
        let short = [
            (1, 1, 8, 'I', "", "(a)"),
            (2, 2, 8, 'I', "", "(b)"),
            (3, 3, 8, 'D', "(a)", ""),
        ];
        assert_eq!(held(&short, 1), [1, 3]);
    }

    #[test]
    fn an_order_by_place_and_not_by_beginning() {
        // Transaction 1 wrote first and touched the row last.
        let short = [
            (1, 1, 7, 'I', "", "(9,z)"),
            (2, 2, 7, 'I', "", "(1,a)"),
            (3, 1, 7, 'U', "(1,a)", "(1,b)"),
        ];
        assert_eq!(held(&short, 2), [2, 1]);
        assert_eq!(held(&short, 1), [1]);
    }

    #[test]
    fn a_truncate_frees_the_table_and_a_held_one_takes_it() {
        let short = [
            (1, 1, 7, 'I', "", "(1,a)"),
            (2, 2, 7, 'T', "", ""),
            (3, 3, 7, 'I', "", "(1,b)"),
            (4, 4, 8, 'I', "", "(b)"),
        ];
        assert_eq!(held(&short, 2), [2, 3]);
        assert_eq!(held(&short, 1), [1]);
    }

    #[test]
    fn too_many_keys_are_the_whole_table() {
        let images: Vec<String> = (0..=KEYS_MAX).map(|key| format!("({key},)")).collect();
        let unit = Unit {
            xid: 1,
            order: 0,
            changes: images
                .iter()
                .map(|image| Change {
                    position: 1,
                    xid: 1,
                    rel: 7,
                    operation: Operation::Row,
                    old: None,
                    new: Some(image.as_bytes()),
                })
                .collect(),
        };
        let touched = unit.touches(places);
        assert!(touched[&7].whole && touched[&7].keys.is_empty());
        let mut keys = HeldKeys::default();
        keys.add(1, &touched);
        let other = changes(&[(2, 2, 7, 'I', "", "(-1,)")]);
        assert_eq!(
            keys.held_by(&units(&other)[0].touches(places), &HashSet::new(), 2),
            Some(1)
        );
        // What is held later does not hold back what came before it.
        assert_eq!(
            keys.held_by(&units(&other)[0].touches(places), &HashSet::new(), 1),
            None
        );
    }
}
