//! Findings about definitions that differ beyond tables' columns: one for each kind.

use std::collections::BTreeMap;

use super::facts::Facts;
use super::finding::Finding;

/// Names listed of each kind.
const LISTED: usize = 3;

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    if facts.differences.is_empty() {
        return vec![Finding::fine("definitions", "both sides define the same")];
    }
    let side = facts.primary.other();
    if facts.has_no_table() {
        // All of it is different, which says nothing more.
        let mut found = Finding::warns(
            "definitions",
            format!("{side} has none of {} definitions yet", facts.differences.len()),
        )
        .on(side)
        .advice("`pgtandem schema copy` brings them");
        if !facts.script.statements.is_empty() {
            found.sql = facts.script.session();
        }
        return vec![found];
    }
    let mut kinds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for difference in &facts.differences {
        kinds.entry(&difference.kind).or_default().push(&difference.name);
    }
    let mut found: Vec<Finding> = kinds
        .into_iter()
        .map(|(kind, names)| {
            let more = match names.len() {
                count if count > LISTED => format!(" and {} more", count - LISTED),
                _ => String::new(),
            };
            let listed = names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
            Finding::warns("definitions", format!("{} not alike: {listed}{more}", names.len()))
                .on(side)
                .about(kind)
                .advice("`pgtandem schema diff` shows them")
        })
        .collect();
    // The statements belong together, in their order.
    if let Some(first) = found.first_mut()
        && !facts.script.statements.is_empty()
    {
        first.sql = facts.script.session();
    }
    for why in &facts.script.left {
        found.push(
            Finding::warns("definitions.left", format!("no statement can do this: {why}"))
                .on(side)
                .advice("change one of the sides by hand"),
        );
    }
    found
}
