//! The SCRAM verifiers of users that proxy.yaml does not list, looked up on the primary.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::registry::lock;
use crate::config::Target;
use crate::upstream::control;
use crate::wire::scram::Verifier;

/// How long a verifier is believed: a changed password counts after this at the latest, and at
/// once where a client fails with the old one.
const KEPT: Duration = Duration::from_secs(10);
/// Users remembered, known and unknown ones: a few hundred bytes each.
const ENTRIES_MAX: usize = 4096;
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

type Key = (String, u16, String);

#[derive(Default)]
pub(super) struct VerifierCache {
    entries: Mutex<HashMap<Key, (Instant, Option<Verifier>)>>,
    /// The connection to ask by. One question at a time, so that clients that guess users do not
    /// become many connections.
    connection: tokio::sync::Mutex<Option<((String, u16), control::Control)>>,
}

impl VerifierCache {
    /// The verifier of `user` on the server of `target`; `None` where there is no such role that
    /// may log in, or none with a SCRAM password.
    ///
    /// # Errors
    /// One line: the server could not be asked.
    pub(super) async fn look_up(&self, target: &Target, user: &str) -> Result<Option<Verifier>, String> {
        let key = key(target, user);
        if let Some((at, verifier)) = lock(&self.entries).get(&key)
            && at.elapsed() < KEPT
        {
            return Ok(verifier.clone());
        }
        let asked = tokio::time::timeout(LOOKUP_TIMEOUT, self.ask(target, user)).await;
        let verifier = asked.unwrap_or_else(|_| Err(format!("{}: no answer", target.describe())))?;
        let mut entries = lock(&self.entries);
        if entries.len() >= ENTRIES_MAX {
            entries.clear();
        }
        entries.insert(key, (Instant::now(), verifier.clone()));
        Ok(verifier)
    }

    /// The next question goes to the server again: what was known did not fit.
    pub(super) fn forget(&self, target: &Target, user: &str) {
        lock(&self.entries).remove(&key(target, user));
    }

    async fn ask(&self, target: &Target, user: &str) -> Result<Option<Verifier>, String> {
        let server = (target.host.clone(), target.port);
        let mut slot = self.connection.lock().await;
        // Taken out while in use: a question that is given up half-way leaves no connection
        // behind that is in the middle of an answer.
        let mut connection = slot
            .take()
            .filter(|(to, connection)| *to == server && !connection.is_closed())
            .map(|(_, connection)| connection);
        if connection.is_none() {
            let opened = control::connect(target, "auth").await;
            connection = Some(opened.map_err(|error| error.to_string())?);
        }
        let Some(connection) = connection else {
            return Err(format!("{}: no connection", target.describe()));
        };
        let asked = connection
            .query_opt(
                "select rolpassword from pg_catalog.pg_authid where rolname = $1::pg_catalog.text::pg_catalog.name \
                 and rolcanlogin and (rolvaliduntil is null or rolvaliduntil > pg_catalog.now())",
                &[&user],
            )
            .await;
        match asked {
            Ok(row) => {
                *slot = Some((server, connection));
                let password = row.and_then(|row| row.get::<_, Option<String>>(0));
                Ok(password.and_then(|text| Verifier::parse(&text)))
            }
            Err(error) => {
                let mut cause = control::error_chain(&error);
                if error.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) {
                    cause.push_str(&format!(
                        " (list the users under auth.users, or let a DBA run: GRANT SELECT ON pg_authid TO \"{}\")",
                        target.user
                    ));
                }
                Err(format!("{}: look up a role's verifier: {cause}", target.describe()))
            }
        }
    }
}

fn key(target: &Target, user: &str) -> Key {
    (target.host.clone(), target.port, user.to_owned())
}
