//! proxy.yaml's rules about answers, and which of them are about one read.

use time::OffsetDateTime;

use super::stats::IgnoreReport;
use crate::config::{ColumnRule, How, Ignore, Reads, Which};
use crate::sql::{FingerprintId, ReadFacts};

/// All rules.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    notices: bool,
    columns: Vec<ColumnRule>,
    ignores: Vec<Ignore>,
}

/// Those about one read.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadRules {
    pub(super) notices: bool,
    /// An ignore covers the whole read.
    pub(super) ignored: bool,
    columns: Vec<(String, ColumnPlan)>,
}

/// What is done with the values of one column.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct ColumnPlan {
    pub(super) ignored: bool,
    pub(super) how: Option<How>,
}

impl Rules {
    pub(super) fn new(reads: &Reads) -> Self {
        Self {
            notices: reads.compare_notices,
            columns: reads.columns.clone(),
            ignores: reads.ignores.clone(),
        }
    }

    pub(super) fn about(&self, fingerprint: FingerprintId, facts: &ReadFacts) -> ReadRules {
        let mut about = ReadRules {
            notices: self.notices,
            ..ReadRules::default()
        };
        for rule in &self.columns {
            if rule.which.holds(fingerprint, facts) {
                about.column(&rule.column).how.get_or_insert(rule.how);
            }
        }
        let now = OffsetDateTime::now_utc();
        for ignore in &self.ignores {
            if ignore.which.holds(fingerprint, facts) && !ignore.expired(now) {
                match &ignore.column {
                    Some(column) => about.column(column).ignored = true,
                    None => about.ignored = true,
                }
            }
        }
        about
    }

    /// The ignores, for the report.
    pub(super) fn ignores(&self) -> Vec<IgnoreReport> {
        let now = OffsetDateTime::now_utc();
        self.ignores
            .iter()
            .map(|ignore| IgnoreReport {
                fingerprint: ignore.which.fingerprint.map(|id| id.to_string()),
                table: ignore.which.table.clone(),
                column: ignore.column.clone(),
                owner: ignore.owner.clone(),
                reason: ignore.reason.clone(),
                expires: ignore.expires.to_string(),
                expired: ignore.expired(now),
                withdrawn: false,
            })
            .collect()
    }
}

impl Which {
    /// Whether a read is meant.
    pub(super) fn holds(&self, fingerprint: FingerprintId, facts: &ReadFacts) -> bool {
        self.fingerprint.is_none_or(|wanted| wanted == fingerprint)
            && self.table.as_deref().is_none_or(|wanted| names(facts, wanted))
    }
}

/// Whether a statement names a table. A name without a schema, on either side, stands for any.
fn names(facts: &ReadFacts, table: &str) -> bool {
    let (schema, name) = match table.split_once('.') {
        Some((schema, name)) => (Some(schema), name),
        None => (None, table),
    };
    facts.relations.iter().any(|relation| {
        let same_schema = match (schema, relation.name.schema.as_deref()) {
            (Some(wanted), Some(written)) => wanted == written,
            _ => true,
        };
        relation.name.name == name && same_schema
    })
}

impl ReadRules {
    fn column(&mut self, name: &str) -> &mut ColumnPlan {
        let at = self.columns.iter().position(|(known, _)| known == name);
        let at = at.unwrap_or_else(|| {
            self.columns.push((name.to_owned(), ColumnPlan::default()));
            self.columns.len() - 1
        });
        &mut self.columns[at].1
    }

    /// What is done with a column of this name.
    pub(super) fn of_column(&self, name: &[u8]) -> ColumnPlan {
        let found = self.columns.iter().find(|(known, _)| known.as_bytes() == name);
        found.map(|(_, plan)| *plan).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use time::macros::date;

    use super::*;

    #[test]
    fn rules_about_a_read() {
        let which = |table: &str| Which {
            table: Some(table.to_owned()),
            fingerprint: None,
        };
        let ignore = |column: Option<&str>, table: &str, expires| Ignore {
            which: which(table),
            column: column.map(str::to_owned),
            owner: "ann".into(),
            reason: "known".into(),
            expires,
        };
        let rules = Rules::new(&Reads {
            columns: vec![ColumnRule {
                column: "total".into(),
                which: which("public.orders"),
                how: How::FloatTolerance(0.1),
            }],
            ignores: vec![
                ignore(Some("seen"), "orders", date!(9999 - 01 - 01)),
                ignore(Some("old"), "orders", date!(2020 - 01 - 01)),
                ignore(None, "scratch", date!(9999 - 01 - 01)),
            ],
            ..Reads::default()
        });
        let about = |sql: &str| {
            let script = crate::sql::analyze(sql.as_bytes());
            rules.about(FingerprintId(1), crate::sql::single_read(&script).unwrap())
        };
        let orders = about("select * from orders");
        assert_eq!(orders.of_column(b"total").how, Some(How::FloatTolerance(0.1)));
        assert!(orders.of_column(b"seen").ignored && !orders.of_column(b"old").ignored);
        assert!(!orders.ignored && about("select * from scratch").ignored);
        let other = about("select * from other.orders");
        assert_eq!(other.of_column(b"total"), ColumnPlan::default());
        assert_eq!(rules.ignores().iter().filter(|ignore| ignore.expired).count(), 1);
    }
}
