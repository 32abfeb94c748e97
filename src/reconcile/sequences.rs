//! Sequences. They belong to no snapshot, so no cut shows them; but the primary's value now is
//! between two readings of it, and the applier copies it in between. So the secondary's value must
//! lie between the two.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::VerifyError;
use super::report::SequenceReport;
use crate::apply::Applier;
use crate::catalog::quote::qualified;
use crate::transform::sequences::renamed;

/// Somebody may set a sequence back between the readings: then once more.
const ATTEMPTS: usize = 3;
const AT_ONCE: usize = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    last: i64,
    called: bool,
    ascending: bool,
}

impl Value {
    /// Greater: further along.
    const fn place(self) -> (i64, bool) {
        let along = if self.ascending {
            self.last
        } else {
            self.last.saturating_neg()
        };
        (along, self.called)
    }
}

type Values = BTreeMap<(String, String), Value>;

/// Compares every sequence of the primary.
pub(super) async fn compare(
    applier: &Applier,
    primary: &Client,
    secondary: &Client,
) -> Result<Vec<SequenceReport>, VerifyError> {
    let _nobody_draws = applier.compare_sequences();
    let mut reports = Vec::new();
    let renamed = renamed(primary, secondary).await?;
    for _ in 0..ATTEMPTS {
        let before = read(primary).await?;
        applier.catch_up().await?;
        let mut copied = read(secondary).await?;
        // By the primary's names.
        for (here, there) in &renamed {
            if let Some(value) = copied.get(there).copied() {
                copied.insert(here.clone(), value);
            }
        }
        let after = read(primary).await?;
        reports = judge(&before, &copied, &after);
        if reports.iter().all(|report| report.equal) {
            break;
        }
    }
    Ok(reports)
}

/// Pure. What was created or dropped in between is left for the next time.
fn judge(before: &Values, copied: &Values, after: &Values) -> Vec<SequenceReport> {
    let both = before
        .iter()
        .filter_map(|(name, before)| Some((name, before, after.get(name)?)));
    both.map(|(name, before, after)| {
        let copy = copied.get(name);
        let place = copy.map(|copy| copy.place());
        let behind = place.is_none_or(|place| place < before.place());
        SequenceReport {
            schema: name.0.clone(),
            name: name.1.clone(),
            equal: !behind && place.is_some_and(|place| place <= after.place()),
            behind,
            primary: Some((after.last, after.called)),
            secondary: copy.map(|copy| (copy.last, copy.called)),
        }
    })
    .collect()
}

async fn read(client: &Client) -> Result<Values, tokio_postgres::Error> {
    let listed = client
        .query(
            "SELECT n.nspname::text, c.relname::text, s.seqincrement > 0
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid
              WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pgtandem', 'information_schema')
                AND n.nspname NOT LIKE 'pg\\_%'",
            &[],
        )
        .await?;
    let mut values = Values::new();
    for rows in listed.chunks(AT_ONCE) {
        let arms: Vec<String> = rows
            .iter()
            .enumerate()
            .map(|(at, row)| {
                format!(
                    "SELECT {at}, last_value, is_called FROM {}",
                    qualified(row.get(0), row.get(1))
                )
            })
            .collect();
        for value in client.query(&arms.join(" UNION ALL "), &[]).await? {
            let row = &rows[value.get::<_, i32>(0) as usize];
            let value = Value {
                last: value.get(1),
                called: value.get(2),
                ascending: row.get(2),
            };
            values.insert((row.get(0), row.get(1)), value);
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_readings() {
        let value = |last, called, ascending| Value {
            last,
            called,
            ascending,
        };
        let one = |value: Value| Values::from([(("s".to_owned(), "q".to_owned()), value)]);
        for (before, copied, after, equal, behind) in [
            (5, 5, 5, true, false),
            (5, 6, 7, true, false),
            (5, 4, 7, false, true),
            (5, 8, 7, false, false),
        ] {
            let up = |last| one(value(last, true, true));
            let found = judge(&up(before), &up(copied), &up(after));
            assert_eq!(
                (found[0].equal, found[0].behind),
                (equal, behind),
                "{before} {copied} {after}"
            );
            let down = |last: i64| one(value(-last, true, false));
            let found = judge(&down(before), &down(copied), &down(after));
            assert_eq!((found[0].equal, found[0].behind), (equal, behind), "descending");
        }
        // Not given out yet is before given out.
        let (fresh, used) = (one(value(1, false, true)), one(value(1, true, true)));
        assert!(judge(&used, &fresh, &used)[0].behind);
        assert!(!judge(&fresh, &used, &fresh)[0].equal);
        assert!(
            judge(&fresh, &Values::new(), &fresh)[0].behind,
            "the secondary has none"
        );
    }
}
