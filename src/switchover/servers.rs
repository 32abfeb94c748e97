//! What a database's two servers say of themselves, for the status and the gates.

use std::time::Duration;

use tokio::sync::watch::Sender;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use crate::admin::api::{LastStray, OldestPrepared, ServerStatus};
use crate::config::{DatabaseConfig, Target};
use crate::control::Side;
use crate::upstream::control::{connect, error_chain};

/// How often each server is asked, unless that takes it long.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// A server that takes longer to answer is as good as away.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Of the time, no more than a twentieth is spent asking.
const REST: u32 = 20;

/// Asks both servers from time to time; nothing is decided by what is found between.
pub(super) async fn watch(targets: DatabaseConfig, report: Sender<[ServerStatus; 2]>) {
    loop {
        let began = Instant::now();
        let looked = look(&targets).await;
        let pause = WATCH_EVERY.max(began.elapsed() * REST).min(ANSWER_MAX);
        report.send_replace(looked);
        tokio::time::sleep(pause).await;
    }
}

/// Legacy, new.
pub(super) async fn look(targets: &DatabaseConfig) -> [ServerStatus; 2] {
    let (legacy, new) = tokio::join!(
        look_at(targets.target(Side::Legacy)),
        look_at(targets.target(Side::New))
    );
    [legacy, new]
}

async fn look_at(target: &Target) -> ServerStatus {
    let found = async {
        let client = match connect(target, "watch").await {
            Ok(client) => client,
            Err(error) => {
                return Ok(ServerStatus {
                    missing: error.is_missing_database(),
                    error: Some(error.to_string()),
                    ..ServerStatus::default()
                });
            }
        };
        ask(&client).await.map_err(|error| error_chain(&error))
    };
    let answer = tokio::time::timeout(ANSWER_MAX, found).await;
    let status = answer.unwrap_or_else(|_elapsed| Err(format!("no answer within {ANSWER_MAX:?}")));
    ServerStatus {
        address: format!("{}:{}/{}", target.host, target.port, target.dbname()),
        ..status.unwrap_or_else(|error| ServerStatus {
            error: Some(error),
            ..ServerStatus::default()
        })
    }
}

async fn ask(client: &Client) -> Result<ServerStatus, Error> {
    let row = client
        .query_one(
            "SELECT pg_catalog.current_setting('server_version'), to_regclass('pgtandem.shape') IS NOT NULL, p.gid,
                    EXTRACT(epoch FROM pg_catalog.clock_timestamp() - p.prepared)::float8
               FROM (SELECT) one LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.database = pg_catalog.current_database()
              ORDER BY p.prepared LIMIT 1",
            &[],
        )
        .await?;
    let status = ServerStatus {
        version: row.get(0),
        prepared: row.get::<_, Option<String>>(2).map(|gid| OldestPrepared {
            gid,
            seconds: row.get(3),
        }),
        ..ServerStatus::default()
    };
    let installed: bool = row.get(1);
    let ours = match installed {
        true => tokio::try_join!(last_stray(client), uncapturable(client)),
        false => return Ok(status),
    };
    match ours {
        Ok((stray, uncapturable)) => Ok(ServerStatus {
            stray,
            uncapturable,
            ..status
        }),
        // Removed meanwhile.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(status),
        Err(error) => Err(error),
    }
}

async fn last_stray(client: &Client) -> Result<Option<LastStray>, Error> {
    let row = client
        .query_opt(
            "SELECT EXTRACT(epoch FROM pg_catalog.clock_timestamp() - last)::float8,
                    pg_catalog.format('%s (%s) on %s', role, application, relation)
               FROM pgtandem.stray ORDER BY last DESC LIMIT 1",
            &[],
        )
        .await?;
    Ok(row.map(|row| LastStray {
        seconds: row.get(0),
        who: row.get(1),
    }))
}

/// What else is not captured yet, a flip captures under the hold.
async fn uncapturable(client: &Client) -> Result<Vec<String>, Error> {
    let rows = client
        .query(
            "SELECT s.schema || '.' || s.name
               FROM pgtandem.shape s JOIN pg_catalog.pg_class c ON c.oid = s.rel
              WHERE s.extension IS NULL AND NOT s.capturing AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')
              ORDER BY s.rel",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
