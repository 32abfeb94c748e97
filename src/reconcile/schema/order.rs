//! The order in which objects can be made: each after what it rests on.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::objects::{Key, Objects};

/// Where kinds come of which neither rests on the other.
const RANKS: [&str; 17] = [
    "schema",
    "extension",
    "type",
    "sequence",
    "function",
    "aggregate",
    "table",
    "column",
    "default",
    "constraint",
    "index",
    "view",
    "statistics",
    "rule",
    "trigger",
    "policy",
    "grant",
];

/// The keys, each after those among them that it depends on in `objects`; a circle is broken at
/// the lowest rank. A foreign key comes after the keys it may refer to.
pub(super) fn sorted<'a>(keys: &BTreeSet<&'a Key>, objects: &'a Objects) -> Vec<&'a Key> {
    let mut waits: BTreeMap<&'a Key, BTreeSet<&'a Key>> =
        keys.iter().map(|key| (*key, needs(key, keys, objects))).collect();
    let mut sorted = Vec::with_capacity(keys.len());
    let place = |key: &Key| {
        let rank = RANKS.iter().position(|kind| *kind == key.0).unwrap_or(RANKS.len());
        let refers = objects
            .by_key
            .get(key)
            .and_then(|object| object.recipe["form"].as_str())
            .is_some_and(|form| form == "f");
        (
            rank,
            refers,
            objects.by_key.get(key).and_then(|object| object.recipe["at"].as_i64()),
        )
    };
    while !waits.is_empty() {
        let free = waits.iter().filter(|(_, needs)| needs.is_empty()).map(|(key, _)| *key);
        let next = free
            .min_by_key(|key| (place(key), *key))
            .or_else(|| waits.keys().copied().min_by_key(|key| (place(key), *key)));
        let Some(next) = next else { break };
        waits.remove(next);
        for needs in waits.values_mut() {
            needs.remove(next);
        }
        sorted.push(next);
    }
    sorted
}

fn needs<'a>(key: &'a Key, keys: &BTreeSet<&'a Key>, objects: &'a Objects) -> BTreeSet<&'a Key> {
    let Some(object) = objects.by_key.get(key) else {
        return BTreeSet::new();
    };
    let mut needs: Vec<&Key> = object.depends.iter().collect();
    let table = ("table".to_owned(), object.root.clone());
    if key.0 == "table" {
        // Its statement has its columns; of what their defaults need, sequences go when it goes.
        let parts = objects
            .by_key
            .iter()
            .filter(|(part, of)| part.0 == "column" && of.root == key.1);
        needs.extend(parts.flat_map(|(_, column)| &column.depends));
    } else if key.0 == "column" {
        let default = objects.get("default", &key.1);
        needs.extend(default.into_iter().flat_map(|default| &default.depends));
    }
    let mut needs: BTreeSet<&'a Key> = needs.into_iter().filter_map(|need| keys.get(need).copied()).collect();
    if key.0 != "table"
        && let Some(table) = keys.get(&table)
    {
        needs.insert(table);
    }
    needs.remove(key);
    needs
}
