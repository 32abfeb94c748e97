//! What a session has made of its server connection, as that server tells it.

use super::asking::{Trouble, in_time};
use super::relay::{End, Session};

/// User-defined types have OIDs of their own on each server.
pub(super) const FIRST_CUSTOM_OID: u32 = 16_384;

/// What a session has made of its server connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub settings: Vec<(Vec<u8>, Vec<u8>)>,
    pub session_user: Vec<u8>,
    pub role: Vec<u8>,
    pub prepared: Vec<Prepared>,
    pub listens: Vec<Vec<u8>>,
    /// Names of all settings that it may change, with commas.
    pub settable: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prepared {
    pub name: Vec<u8>,
    pub text: Vec<u8>,
    pub from_sql: bool,
    /// OID on the old side, and name.
    pub types: Vec<(u32, Vec<u8>)>,
}

impl Session {
    pub(super) async fn inspect(&mut self) -> Result<State, Trouble> {
        let custom = format!("{{{}}}", self.statements.custom().join(","));
        State::read(self.ask(INSPECT, &[Some(custom.as_bytes())]).await?)
    }

    /// What keeps the session where it is, as it stands now.
    pub(super) async fn uncarriable(&mut self) -> Result<Option<String>, End> {
        let rows = match in_time(self.ask(UNCARRIABLE, &[])).await? {
            Ok(rows) => rows,
            Err(reason) => return Ok(Some(reason)),
        };
        let reasons = rows.iter().filter_map(|row| row.get(1));
        let reasons: Vec<_> = reasons.map(|reason| String::from_utf8_lossy(reason)).collect();
        Ok((!reasons.is_empty()).then(|| reasons.join("; ")))
    }
}

/// What a session has that no other connection can be given.
macro_rules! uncarriable {
    () => {
        "select 'uncarriable', 'it has temporary tables', null, null, null, null \
 where exists (select from pg_catalog.pg_class where relnamespace = pg_catalog.pg_my_temp_schema()) \
union all select 'uncarriable', 'it holds session advisory locks', null, null, null, null \
 where exists (select from pg_catalog.pg_locks where locktype = 'advisory' and pid = pg_catalog.pg_backend_pid()) \
union all select 'uncarriable', 'it has a cursor WITH HOLD: ' || name, null, null, null, null \
 from pg_catalog.pg_cursors where is_holdable"
    };
}

const UNCARRIABLE: &str = uncarriable!();

/// One row for each thing that a session can have, and the names of all settings that it may
/// change. `$1`: names of custom settings.
const INSPECT: &str = concat!(
    "\
select 'settable', pg_catalog.string_agg(name, ','), null, null, null, null from pg_catalog.pg_settings \
 where context in ('user', 'superuser') and name not in \
 ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable') \
union all \
select 'setting', name, setting, null, null, null from pg_catalog.pg_settings \
 where source = 'session' and name not in \
 ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'session_authorization', 'role') \
union all select 'setting', name, pg_catalog.current_setting(name, true), null, null, null \
 from pg_catalog.unnest($1::pg_catalog.text[]) name where pg_catalog.current_setting(name, true) is not null \
union all select 'user', session_user::pg_catalog.text, pg_catalog.current_setting('role'), null, null, null \
union all select 'prepared', name, statement, from_sql::pg_catalog.text, \
 pg_catalog.array_to_string(parameter_types::pg_catalog.oid[], ','), \
 pg_catalog.array_to_string(parameter_types::pg_catalog.text[], pg_catalog.chr(31)) \
 from pg_catalog.pg_prepared_statements where name not like 'pgtandem\\_%' \
union all select 'listen', channel, null, null, null, null from pg_catalog.pg_listening_channels() channel \
union all ",
    uncarriable!()
);

impl State {
    /// What is left is what a connection needs to read as the session does.
    pub(super) fn leave_statements(&mut self) {
        self.prepared.clear();
        self.listens.clear();
    }

    fn read(rows: Vec<Vec<Vec<u8>>>) -> Result<Self, Trouble> {
        let mut state = Self::default();
        for row in rows {
            let [kind, first, second, third, fourth, fifth]: [Vec<u8>; 6] = row
                .try_into()
                .map_err(|_| Trouble::Refused("unreadable answer about the session's state".into()))?;
            match &kind[..] {
                b"settable" => state.settable = first,
                b"setting" => state.settings.push((first, second)),
                b"user" => (state.session_user, state.role) = (first, second),
                b"prepared" => state.prepared.push(Prepared {
                    name: first,
                    text: second,
                    from_sql: third == b"true" || third == b"t",
                    types: pair_types(&fourth, &fifth),
                }),
                b"listen" => state.listens.push(first),
                b"uncarriable" => return Err(Trouble::Refused(String::from_utf8_lossy(&first).into_owned())),
                _ => {}
            }
        }
        // What follows may hold text in the session's encoding.
        state.settings.sort_by_key(|(name, _)| name != b"client_encoding");
        Ok(state)
    }
}

fn pair_types(oids: &[u8], names: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let oids = oids.split(|&byte| byte == b',').filter_map(|oid| {
        let text = std::str::from_utf8(oid).ok()?;
        text.parse().ok()
    });
    oids.zip(names.split(|&byte| byte == 31).map(<[u8]>::to_vec)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_keep_their_names() {
        assert_eq!(
            pair_types(b"23,16400", b"integer\x1fapp.\"My Type\""),
            [(23, b"integer".to_vec()), (16400, b"app.\"My Type\"".to_vec())]
        );
        assert_eq!(pair_types(b"", b""), []);
    }
}
