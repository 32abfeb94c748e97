//! The proxy's own connections to both servers, for what a rehearsal may not ask by itself.

use std::sync::Arc;

use tokio::sync::Mutex;

use crate::config::DatabaseConfig;
use crate::control::Side;
use crate::upstream::control::{Control as Connection, connect, error_chain};

pub(super) struct Desk {
    targets: DatabaseConfig,
    /// Of legacy and new; opened when they are needed.
    connections: [Mutex<Option<Arc<Connection>>>; 2],
    key: Mutex<Option<(Side, String)>>,
}

/// Whether anybody waits for a lock that this session has, or stands before him in its queue.
const BLOCKS: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks w WHERE NOT w.granted AND $1 = ANY (pg_catalog.pg_blocking_pids(w.pid)))";

impl Desk {
    pub(super) fn new(targets: DatabaseConfig) -> Self {
        Self {
            targets,
            connections: Default::default(),
            key: Mutex::default(),
        }
    }

    pub(super) async fn at(&self, side: Side) -> Result<Arc<Connection>, String> {
        let slot = match side {
            Side::Legacy => &self.connections[0],
            Side::New => &self.connections[1],
        };
        let mut slot = slot.lock().await;
        if let Some(connection) = &*slot
            && !connection.is_closed()
        {
            return Ok(connection.clone());
        }
        let connection = connect(self.targets.target(side), "rehearsals").await;
        let connection = Arc::new(connection.map_err(|error| error.to_string())?);
        *slot = Some(connection.clone());
        Ok(connection)
    }

    /// What opens a rehearsal on this side. The first proxy that needs one makes it.
    pub(super) async fn key(&self, side: Side) -> Result<String, String> {
        let mut known = self.key.lock().await;
        if let Some((of, key)) = &*known
            && *of == side
        {
            return Ok(key.clone());
        }
        let fresh = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        let client = self.at(side).await?;
        let failed = |error: tokio_postgres::Error| error_chain(&error);
        client
            .execute(
                "INSERT INTO pgtandem.rehearsal_key (key) VALUES ($1) ON CONFLICT DO NOTHING",
                &[&fresh],
            )
            .await
            .map_err(failed)?;
        let row = client.query_one("SELECT key FROM pgtandem.rehearsal_key", &[]).await;
        let key: String = row.map_err(failed)?.get(0);
        *known = Some((side, key.clone()));
        Ok(key)
    }

    /// The key was made anew meanwhile.
    pub(super) async fn forget_key(&self) {
        *self.key.lock().await = None;
    }

    /// Whether anybody waits for this backend of the side.
    pub(super) async fn is_blocked_by(&self, side: Side, pid: i32) -> bool {
        let Ok(client) = self.at(side).await else { return false };
        let blocked = client.query_one(BLOCKS, &[&pid]).await;
        blocked.is_ok_and(|row| row.get(0))
    }
}
