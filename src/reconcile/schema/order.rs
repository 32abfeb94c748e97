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
    let mut waited_for: BTreeMap<&'a Key, Vec<&'a Key>> = BTreeMap::new();
    for (key, needs) in &waits {
        for need in needs {
            waited_for.entry(need).or_default().push(key);
        }
    }
    let placed = |key: &'a Key| (place(key, objects), key);
    let mut free: BTreeSet<_> = waits
        .iter()
        .filter(|(_, needs)| needs.is_empty())
        .map(|(key, _)| placed(key))
        .collect();
    let mut sorted = Vec::with_capacity(keys.len());
    while !waits.is_empty() {
        let next = free.pop_first().or_else(|| waits.keys().map(|key| placed(key)).min());
        let Some((_, next)) = next else { break };
        if waits.remove(next).is_none() {
            continue;
        }
        sorted.push(next);
        for key in waited_for.remove(next).unwrap_or_default() {
            if let Some(needs) = waits.get_mut(key) {
                needs.remove(next);
                if needs.is_empty() {
                    free.insert(placed(key));
                }
            }
        }
    }
    sorted
}

/// Where a key comes among those that may come now.
fn place(key: &Key, objects: &Objects) -> (usize, bool, Option<i64>) {
    let rank = RANKS.iter().position(|kind| *kind == key.0).unwrap_or(RANKS.len());
    let recipe = objects.by_key.get(key).map(|object| &object.recipe);
    let refers = recipe.is_some_and(|recipe| recipe["form"] == "f");
    (rank, refers, recipe.and_then(|recipe| recipe["at"].as_i64()))
}

fn needs<'a>(key: &'a Key, keys: &BTreeSet<&'a Key>, objects: &'a Objects) -> BTreeSet<&'a Key> {
    let Some(object) = objects.by_key.get(key) else {
        return BTreeSet::new();
    };
    let mut needs: Vec<&Key> = object.depends.iter().collect();
    let table = ("table".to_owned(), object.root.clone());
    if key.0 == "table" {
        // Its statement has its columns; of what their defaults need, sequences go when it goes.
        needs.extend(objects.columns_of(&key.1).flat_map(|column| &column.depends));
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
