//! Ignores of shadow reads that are over.

use time::OffsetDateTime;

use super::finding::Finding;
use crate::config::Ignore;

/// A finding for each ignore whose last day is over.
pub(super) fn findings(ignores: &[Ignore], now: OffsetDateTime) -> Vec<Finding> {
    let expired = ignores.iter().filter(|ignore| ignore.expired(now));
    expired
        .map(|ignore| {
            let fact = format!(
                "an ignore of shadow reads expired on {}: {} ({}, {})",
                ignore.expires,
                ignore.covers(),
                ignore.owner,
                ignore.reason
            );
            Finding::blocks("reads.ignore_expired", fact)
                .about(ignore.covers())
                .advice("what it covered is compared again; remove it from reads.ignores, or give it a new date")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use time::macros::{date, datetime};

    use super::*;
    use crate::check::Level;
    use crate::config::Which;

    #[test]
    fn only_what_is_over() {
        let ignore = |expires| Ignore {
            which: Which::default(),
            column: Some("etag".into()),
            owner: "ann".into(),
            reason: "made anew".into(),
            expires,
        };
        let ignores = [ignore(date!(2026 - 01 - 31)), ignore(date!(2026 - 02 - 01))];
        let found = findings(&ignores, datetime!(2026-02-01 12:00 UTC));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id, found[0].level), ("reads.ignore_expired", Level::Blocks));
        assert!(
            found[0].fact.contains("column etag (ann, made anew)"),
            "{}",
            found[0].fact
        );
    }
}
