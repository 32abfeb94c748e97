//! Which pair of databases a client's database name means, and which of the two answers. Pure:
//! names and [`Control`] in, [`Target`]s out.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::{DatabaseConfig, EVERY_OTHER_DATABASE, Target};
use crate::control::Control;

/// One database as clients know it: the name they connect to, and where it lives on each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    pub name: String,
    pub config: DatabaseConfig,
}

impl Pair {
    /// Where the client's statements go now.
    pub const fn primary(&self, control: Control) -> &Target {
        self.config.target(control.primary)
    }
}

/// Every database that clients may name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Databases {
    named: BTreeMap<String, Arc<Pair>>,
    every_other: Option<DatabaseConfig>,
}

impl Databases {
    pub fn new(entries: &BTreeMap<String, DatabaseConfig>) -> Self {
        let mut databases = Self::default();
        for (name, config) in entries {
            let config = config.clone();
            if name == EVERY_OTHER_DATABASE {
                databases.every_other = Some(config);
            } else {
                let pair = Pair {
                    name: name.clone(),
                    config,
                };
                databases.named.insert(name.clone(), Arc::new(pair));
            }
        }
        databases
    }

    /// The pair that `name` means, by its own entry or by `"*"`.
    pub fn find(&self, name: &str) -> Option<Arc<Pair>> {
        if let Some(pair) = self.named.get(name) {
            return Some(pair.clone());
        }
        let every_other = self.every_other.as_ref()?;
        Some(Arc::new(Pair {
            name: name.to_owned(),
            config: DatabaseConfig {
                legacy: every_other.legacy.with_dbname(name),
                new: every_other.new.with_dbname(name),
                transform: every_other.transform.clone(),
            },
        }))
    }

    /// The pair to ask about roles when a client names `name`. Roles belong to the servers and not
    /// to a database, so where there is no such database, another one will do.
    pub fn for_roles(&self, name: &str) -> Option<Arc<Pair>> {
        let every_other = || {
            let config = self.every_other.clone()?;
            let name = EVERY_OTHER_DATABASE.to_owned();
            Some(Arc::new(Pair { name, config }))
        };
        let named = self.named.get(name).cloned();
        named
            .or_else(every_other)
            .or_else(|| self.named.values().next().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Epoch, Phase, Side};

    fn config(name: &str) -> DatabaseConfig {
        let target = |side: Side| Target::parse(side, &format!("postgresql://own@{side}/{name}")).unwrap();
        DatabaseConfig {
            legacy: target(Side::Legacy),
            new: target(Side::New),
            transform: Arc::default(),
        }
    }

    #[test]
    fn names_and_the_star() {
        let entries = [("shop", config("old_shop")), ("*", config(""))];
        let databases = Databases::new(&entries.map(|(name, config)| (name.to_owned(), config)).into());
        let control = |primary| Control {
            phase: Phase::DualWrite,
            primary,
            epoch: Epoch::FIRST,
        };
        for (name, primary, host, dbname) in [
            ("shop", Side::Legacy, "legacy", "old_shop"),
            ("shop", Side::New, "new", "old_shop"),
            ("other", Side::New, "new", "other"),
        ] {
            let pair = databases.find(name).unwrap();
            let target = pair.primary(control(primary));
            assert_eq!((target.host.as_str(), target.dbname()), (host, dbname), "{name}");
        }
        assert_eq!(Databases::default().find("shop"), None);
        let roles = |name| databases.for_roles(name).unwrap().config.legacy.dbname().to_owned();
        assert_eq!((roles("shop"), roles("other")), ("old_shop".into(), "postgres".into()));
    }
}
