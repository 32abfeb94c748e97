//! What the shadow reads know of the two catalogs, read by the proxy's own role and kept current.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};
use tokio::time::Duration;
use tokio_postgres::Client;

use super::cuts::Cuts;
use super::digest::FIRST_CUSTOM_OID;
use crate::config::DatabaseConfig;
use crate::control::{Control, Side};
use crate::sql::{FUNCTIONS_QUERY, FunctionVolatility, RELATIONS_QUERY, VOLATILE_OTHERS_QUERY};
use crate::upstream::control::{connect, error_chain};

/// How often the catalogs are read again without being asked to: DDL may come by other ways.
const REFRESH: Duration = Duration::from_secs(60);
const REFRESH_MIN: Duration = Duration::from_secs(1);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Functions and relations of the primary, and the custom types of both sides.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The side whose functions these are.
    pub primary: Option<Side>,
    pub functions: FunctionVolatility,
    /// Which reading of the catalogs this is; 0 for none.
    pub(super) generation: u64,
    /// Columns of primary keys, by OID of their table and number.
    keys: HashSet<(u32, i16)>,
    /// By OID on the primary, the OID of the type of the same name on the secondary.
    types: HashMap<u32, u32>,
}

const TYPES_QUERY: &str = "select t.oid, n.nspname::text, t.typname::text from pg_catalog.pg_type t \
     join pg_catalog.pg_namespace n on n.oid = t.typnamespace where t.oid >= 16384";

fn next_generation() -> u64 {
    static GENERATIONS: AtomicU64 = AtomicU64::new(1);
    GENERATIONS.fetch_add(1, Ordering::Relaxed)
}

const KEYS_QUERY: &str = "select i.indrelid, k.attnum from pg_catalog.pg_index i, unnest(i.indkey::int2[]) k(attnum) \
     where i.indisprimary and i.indrelid >= 16384";

impl Catalog {
    /// Reads both catalogs; without the secondary's, no custom type has a counterpart there.
    pub async fn load(side: Side, primary: &Client, secondary: Option<&Client>) -> Result<Self, tokio_postgres::Error> {
        let mut functions = FunctionVolatility::default();
        for row in primary.query(FUNCTIONS_QUERY, &[]).await? {
            functions.add_function(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        }
        for row in primary.query(RELATIONS_QUERY, &[]).await? {
            if row.try_get(3)? {
                functions.add_not_mirrored(row.try_get(0)?, row.try_get(1)?);
            } else {
                functions.add_relation(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            }
        }
        for row in primary.query(VOLATILE_OTHERS_QUERY, &[]).await? {
            functions.add_volatile(row.try_get(0)?, row.try_get(1)?);
        }
        let mut keys = HashSet::new();
        for row in primary.query(KEYS_QUERY, &[]).await? {
            keys.insert((row.try_get(0)?, row.try_get(1)?));
        }
        let mut types = HashMap::new();
        let Some(secondary) = secondary else {
            return Ok(Self {
                primary: Some(side),
                functions,
                generation: next_generation(),
                keys,
                types,
            });
        };
        let mut by_name: HashMap<(String, String), u32> = HashMap::new();
        for row in secondary.query(TYPES_QUERY, &[]).await? {
            by_name.insert((row.try_get(1)?, row.try_get(2)?), row.try_get(0)?);
        }
        for row in primary.query(TYPES_QUERY, &[]).await? {
            if let Some(&there) = by_name.get(&(row.try_get(1)?, row.try_get(2)?)) {
                types.insert(row.try_get(0)?, there);
            }
        }
        Ok(Self {
            primary: Some(side),
            functions,
            generation: next_generation(),
            keys,
            types,
        })
    }

    /// Whether an output column is one of its table's primary key.
    pub(super) fn is_key(&self, origin: (u32, i16)) -> bool {
        self.keys.contains(&origin)
    }

    /// Whether the secondary's type is the primary's: built-in ones have one OID everywhere, others
    /// go by their names. Of one that is not known nothing is said but that it is no built-in one.
    pub(super) fn is_same_type(&self, primary: u32, secondary: u32) -> bool {
        if primary < FIRST_CUSTOM_OID {
            return primary == secondary;
        }
        match self.types.get(&primary) {
            Some(&there) => there == secondary,
            None => secondary >= FIRST_CUSTOM_OID,
        }
    }

    /// Parse's parameter types as the secondary knows them; `None` where it has no such type.
    pub(super) fn map_types(&self, types: &[u8]) -> Option<Vec<u8>> {
        let mut mapped = Vec::with_capacity(types.len());
        for oid in types.chunks_exact(4) {
            let oid = u32::from_be_bytes(oid.try_into().ok()?);
            let there = if oid < FIRST_CUSTOM_OID {
                oid
            } else {
                *self.types.get(&oid)?
            };
            mapped.extend_from_slice(&there.to_be_bytes());
        }
        Some(mapped)
    }
}

/// Reads the catalogs in phases that mirror (which commits need not wait for both sides is told by
/// them, too): at once, when the primary changes, when
/// `changed` says so, and now and then. Runs until dropped.
pub(super) async fn keep_current(
    targets: DatabaseConfig,
    mut control: watch::Receiver<Control>,
    catalog: Arc<ArcSwap<Catalog>>,
    changed: Arc<Notify>,
    cuts: Arc<dyn Cuts>,
) {
    loop {
        let now = *control.borrow_and_update();
        let mut pause = REFRESH;
        if now.phase.mirrors() {
            let (read, complete) = read_both(&targets, now).await;
            if let Some(read) = read {
                catalog.store(Arc::new(read));
            }
            if let Err(error) = complete {
                if cuts.is_awaited() {
                    tracing::debug!(error, "waiting for the round that creates the database");
                } else {
                    tracing::warn!(database = targets.legacy.dbname(), error, "cannot read the catalogs");
                }
                pause = RETRY;
            }
        }
        let asked = async {
            // A name that stays unknown must not keep the servers busy.
            tokio::time::sleep(REFRESH_MIN).await;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = changed.notified() => {}
            }
        };
        tokio::select! {
            () = asked => {}
            ended = control.changed() => if ended.is_err() { return },
        }
    }
}

/// What could be read, and what could not. The primary's part is of use by itself: by it commits
/// are told from reads while the secondary is away.
pub(super) async fn read_both(targets: &DatabaseConfig, now: Control) -> (Option<Catalog>, Result<(), String>) {
    let connection = |side| connect(targets.target(side), "shadow");
    let primary = match connection(now.primary).await {
        Ok(primary) => primary,
        Err(error) => return (None, Err(error.to_string())),
    };
    let (secondary, complete) = match connection(now.secondary()).await {
        Ok(secondary) => (Some(secondary), Ok(())),
        Err(error) => (None, Err(error.to_string())),
    };
    match Catalog::load(now.primary, &primary, secondary.as_deref()).await {
        Ok(mut catalog) => {
            let transform = &targets.transform;
            let concerns = |schema: &str, name: &str| transform.concerns(now.primary, schema, name);
            catalog.functions.transform(concerns);
            (Some(catalog), complete)
        }
        Err(error) => (None, Err(error_chain(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_types_by_name() {
        let catalog = Catalog {
            types: HashMap::from([(16_400, 20_000)]),
            ..Catalog::default()
        };
        let bytes = |oids: &[u32]| oids.iter().flat_map(|oid| oid.to_be_bytes()).collect::<Vec<u8>>();
        assert_eq!(
            catalog.map_types(&bytes(&[23, 16_400, 0])),
            Some(bytes(&[23, 20_000, 0]))
        );
        assert_eq!(catalog.map_types(&bytes(&[16_401])), None);
        assert_eq!(catalog.map_types(&[]), Some(vec![]));
    }
}
