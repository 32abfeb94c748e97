//! Schema `pgtandem` on one side: put there, and removed.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::{read_slot_state, write_slot_state};
use super::{JournalError, LOCK_CLASS, LOCK_STATE, SideRole, SideState, SlotState, doing};
use crate::catalog::{objects, privileges};
use crate::control::{Epoch, Side};

/// Grows with every change of the SQL; an older installation is brought up to date in place.
const VERSION: i32 = 13;

const SCRIPTS: [&str; 10] = [
    include_str!("sql/schema.sql"),
    include_str!("sql/capture.sql"),
    include_str!("sql/transform.sql"),
    OBJECTS,
    include_str!("sql/ddl.sql"),
    include_str!("sql/quarantine.sql"),
    include_str!("sql/backfill.sql"),
    include_str!("sql/switchover.sql"),
    include_str!("sql/rehearse.sql"),
    include_str!("sql/errand.sql"),
];

/// Where the query of catalog::objects becomes a function.
const OBJECTS: &str = "\
CREATE OR REPLACE FUNCTION pgtandem.objects(oid[]) RETURNS TABLE (kind text, name text, root text, owner text, recipe text, depends text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off SET enable_seqscan = on SET enable_hashjoin = on SET enable_mergejoin = on SET jit = off
AS $objects$ {objects} $objects$";

/// What [`install`] found or made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// What is recorded: the caller's wish only where nothing was recorded before.
    pub state: SideState,
    /// Whether there was no state before.
    pub fresh: bool,
}

/// Makes sure that schema `pgtandem` is on this side. A recorded epoch and role stay as they
/// are: they say who is primary, and no configuration may contradict them unnoticed.
pub async fn install(client: &mut Client, side: Side, role: SideRole, epoch: Epoch) -> Result<Installed, JournalError> {
    let missing = privileges::missing_to_install(client)
        .await
        .map_err(doing("check privileges"))?;
    if !missing.is_empty() {
        return Err(JournalError::Privileges(missing.join(" ")));
    }
    let transaction = client.transaction().await.map_err(doing("install schema pgtandem"))?;
    // The event triggers of an older installation take what is known already for no client's DDL.
    transaction
        .batch_execute(&format!(
            "SET LOCAL synchronous_commit = on; SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog;
             SET LOCAL pgtandem.ddl = '{{\"tag\": \"installation\"}}';
             SELECT pg_advisory_xact_lock({LOCK_CLASS}, {LOCK_STATE})"
        ))
        .await
        .map_err(doing("lock the side's state"))?;
    let installed = transaction
        .query_one("SELECT to_regclass('pgtandem.side') IS NOT NULL", &[])
        .await
        .map_err(doing("look for schema pgtandem"))?
        .get::<_, bool>(0);
    let recorded = if installed {
        transaction
            .query_opt("SELECT side, version FROM pgtandem.side", &[])
            .await
            .map_err(doing("read pgtandem.side"))?
    } else {
        None
    };
    if let Some(row) = &recorded {
        let found: String = row.get(0);
        if found != side.as_str() {
            return Err(JournalError::WrongSide {
                found,
                expected: side.to_string(),
            });
        }
    }
    if recorded.is_none_or(|row| row.get::<_, i32>(1) != VERSION) {
        for script in SCRIPTS {
            transaction
                .batch_execute(&script.replace("{objects}", objects::SQL))
                .await
                .map_err(doing("install schema pgtandem"))?;
        }
        transaction
            .batch_execute("SELECT pgtandem.define_again()")
            .await
            .map_err(doing("bring capture up to date"))?;
        transaction
            .execute(
                "INSERT INTO pgtandem.side AS s (side, version) VALUES ($1, $2)
                 ON CONFLICT (one) DO UPDATE SET version = EXCLUDED.version",
                &[&side.as_str(), &VERSION],
            )
            .await
            .map_err(doing("record the installation"))?;
    }
    watch_ddl(&transaction).await?;
    let before = read_slot_state(&transaction).await?;
    let state = before.unwrap_or(SlotState {
        side: SideState { epoch, role },
        slot: 0,
        full: false,
    });
    if before.is_none() {
        write_slot_state(&transaction, state).await?;
    }
    transaction.commit().await.map_err(doing("install schema pgtandem"))?;
    Ok(Installed {
        state: state.side,
        fresh: before.is_none(),
    })
}

/// Event triggers for DDL that does not come through the proxy, where its role may create them:
/// only a superuser may. They go with the schema.
async fn watch_ddl(client: &tokio_postgres::Transaction<'_>) -> Result<(), JournalError> {
    let may = client
        .query_one(
            "SELECT rolsuper AND NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'pgtandem_fence')
               FROM pg_roles WHERE rolname = current_user",
            &[],
        )
        .await
        .map_err(doing("look for event triggers"))?
        .get::<_, bool>(0);
    if may {
        client
            .batch_execute(
                "DROP EVENT TRIGGER IF EXISTS pgtandem_ddl; DROP EVENT TRIGGER IF EXISTS pgtandem_drop;
                 DROP EVENT TRIGGER IF EXISTS pgtandem_ddl_within; DROP EVENT TRIGGER IF EXISTS pgtandem_drop_within;
                 CREATE EVENT TRIGGER pgtandem_fence ON ddl_command_start EXECUTE FUNCTION pgtandem.ddl_fence();
                 CREATE EVENT TRIGGER pgtandem_fence_end ON ddl_command_end EXECUTE FUNCTION pgtandem.ddl_fence();
                 CREATE EVENT TRIGGER pgtandem_fence_drop ON sql_drop EXECUTE FUNCTION pgtandem.ddl_fence();
                 CREATE EVENT TRIGGER pgtandem_ddl ON ddl_command_end EXECUTE FUNCTION pgtandem.ddl_seen();
                 CREATE EVENT TRIGGER pgtandem_drop ON sql_drop EXECUTE FUNCTION pgtandem.ddl_seen();
                 CREATE EVENT TRIGGER pgtandem_ddl_within ON ddl_command_end EXECUTE FUNCTION pgtandem.ddl_within();
                 CREATE EVENT TRIGGER pgtandem_drop_within ON sql_drop EXECUTE FUNCTION pgtandem.ddl_within()",
            )
            .await
            .map_err(doing("create event triggers"))?;
    }
    Ok(())
}

/// Removes triggers and schema. Table by table with short locks, so that no application queues
/// behind it; it goes on until all are gone.
pub async fn uninstall(client: &mut Client) -> Result<(), JournalError> {
    loop {
        let rows = client
            .query(
                "SELECT pg_catalog.string_agg(pg_catalog.format('DROP TRIGGER IF EXISTS %I ON %I.%I', t.tgname, n.nspname, c.relname), '; ')
                   FROM pg_catalog.pg_trigger t
                   JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE t.tgname LIKE 'zzz\\_pgtandem\\_%' AND NOT t.tgisinternal
                  GROUP BY c.oid",
                &[],
            )
            .await
            .map_err(doing("list captured tables"))?;
        if rows.is_empty() {
            break;
        }
        for row in rows {
            let drop_triggers: String = row.get(0);
            let dropped = client
                .batch_execute(&format!(
                    "BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL client_min_messages = warning; {drop_triggers}; COMMIT"
                ))
                .await;
            if let Err(error) = dropped {
                client
                    .batch_execute("ROLLBACK")
                    .await
                    .map_err(doing("remove capture triggers"))?;
                let waits = [
                    SqlState::LOCK_NOT_AVAILABLE,
                    SqlState::UNDEFINED_TABLE,
                    SqlState::T_R_DEADLOCK_DETECTED,
                ];
                if !error.code().is_some_and(|code| waits.contains(code)) {
                    return Err(doing("remove capture triggers")(error));
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
    client
        .batch_execute(
            "SET client_min_messages = warning; DROP SCHEMA IF EXISTS pgtandem CASCADE; RESET client_min_messages",
        )
        .await
        .map_err(doing("drop schema pgtandem"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database in LATIN1 refuses the rest, in comments, too.
    #[test]
    fn scripts_are_of_characters_that_every_encoding_has() {
        for script in SCRIPTS.into_iter().chain([objects::SQL]) {
            let other = script.chars().find(|character| !character.is_ascii());
            assert_eq!(other, None, "{script}");
        }
    }
}
