//! Who applies: one proxy of any number, by a session's advisory lock on the secondary.
//!
//! The lock is held by a connection of its own that does nothing else, so that it is free the
//! moment its holder dies, whatever statement the holder's other connections were in. A holder
//! that is cut off instead of killed leaves a session that its server would believe in for
//! hours: so the holder beats, the server ends the session where no beat comes, and the holder
//! gives up where no answer comes. Between the two there may be two who believe that they
//! apply; rounds are guarded by their number, so only one of them can commit.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::session::purpose;
use super::{ApplierConfig, ApplyError, doing, errands};
use crate::control::Epoch;
use crate::journal::{LOCK_APPLIER, LOCK_CLASS};
use crate::upstream::control::{Control, connect_hearing};

const BEAT: Duration = Duration::from_secs(1);

/// A holder is taken for cut off after this long; ten beats, so that a busy machine is not.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(10);

/// What `application_name` of the lease's connection begins with; the holder's name follows.
const NAME: &str = "pgtandem lease of ";

/// A connection that asks for the lease, and keeps it once it has it.
pub(super) struct Lease {
    secondary: Control,
    /// Errands were left on the secondary.
    heard: Arc<Notify>,
}

impl Lease {
    pub(super) async fn connect(config: &ApplierConfig) -> Result<Self, ApplyError> {
        let purpose = format!("lease of {}", this_proxy());
        let heard = Arc::new(Notify::new());
        let secondary = connect_hearing(&config.secondary, &purpose, heard.clone()).await?;
        // Settings that an old server does not know are left alone there.
        secondary
            .batch_execute(&format!(
                "SELECT pg_catalog.set_config(s.name, v.value, false)
                   FROM (VALUES ('idle_session_timeout', '{silence}'), ('synchronous_commit', 'on'), ('statement_timeout', '0'), ('lock_timeout', '0'),
                                ('tcp_keepalives_idle', '5'), ('tcp_keepalives_interval', '2'), ('tcp_keepalives_count', '3'))
                        AS v(name, value)
                   JOIN pg_catalog.pg_settings s ON s.name = v.name; LISTEN {channel}",
                silence = SILENCE_MAX.as_millis(),
                channel = errands::CHANNEL
            ))
            .await
            .map_err(doing("prepare the lease's connection"))?;
        Ok(Self { secondary, heard })
    }

    /// Returns when an errand was left for whoever holds the lease.
    pub(super) async fn hear_of_errand(&self) {
        self.heard.notified().await;
    }

    /// The connection, for what is done at once: looks while somebody else holds the lease, errands
    /// while this proxy does.
    pub(super) const fn connection(&self) -> &Control {
        &self.secondary
    }

    /// Asks once, without waiting: a waiting statement would hold back the secondary's vacuum.
    pub(super) async fn try_take(&self) -> Result<bool, ApplyError> {
        let row = self
            .secondary
            .query_one("SELECT pg_try_advisory_lock($1, $2)", &[&LOCK_CLASS, &LOCK_APPLIER])
            .await
            .map_err(doing("take the applier's lease"))?;
        Ok(row.get(0))
    }

    /// Who has it: `pid 4711 on host`.
    pub(super) async fn holder(&self) -> Result<Option<String>, ApplyError> {
        let row = self
            .secondary
            .query_opt(
                "SELECT COALESCE(a.application_name, '') FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
                  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
                    AND l.classid = $1::integer::oid AND l.objid = $2::integer::oid
                    AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())",
                &[&LOCK_CLASS, &LOCK_APPLIER],
            )
            .await
            .map_err(doing("ask who holds the applier's lease"))?;
        Ok(row.map(|row| {
            let name: &str = row.get(0);
            name.strip_prefix(NAME).unwrap_or(name).to_owned()
        }))
    }

    /// Beats until the secondary no longer answers.
    pub(super) async fn keep(&self) -> Result<Infallible, ApplyError> {
        loop {
            sleep(BEAT).await;
            timeout(SILENCE_MAX, self.secondary.batch_execute("SELECT 1"))
                .await
                .map_err(|_elapsed| ApplyError::Silent("secondary"))?
                .map_err(doing("keep the applier's lease"))?;
        }
    }
}

/// The name under which this proxy holds the lease. Several may run on one machine.
pub(crate) fn this_proxy() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "an unnamed host",
        host => host,
    };
    format!("pid {} on {host}", std::process::id())
}

/// How long a server may take to end sessions that it was told to.
const ENDING_MAX: Duration = Duration::from_secs(5);

/// Ends whatever any proxy's applier of `epoch` has open on this server, and returns when it is
/// gone. Once the side is primary in a later epoch, none comes back: see `Session::connect`.
///
/// # Errors
/// The server fails, or something is still there.
pub(crate) async fn depose(server: &tokio_postgres::Client, epoch: Epoch) -> Result<(), String> {
    let name = format!("pgtandem {}", purpose(epoch));
    let deadline = tokio::time::Instant::now() + ENDING_MAX;
    loop {
        let row = server
            .query_one(
                "SELECT count(pg_catalog.pg_terminate_backend(a.pid)) FROM pg_catalog.pg_stat_activity a
                  WHERE a.application_name = $1 AND a.usename = current_user AND a.pid <> pg_catalog.pg_backend_pid()
                    AND a.datname = pg_catalog.current_database()",
                &[&name],
            )
            .await
            .map_err(|error| crate::upstream::control::error_chain(&error))?;
        let left: i64 = row.get(0);
        if left == 0 {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(format!("{left} connections of the old direction's applier do not end"));
        }
        sleep(Duration::from_millis(1)).await;
    }
}

/// Ends what a former holder left running: its process may be gone or cut off while its server
/// process still works, and holds locks that a round would wait for.
pub(super) async fn end_leftovers(server: &Control, epoch: Epoch) -> Result<(), ApplyError> {
    let name = format!("pgtandem {}", purpose(epoch));
    let ended = server
        .query_one(
            "SELECT count(*) FILTER (WHERE pg_catalog.pg_terminate_backend(a.pid)) FROM pg_catalog.pg_stat_activity a
              WHERE a.application_name = $1 AND a.usename = current_user AND a.pid <> pg_catalog.pg_backend_pid()
                AND a.datname = pg_catalog.current_database()",
            &[&name],
        )
        .await
        .map_err(doing("end what a former applier left"))?
        .get::<_, i64>(0);
    if ended > 0 {
        tracing::warn!(sessions = ended, "ended what a former applier had left running");
    }
    Ok(())
}
