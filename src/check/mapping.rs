//! Findings about `transform:` of proxy.yaml.

use super::facts::Facts;
use super::finding::Finding;
use crate::transform::Fault;

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    if facts.transform.is_empty() {
        return Vec::new();
    }
    let finding = |id, fault: &Fault| {
        Finding::blocks(id, &fault.fact)
            .on(fault.side)
            .about(&fault.subject)
            .advice(&fault.advice)
    };
    let mapping = &facts.mapping;
    let faults = mapping.faults.iter().map(|fault| finding("transform", fault));
    // Without these there is no flip; until then everything is mirrored.
    let one_way = mapping.one_way.iter().map(|fault| finding("transform.inverse", fault));
    let mut found: Vec<Finding> = faults.chain(one_way).collect();
    if mapping.faults.is_empty() {
        let back: usize = mapping.reverse.iter().map(|face| face.sources().len()).sum();
        found.push(Finding::fine(
            "transform",
            format!(
                "{} tables are mirrored in another shape, {} of them also back",
                mapping.forward.len(),
                back
            ),
        ));
    }
    found
}
