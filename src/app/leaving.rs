//! Databases under `"*"` that a client is about to drop, and what other proxies have there.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::{DatabaseConfig, Target};
use crate::control::Side;
use crate::upstream::control::{Control, connect};

/// A server looks ten times a second whether a database is still in use, for five seconds.
const AGAIN: Duration = Duration::from_millis(50);
const SERVERS_PATIENCE: Duration = Duration::from_secs(6);

/// Ends other proxies' connections to the database, first on the primary and then, where it was
/// dropped, on the secondary: they are not in the client's way on a plain server, and those proxies
/// do not know of it yet. They connect again, so it is done over and over.
pub(super) async fn end_others(dbname: String, [primary, secondary]: [Target; 2], until: Instant) {
    for (target, until) in [(primary, Instant::now() + SERVERS_PATIENCE), (secondary, until)] {
        match end_on(&target, &dbname, until).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(database = dbname, error = %error, "end other proxies' connections");
                return;
            }
        }
    }
}

/// Whether the database is gone.
async fn end_on(target: &Target, dbname: &str, until: Instant) -> anyhow::Result<bool> {
    let client: Control = connect(target, "leaving").await?;
    while Instant::now() < until {
        let row = client
            .query_one(
                "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1), count(pg_terminate_backend(a.pid))
                   FROM pg_stat_activity a
                  WHERE a.datname = $1 AND a.usename = current_user AND a.application_name LIKE 'pgtandem %'",
                &[&dbname],
            )
            .await?;
        if !row.get::<_, bool>(0) {
            return Ok(true);
        }
        tokio::time::sleep(AGAIN).await;
    }
    Ok(false)
}

/// The primary's and the secondary's addresses, by way of a database that stays.
pub(super) fn beside(gone: &DatabaseConfig, staying: &DatabaseConfig, primary: Side) -> Option<[Target; 2]> {
    let same = |one: &Target, other: &Target| (&one.host, one.port) == (&other.host, other.port);
    (same(&gone.legacy, &staying.legacy) && same(&gone.new, &staying.new))
        .then(|| [staying.target(primary).clone(), staying.target(primary.other()).clone()])
}
