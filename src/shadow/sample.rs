//! Which reads are in the sample: by the rules of proxy.yaml, and deterministically by a key, so
//! that the same read, user or tenant is always in it or never.

use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::fingerprints::Entry;
use super::read::BindValues;
use crate::config::{Canary, Reads, SampleKey, ShadowRule, Which};

/// A read that may be in the sample.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// As clients name it.
    pub database: &'a str,
    pub user: &'a str,
    /// Looked at only where a rule or key asks for it.
    pub application: &'a Mutex<String>,
    pub text: &'a [u8],
    /// A Bind's body behind its two names; empty for a simple query.
    pub values: &'a [u8],
}

/// `reads.shadow_percent` and its rules, or the canary's.
pub(super) struct Sample {
    rules: Vec<Rule>,
    overall: Share,
}

struct Rule {
    which: Which,
    user: Option<String>,
    application: Option<String>,
    share: Share,
}

#[derive(Clone, Copy)]
struct Share {
    /// Keys of at most this are in; 0 for none.
    threshold: u64,
    key: SampleKey,
}

impl Sample {
    pub(super) fn new(reads: &Reads) -> Self {
        Self::by(reads.shadow_percent, reads.shadow_key, &reads.shadow_rules)
    }

    pub(super) fn of_canary(canary: &Canary) -> Self {
        Self::by(canary.percent, canary.key, &canary.rules)
    }

    pub(super) fn by(percent: f64, key: SampleKey, rules: &[ShadowRule]) -> Self {
        let rules = rules.iter().map(|rule| Rule {
            which: rule.which.clone(),
            user: rule.user.clone(),
            application: rule.application_name.clone(),
            share: Share {
                threshold: threshold(rule.percent),
                key: rule.key,
            },
        });
        Self {
            rules: rules.collect(),
            overall: Share {
                threshold: threshold(percent),
                key,
            },
        }
    }

    /// Nothing is ever in it.
    pub(super) fn is_off(&self) -> bool {
        self.overall.threshold == 0 && self.rules.iter().all(|rule| rule.share.threshold == 0)
    }

    /// Whether a read of this statement is in it.
    pub(super) fn holds(&self, statement: &Entry, asked: &Asked<'_>) -> bool {
        self.holds_what(|which| statement.is_meant(which), asked)
    }

    /// The same of a statement of which it is said what rules of proxy.yaml mean it.
    pub(super) fn holds_what(&self, is_meant: impl Fn(&Which) -> bool, asked: &Asked<'_>) -> bool {
        let rule = self.rules.iter().find(|rule| rule.fits(&is_meant, asked));
        rule.map_or(self.overall, |rule| rule.share).holds(asked)
    }

    /// Whether a transaction is in it that says only that it reads. Rules about statements do not
    /// fit it, and a key of the statement's is `drawn` for it.
    pub(super) fn holds_transaction(&self, asked: &Asked<'_>, drawn: u64) -> bool {
        let rule = self.rules.iter().find(|rule| rule.fits_any_statement(asked));
        let share = rule.map_or(self.overall, |rule| rule.share);
        match share.key {
            SampleKey::User | SampleKey::ApplicationName => share.holds(asked),
            SampleKey::Statement | SampleKey::Parameter(_) => {
                share.threshold != 0 && xxh3_64(&drawn.to_be_bytes()) <= share.threshold
            }
        }
    }
}

impl Rule {
    fn fits(&self, is_meant: impl Fn(&Which) -> bool, asked: &Asked<'_>) -> bool {
        is_meant(&self.which) && self.fits_session(asked)
    }

    fn fits_any_statement(&self, asked: &Asked<'_>) -> bool {
        self.which == Which::default() && self.fits_session(asked)
    }

    fn fits_session(&self, asked: &Asked<'_>) -> bool {
        self.user.as_deref().is_none_or(|user| user == asked.user)
            && self
                .application
                .as_deref()
                .is_none_or(|application| with_application(asked, |name| name == application))
    }
}

impl Share {
    fn holds(&self, asked: &Asked<'_>) -> bool {
        self.threshold != 0 && self.key(asked) <= self.threshold
    }

    fn key(&self, asked: &Asked<'_>) -> u64 {
        match self.key {
            SampleKey::Statement => statement_key(asked.text, asked.values),
            SampleKey::User => xxh3_64(asked.user.as_bytes()),
            SampleKey::ApplicationName => with_application(asked, |name| xxh3_64(name.as_bytes())),
            SampleKey::Parameter(number) => BindValues::read(asked.values)
                .and_then(|values| values.parameter(number))
                .map_or_else(|| statement_key(asked.text, asked.values), xxh3_64),
        }
    }
}

fn with_application<T>(asked: &Asked<'_>, look: impl FnOnce(&str) -> T) -> T {
    look(&asked.application.lock().unwrap_or_else(PoisonError::into_inner))
}

fn statement_key(text: &[u8], values: &[u8]) -> u64 {
    if values.is_empty() {
        xxh3_64(text)
    } else {
        xxh3_64_with_seed(values, xxh3_64(text))
    }
}

/// The part of all 64-bit keys that `percent` stands for.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates as wanted"
)]
fn threshold(percent: f64) -> u64 {
    if percent >= 100.0 {
        u64::MAX
    } else {
        (percent.max(0.0) / 100.0 * 2_f64.powi(64)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::fingerprints::Fingerprints;
    use super::*;

    struct Samples {
        sample: Sample,
        fingerprints: Fingerprints,
    }

    impl Samples {
        fn new(reads: &Reads) -> Self {
            Self {
                sample: Sample::new(reads),
                fingerprints: Fingerprints::default(),
            }
        }

        fn holds(&self, text: &str, values: &[u8], user: &str, application: &str) -> bool {
            let entry = self.fingerprints.of_text(text.as_bytes()).unwrap();
            let asked = Asked {
                database: "shop",
                user,
                application: &Mutex::new(application.to_owned()),
                text: text.as_bytes(),
                values,
            };
            self.sample.holds(&entry, &asked)
        }

        fn share(&self, one: impl Fn(&Self, u32) -> bool) -> f64 {
            let inside = (0..20_000).filter(|&number| one(self, number)).count();
            f64::from(u32::try_from(inside).unwrap()) / 200.0
        }
    }

    fn bind(values: &[&[u8]]) -> Vec<u8> {
        let mut bind = vec![0, 0];
        bind.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
        for value in values {
            bind.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            bind.extend_from_slice(value);
        }
        bind.extend_from_slice(&[0, 0]);
        bind
    }

    #[test]
    fn a_share_of_the_keys() {
        assert_eq!((threshold(0.0), threshold(-1.0), threshold(100.0)), (0, 0, u64::MAX));
        for percent in [0.5, 10.0, 50.0, 99.0] {
            let samples = Samples::new(&Reads {
                shadow_percent: percent,
                ..Reads::default()
            });
            let share =
                samples.share(|samples, number| samples.holds("select $1", &bind(&[&number.to_be_bytes()]), "app", ""));
            assert!((share - percent).abs() < 1.5, "{percent}: {share}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rule = |table: Option<&str>, user: Option<&str>, application: Option<&str>, percent| ShadowRule {
            which: Which {
                table: table.map(str::to_owned),
                fingerprint: None,
            },
            user: user.map(str::to_owned),
            application_name: application.map(str::to_owned),
            percent,
            key: SampleKey::Statement,
        };
        let by_fingerprint = ShadowRule {
            which: Which {
                fingerprint: Some(crate::sql::fingerprint(b"select 7").id),
                table: None,
            },
            ..rule(None, None, None, 100.0)
        };
        let samples = Samples::new(&Reads {
            shadow_percent: 0.0,
            shadow_rules: vec![
                rule(Some("orders"), Some("batch"), None, 0.0),
                rule(Some("orders"), None, None, 100.0),
                rule(None, None, Some("nightly"), 100.0),
                by_fingerprint,
            ],
            ..Reads::default()
        });
        assert!(!samples.sample.is_off());
        for (text, user, application, expected) in [
            ("select * from orders", "app", "", true),
            ("select * from public.orders where a = 1", "app", "", true),
            ("select * from orders", "batch", "nightly", false),
            ("select * from items", "batch", "nightly", true),
            ("select * from items", "app", "", false),
            ("select 9", "app", "", true),
        ] {
            assert_eq!(
                samples.holds(text, &[], user, application),
                expected,
                "{text} {user} {application}"
            );
        }
        assert!(
            Samples::new(&Reads {
                shadow_percent: 0.0,
                ..Reads::default()
            })
            .sample
            .is_off()
        );
    }

    #[test]
    fn transactions_are_drawn_or_go_by_who_begins_them() {
        let application = Mutex::new("nightly".to_owned());
        let asked = Asked {
            database: "shop",
            user: "app",
            application: &application,
            text: b"begin read only",
            values: &[],
        };
        let sample = |canary: &Canary| Sample::of_canary(canary);
        let half = sample(&Canary {
            percent: 50.0,
            ..Canary::default()
        });
        let inside = (0..2000).filter(|&drawn| half.holds_transaction(&asked, drawn)).count();
        assert!((900..1100).contains(&inside), "{inside}");
        let rule = |which: Which, application: Option<&str>, percent| ShadowRule {
            which,
            user: None,
            application_name: application.map(str::to_owned),
            percent,
            key: SampleKey::ApplicationName,
        };
        let orders = Which {
            table: Some("orders".into()),
            fingerprint: None,
        };
        for (rules, expected) in [
            (vec![rule(orders, None, 100.0)], false),
            (vec![rule(Which::default(), Some("nightly"), 100.0)], true),
            (vec![rule(Which::default(), Some("daily"), 100.0)], false),
        ] {
            let sample = sample(&Canary {
                rules,
                ..Canary::default()
            });
            assert_eq!(sample.holds_transaction(&asked, 7), expected);
        }
    }

    #[test]
    fn one_tenant_is_followed_through_all_its_statements() {
        let samples = Samples::new(&Reads {
            shadow_percent: 20.0,
            shadow_key: SampleKey::Parameter(1),
            ..Reads::default()
        });
        let one = |number: u32| bind(&[&number.to_be_bytes(), b"x"]);
        let other = |number: u32| bind(&[&number.to_be_bytes()]);
        let mut inside = 0;
        for number in 0..1000 {
            let first = samples.holds("select * from a where t = $1 and b = $2", &one(number), "app", "");
            assert_eq!(
                first,
                samples.holds("select * from c where t = $1", &other(number), "app", "")
            );
            inside += u32::from(first);
        }
        assert!((150..250).contains(&inside), "{inside}");
    }
}
