//! What a database's two servers say of themselves, for the status and the gates.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::watch::Sender;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use crate::admin::api::{self, ConnectionLimit, Connections, LastStray, OldestPrepared, ServerStatus};
use crate::config::{DatabaseConfig, Target};
use crate::control::Side;
use crate::session::Running;
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

/// What server processes are running, by process id. Of other roles' only where ours may read
/// all statistics (`pg_read_all_stats`).
pub(super) async fn running(client: &Client, pids: &[i32]) -> Result<HashMap<i32, Running>, Error> {
    // A text that is cut off ends before the bound, by as much as a character takes.
    let rows = client
        .query(
            "SELECT pid, query, wait_event_type IS NOT DISTINCT FROM 'Lock',
                    pg_catalog.octet_length(query)
                        >= pg_catalog.pg_size_bytes(pg_catalog.current_setting('track_activity_query_size')) - 4
               FROM pg_catalog.pg_stat_activity WHERE pid = ANY ($1) AND state = 'active' AND query IS NOT NULL",
            &[&pids],
        )
        .await?;
    let mut running = HashMap::new();
    for row in rows {
        let found = Running {
            text: row.try_get(1)?,
            waits_for_lock: row.try_get(2)?,
            cut_off: row.try_get(3)?,
        };
        running.insert(row.try_get(0)?, found);
    }
    Ok(running)
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
                    EXTRACT(epoch FROM pg_catalog.clock_timestamp() - p.prepared)::float8,
                    pg_catalog.pg_database_size(pg_catalog.current_database())
               FROM (SELECT) one LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.database = pg_catalog.current_database()
              ORDER BY p.prepared LIMIT 1",
            &[],
        )
        .await?;
    let (connections, clients) = tokio::try_join!(connections(client), clients(client))?;
    let status = ServerStatus {
        version: row.get(0),
        database_bytes: u64::try_from(row.get::<_, i64>(4)).ok(),
        connections: Some(connections),
        clients,
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

/// What is visible of other roles' connections without privileges is whose they are, not what they
/// do: a server process that may be a client's counts as one.
const A_CLIENTS: &str =
    "a.usesysid IS NOT NULL AND a.datid IS NOT NULL AND COALESCE(a.backend_type, 'client backend') = 'client backend'";

async fn connections(client: &Client) -> Result<Connections, Error> {
    let row = client
        .query_one(
            &format!(
                "SELECT pg_catalog.current_setting('max_connections')::bigint
                        - pg_catalog.current_setting('superuser_reserved_connections')::bigint
                        - COALESCE(pg_catalog.current_setting('reserved_connections', true)::bigint, 0),
                        count(a.pid), d.datconnlimit::bigint, count(a.pid) FILTER (WHERE a.datid = d.oid)
                   FROM pg_catalog.pg_database d LEFT JOIN pg_catalog.pg_stat_activity a ON {A_CLIENTS}
                  WHERE d.datname = pg_catalog.current_database() GROUP BY d.oid, d.datconnlimit"
            ),
            &[],
        )
        .await?;
    let limited = client
        .query(
            &format!(
                "SELECT r.rolname::text, r.rolconnlimit::bigint, count(a.pid)
                   FROM pg_catalog.pg_roles r LEFT JOIN pg_catalog.pg_stat_activity a ON a.usesysid = r.oid AND {A_CLIENTS}
                  WHERE r.rolconnlimit >= 0 GROUP BY r.rolname, r.rolconnlimit"
            ),
            &[],
        )
        .await?;
    let of_database = ConnectionLimit {
        limit: row.get(2),
        used: row.get(3),
    };
    Ok(Connections {
        limit: row.get(0),
        used: row.get(1),
        database: (of_database.limit >= 0).then_some(of_database),
        roles: limited
            .iter()
            .map(|row| {
                let (limit, used) = (row.get(1), row.get(2));
                (row.get(0), ConnectionLimit { limit, used })
            })
            .collect(),
    })
}

/// Connections to this database that are not pgtandem's own: neither by its role, nor by the name
/// under which it asks as a client's user.
async fn clients(client: &Client) -> Result<Vec<api::Client>, Error> {
    let rows = client
        .query(
            &format!(
                "SELECT a.pid, a.usename::text, COALESCE(a.application_name, ''),
                        CASE WHEN a.client_port = -1 THEN 'a local socket' ELSE pg_catalog.host(a.client_addr) END,
                        EXTRACT(epoch FROM pg_catalog.clock_timestamp() - a.backend_start)::float8, a.backend_xid IS NOT NULL
                   FROM pg_catalog.pg_stat_activity a
                  WHERE {A_CLIENTS} AND a.datname = pg_catalog.current_database() AND a.usename <> current_user
                    AND COALESCE(a.application_name, '') NOT LIKE 'pgtandem %'
                  ORDER BY a.pid"
            ),
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| api::Client {
            pid: row.get(0),
            user: row.get(1),
            application: row.get(2),
            address: row.get(3),
            seconds: row.get(4),
            writing: row.get(5),
        })
        .collect())
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
