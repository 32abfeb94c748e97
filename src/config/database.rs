//! One entry of `databases:` in proxy.yaml.

use std::sync::Arc;

use serde::Deserialize;
use serde::de::Deserializer;

use super::transform::RawTransform;
use super::value::parsed;
use super::{Target, Transform};
use crate::control::Side;

/// The name of the entry that stands for every database not named.
pub const EVERY_OTHER_DATABASE: &str = "*";

/// One entry of `databases:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseConfig {
    pub legacy: Target,
    pub new: Target,
    /// How legacy's rows look on new.
    pub transform: Arc<Transform>,
}

impl DatabaseConfig {
    pub const fn target(&self, side: Side) -> &Target {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDatabase {
    legacy: Url,
    new: Url,
    #[serde(default)]
    transform: RawTransform,
}

impl RawDatabase {
    pub(super) fn check(self, name: &str) -> Result<DatabaseConfig, String> {
        let target = |side: Side, url: &Url| {
            let target = Target::parse(side, &url.0).map_err(|error| format!("databases: {name}: {side}: {error}"))?;
            match (name, &target.dbname) {
                (EVERY_OTHER_DATABASE, Some(_)) => Err(format!(
                    "databases: \"*\": {side}: names a database; the entry \"*\" stands for every other one, so its connection strings end after the port"
                )),
                (EVERY_OTHER_DATABASE, None) | (_, Some(_)) => Ok(target),
                (_, None) => Err(format!("databases: {name}: {side}: names no database (…:5432/NAME)")),
            }
        };
        let (legacy, new) = (target(Side::Legacy, &self.legacy)?, target(Side::New, &self.new)?);
        if (&legacy.host, legacy.port, legacy.dbname()) == (&new.host, new.port, new.dbname()) {
            return Err(format!("databases: {name}: legacy and new are the same database"));
        }
        let transform = self.transform.check();
        let transform = transform.map_err(|error| format!("databases: {name}: transform: {error}"))?;
        if name == EVERY_OTHER_DATABASE && !transform.is_empty() {
            return Err("databases: \"*\": transform: belongs to a database with a name".into());
        }
        Ok(DatabaseConfig {
            legacy,
            new,
            transform: Arc::new(transform),
        })
    }
}

/// A connection string; which side it is for is known one level up.
struct Url(String);

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            Target::parse(Side::Legacy, text).map(|_| Self(text.to_owned()))
        })
    }
}
