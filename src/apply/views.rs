//! Materialized views that are refreshed on both sides and need not become equal.
//!
//! Their rows cannot be copied as those of tables are: Postgres lets nobody write a materialized
//! view, and fills it by its own query only. So the secondary runs the query again, at the
//! statement's place among the changes, on equal tables. Where its answer depends on more than
//! those tables, the rows may differ, and that is told.

use tokio_postgres::Client;

use super::status::NotMirrored;
use super::{ApplyError, doing};
use crate::sql::{self, FUNCTIONS_QUERY, FunctionVolatility, NotComparable, RELATIONS_QUERY, Script, Unstable};

const VIEWS: &str = "
    SELECT pgtandem.name_of(c.oid), pg_get_viewdef(c.oid)
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind = 'm' AND n.nspname <> 'pgtandem'
     ORDER BY 1";

/// The primary's materialized views whose query may answer otherwise on the secondary.
pub(super) async fn unrepeatable(primary: &Client) -> Result<Vec<NotMirrored>, ApplyError> {
    let views = primary
        .query(VIEWS, &[])
        .await
        .map_err(doing("list materialized views"))?;
    if views.is_empty() {
        return Ok(Vec::new());
    }
    let known = functions_and_relations(primary)
        .await
        .map_err(doing("read the volatility of functions"))?;
    let told = views.iter().filter_map(|row| {
        let (name, query): (String, String) = (row.get(0), row.get(1));
        let reason = why_unrepeatable(query.trim_end().trim_end_matches(';'), &known)?;
        Some(NotMirrored {
            what: format!("materialized view {name}"),
            reason: format!("its rows may differ there, where its query runs once more: {reason}"),
        })
    });
    Ok(told.collect())
}

async fn functions_and_relations(primary: &Client) -> Result<FunctionVolatility, tokio_postgres::Error> {
    let mut known = FunctionVolatility::default();
    for row in primary.query(FUNCTIONS_QUERY, &[]).await? {
        known.add_function(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    }
    for row in primary.query(RELATIONS_QUERY, &[]).await? {
        known.add_relation(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    }
    Ok(known)
}

fn why_unrepeatable(query: &str, known: &FunctionVolatility) -> Option<&'static str> {
    let script: Script = sql::analyze(query.as_bytes());
    let facts = match sql::single_read(&script) {
        Ok(facts) => facts,
        Err(reason) => return Some(reason.explanation()),
    };
    if let Err(reason) = sql::shadowable(facts, known) {
        return Some(reason.explanation());
    }
    let reason = match facts.unstable {
        Some(Unstable::OrderDependentFunction) => NotComparable::OrderDependentFunction,
        Some(Unstable::DistinctOnWithoutOrder) => NotComparable::DistinctOn,
        Some(Unstable::Sample) => NotComparable::Sample,
        Some(Unstable::LimitWithoutOrder) => NotComparable::LimitWithoutOrder,
        None if facts.limited && !facts.ordered => NotComparable::LimitWithoutOrder,
        None => return None,
    };
    Some(reason.explanation())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_depends_on_more_than_tables_is_told() {
        let mut known = FunctionVolatility::default();
        for (name, volatility) in [
            ("random", "v"),
            ("now", "s"),
            ("lower", "i"),
            ("count", "i"),
            ("array_agg", "i"),
        ] {
            known.add_function("pg_catalog".into(), name.into(), volatility);
        }
        known.add_relation("public".into(), "t".into(), None);
        known.add_relation(
            "public".into(),
            "v".into(),
            Some(" SELECT random() AS r FROM public.t;"),
        );
        for (query, told) in [
            ("SELECT lower(a), count(*) FROM public.t GROUP BY 1", None),
            ("SELECT random() FROM public.t", Some("volatile")),
            ("SELECT r FROM public.v", Some("volatile")),
            ("SELECT now() FROM public.t", Some("clock")),
            ("SELECT CURRENT_DATE FROM public.t", Some("clock")),
            ("SELECT a FROM public.t LIMIT 3", Some("order")),
            ("SELECT array_agg(a) FROM public.t", Some("order")),
            ("SELECT a FROM public.t ORDER BY a LIMIT 3", None),
        ] {
            let reason = why_unrepeatable(query, &known);
            match told {
                None => assert_eq!(reason, None, "{query}"),
                Some(word) => assert!(
                    reason.is_some_and(|reason| reason.to_lowercase().contains(word)),
                    "{query}: {reason:?}"
                ),
            }
        }
    }
}
