//! Whether a session's state is still what it was when it was copied to the other side, asked in a
//! fifth of the time that reading it takes: clients wait for the answer.
//!
//! The question is prepared on the client's server connection while nobody waits, and removed when
//! the switchover is over. It tells the values of all settings, not where they come from: one that
//! was set to the value it had is noticed by the statement that set it.

use sha2::{Digest as _, Sha256};

use super::known::Statements;
use crate::catalog::quote::literal;
use crate::wire::frontend;

const NAME: &[u8] = b"pgtandem_footprint";

pub(super) type Digest = [u8; 32];

/// A session's state in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footprint {
    pub state: Digest,
    pub unnamed: Digest,
    /// How many statements that may set something it has sent.
    pub settings: u64,
}

impl Footprint {
    pub(super) fn new(state: Digest, statements: &Statements) -> Self {
        let mut unnamed = Sha256::new();
        if let Some(parse) = statements.unnamed() {
            unnamed.update(parse.text);
            unnamed.update([0]);
            unnamed.update(parse.types);
        }
        Self {
            state,
            unnamed: unnamed.finalize().into(),
            settings: statements.settings_noted(),
        }
    }
}

/// Prepares the question and asks it. `settable`: names of settings, with commas.
pub(super) fn introduction(settable: &[u8], custom: &[String]) -> Vec<u8> {
    let mut names = String::from_utf8_lossy(settable).into_owned();
    for name in custom {
        names.push(',');
        names.push_str(name);
    }
    let names = literal(&format!("{{{names}}}"));
    // Without parameters its plan is made once.
    let text = format!(
        "select (select pg_catalog.string_agg(pg_catalog.concat(pg_catalog.current_setting(name, true)), pg_catalog.chr(1)) \
          from pg_catalog.unnest({names}::pg_catalog.text[]) name), \
         session_user, pg_catalog.current_setting('role'), \
         (select pg_catalog.string_agg(name || pg_catalog.chr(1) || prepare_time::pg_catalog.text, pg_catalog.chr(1)) \
          from pg_catalog.pg_prepared_statement() where name not like 'pgtandem\\_%'), \
         (select pg_catalog.string_agg(channel, pg_catalog.chr(1)) from pg_catalog.pg_listening_channels() channel), \
         case when pg_catalog.pg_my_temp_schema() <> 0 then \
          exists (select from pg_catalog.pg_class where relnamespace = pg_catalog.pg_my_temp_schema()) end, \
         exists (select from pg_catalog.pg_lock_status() where locktype = 'advisory' and pid = pg_catalog.pg_backend_pid()), \
         exists (select from pg_catalog.pg_cursor() where is_holdable)"
    );
    let mut out = Vec::new();
    // From an attempt that was given up.
    frontend::put_close_statement(&mut out, NAME);
    frontend::put_parse(&mut out, NAME, text.as_bytes(), &[]);
    out.extend_from_slice(&question());
    out
}

/// Asks what has been prepared.
pub(super) fn question() -> Vec<u8> {
    let mut out = Vec::new();
    frontend::put_bind(&mut out, NAME, NAME, &[]);
    frontend::put_execute(&mut out, NAME);
    frontend::put_close_portal(&mut out, NAME);
    out.extend_from_slice(frontend::SYNC);
    out
}

/// Removes the question.
pub(super) fn goodbye() -> Vec<u8> {
    let mut out = Vec::new();
    frontend::put_close_statement(&mut out, NAME);
    out.extend_from_slice(frontend::SYNC);
    out
}

/// Of an answer's rows.
pub(super) fn digest(rows: &[Vec<Vec<u8>>]) -> Digest {
    let mut digest = Sha256::new();
    for column in rows.iter().flatten() {
        digest.update((column.len() as u64).to_be_bytes());
        digest.update(column);
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_do_not_run_into_each_other() {
        let rows = |columns: &[&str]| vec![columns.iter().map(|column| column.as_bytes().to_vec()).collect()];
        assert_eq!(digest(&rows(&["a", "b"])), digest(&rows(&["a", "b"])));
        assert_ne!(digest(&rows(&["a", "b"])), digest(&rows(&["ab", ""])));
        assert_ne!(digest(&rows(&["a", "b"])), digest(&rows(&["a", "c"])));
    }
}
