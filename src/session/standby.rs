//! A session's connection to the other side, and how a session's state is brought about on it.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::asking::{Asked, CARRY_NAME, Trouble, Wire, ask};
use super::carry::Copied;
use super::reported::Reported;
use super::state::{FIRST_CUSTOM_OID, Prepared, State};
use crate::control::Side;
use crate::sql::{Class, LexSettings};
use crate::upstream::{Backend, Stream};
use crate::wire::frame::Header;
use crate::wire::frontend::{self, Parse};

/// A connection to the other side, opened beforehand; or the one that was left behind.
pub(super) struct Standby {
    pub side: Side,
    pub stream: Stream,
    pub pid: i32,
    pub key: Box<[u8]>,
    pub reported: Reported,
    pub pending: Vec<u8>,
    pub copied: Option<Copied>,
    /// Holds state that a new copy has to clear first.
    pub used: bool,
}

impl Standby {
    pub(super) fn new(side: Side, backend: Backend) -> Self {
        let reported = Reported::new(backend.parameters());
        Self {
            side,
            pid: backend.pid,
            key: backend.key,
            reported,
            stream: backend.stream,
            pending: backend.leftover,
            copied: None,
            used: false,
        }
    }

    /// Whether the server has not closed it meanwhile. What it said unasked is forgotten.
    pub(super) async fn is_alive(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let read = poll_fn(|cx| Poll::Ready(self.stream.poll_read(cx, &mut buffer))).await;
        match read {
            Poll::Pending => {}
            Poll::Ready(Ok(read)) if read > 0 => self.pending.extend_from_slice(&buffer[..read]),
            Poll::Ready(_) => return false,
        }
        let mut passed = 0;
        while let Ok(Some(header)) = Header::backend(&self.pending[passed..])
            && self.pending.len() >= passed + header.total
        {
            if header.kind == b'E' {
                return false;
            }
            passed += header.total;
        }
        self.pending.drain(..passed);
        true
    }

    /// Has the server answer frames with so many ReadyForQuery at their end.
    pub(super) async fn ask(&mut self, frames: &[u8], ready: usize) -> Result<Asked, Trouble> {
        ask(self.wire(), frames, ready, &mut Vec::new()).await
    }

    pub(super) async fn close(mut self) {
        let goodbye = async {
            self.stream.write_all(frontend::TERMINATE).await?;
            self.stream.shutdown().await
        };
        // It is being dropped either way.
        tokio::time::timeout(Duration::from_secs(1), goodbye).await.ok();
    }
}

impl Standby {
    /// Brings about `state`. Each item has its own Sync, so that an error names what it concerns.
    pub(super) async fn replay(
        &mut self,
        state: &State,
        unnamed: Option<Parse<'_>>,
        user: &str,
    ) -> Result<(), Trouble> {
        let lex = self.reported.lex();
        let mut items: Vec<(String, Vec<u8>)> = Vec::new();
        let name_of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if self.used {
            let mut out = Vec::new();
            frontend::put_query(&mut out, b"discard all");
            items.push(("clear the connection".into(), out));
        }
        self.used = true;
        let mut out = Vec::new();
        frontend::put_parse(
            &mut out,
            CARRY_NAME,
            b"select pg_catalog.set_config($1, $2, false)",
            &[0, 0, 0, 25, 0, 0, 0, 25],
        );
        out.extend_from_slice(frontend::SYNC);
        items.push(("set settings".into(), out));
        let set = |name: &[u8], value: &[u8]| {
            let mut out = Vec::new();
            frontend::put_bind(&mut out, b"", CARRY_NAME, &[Some(name), Some(value)]);
            frontend::put_execute(&mut out, b"");
            out.extend_from_slice(frontend::SYNC);
            (format!("setting \"{}\"", name_of(name)), out)
        };
        items.extend(state.settings.iter().map(|(name, value)| set(name, value)));
        if state.session_user != user.as_bytes() {
            items.push(set(b"session_authorization", &state.session_user));
        }
        if state.role != b"none" {
            items.push(set(b"role", &state.role));
        }
        self.run(items).await?;

        let types = self.map_types(&state.prepared).await?;
        let mut items: Vec<(String, Vec<u8>)> = Vec::new();
        for prepared in &state.prepared {
            let mut out = Vec::new();
            if prepared.from_sql {
                let Some(text) = prepare_statement(prepared, lex) else {
                    let name = name_of(&prepared.name);
                    return Err(Trouble::Refused(format!("prepared statement \"{name}\": unreadable")));
                };
                frontend::put_query(&mut out, text);
            } else {
                let oids: Vec<u8> = prepared
                    .types
                    .iter()
                    .flat_map(|(oid, name)| types_on_this_side(&types, *oid, name).to_be_bytes())
                    .collect();
                frontend::put_parse(&mut out, &prepared.name, &prepared.text, &oids);
                out.extend_from_slice(frontend::SYNC);
            }
            items.push((format!("prepared statement \"{}\"", name_of(&prepared.name)), out));
        }
        for channel in &state.listens {
            let mut out = Vec::new();
            frontend::put_query(&mut out, &[b"listen ", &quoted(channel)[..]].concat());
            items.push((format!("LISTEN on \"{}\"", name_of(channel)), out));
        }
        let mut out = Vec::new();
        frontend::put_close_statement(&mut out, CARRY_NAME);
        out.extend_from_slice(frontend::SYNC);
        items.push(("close".into(), out));
        self.run(items).await?;

        // Last, since a simple Query would drop it.
        self.prepare_unnamed(unnamed).await
    }

    /// It may be one that never worked: then the client finds no unnamed statement, as before.
    pub(super) async fn prepare_unnamed(&mut self, unnamed: Option<Parse<'_>>) -> Result<(), Trouble> {
        let mut out = Vec::new();
        match unnamed {
            Some(parse) => {
                let mut oids = parse.types.to_vec();
                for oid in oids.chunks_exact_mut(4) {
                    // The type's OID here is not known: the server infers it again.
                    if u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]) >= FIRST_CUSTOM_OID {
                        oid.fill(0);
                    }
                }
                frontend::put_parse(&mut out, b"", parse.text, &oids);
            }
            None => frontend::put_close_statement(&mut out, b""),
        }
        out.extend_from_slice(frontend::SYNC);
        let mut wire = self.wire();
        wire.send(&out).await?;
        wire.answer(&mut Vec::new()).await?;
        Ok(())
    }

    /// The OIDs that user-defined parameter types have here, by name.
    async fn map_types(&mut self, prepared: &[Prepared]) -> Result<Vec<(Vec<u8>, u32)>, Trouble> {
        let mut mapped: Vec<(Vec<u8>, u32)> = Vec::new();
        for (oid, name) in prepared.iter().flat_map(|prepared| &prepared.types) {
            if *oid < FIRST_CUSTOM_OID || mapped.iter().any(|(known, _)| known == name) {
                continue;
            }
            let mut out = Vec::new();
            let question = b"select pg_catalog.to_regtype($1)::pg_catalog.oid";
            frontend::put_parse(&mut out, b"", question, &[0, 0, 0, 25]);
            frontend::put_bind(&mut out, b"", b"", &[Some(name)]);
            frontend::put_execute(&mut out, b"");
            out.extend_from_slice(frontend::SYNC);
            let mut wire = self.wire();
            wire.send(&out).await?;
            let answer = wire.answer(&mut Vec::new()).await?;
            let found = answer
                .rows
                .first()
                .and_then(|row| std::str::from_utf8(row.first()?).ok()?.parse().ok());
            let Some(found) = found else {
                let name = String::from_utf8_lossy(name).into_owned();
                return Err(Trouble::Refused(format!("there is no type {name} on the other side")));
            };
            mapped.push((name.clone(), found));
        }
        Ok(mapped)
    }

    async fn run(&mut self, items: Vec<(String, Vec<u8>)>) -> Result<(), Trouble> {
        // All at once, one round trip; the server's answers are short, and a client that prepared
        // megabytes of statements is sent in pieces.
        for batch in items.chunks(64) {
            let mut wire = self.wire();
            let bytes: Vec<u8> = batch.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
            wire.send(&bytes).await?;
            for (what, _) in batch {
                // A notice about a setting was told to the client when it was set.
                let answer = wire.answer(&mut Vec::new()).await?;
                if let Some(error) = answer.error {
                    return Err(Trouble::Refused(format!("{what}: {error}")));
                }
            }
        }
        Ok(())
    }

    const fn wire(&mut self) -> Wire<'_> {
        Wire {
            stream: &mut self.stream,
            pending: &mut self.pending,
            reported: &mut self.reported,
        }
    }
}

fn types_on_this_side(mapped: &[(Vec<u8>, u32)], oid: u32, name: &[u8]) -> u32 {
    mapped
        .iter()
        .find(|(known, _)| oid >= FIRST_CUSTOM_OID && known == name)
        .map_or(oid, |(_, here)| *here)
}

/// The PREPARE itself: the server remembers the whole Query that it came in, other statements
/// included, and those must not run again.
fn prepare_statement(prepared: &Prepared, lex: LexSettings) -> Option<&[u8]> {
    let name = String::from_utf8_lossy(&prepared.name);
    let script = crate::sql::analyze_as(&prepared.text, lex);
    let statement = script
        .statements
        .iter()
        .rfind(|statement| matches!(&statement.class, Class::Prepare(prepares) if prepares.name == name))?;
    Some(&prepared.text[statement.span.clone()])
}

/// A name as an identifier.
fn quoted(name: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for &byte in name {
        if byte == b'"' {
            out.push(byte);
        }
        out.push(byte);
    }
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_prepare_is_run_again() {
        let prepared = |text: &str| Prepared {
            name: b"p".to_vec(),
            text: text.as_bytes().to_vec(),
            from_sql: true,
            types: Vec::new(),
        };
        let check = |text: &str, expected: Option<&str>| {
            let prepared = prepared(text);
            let found = prepare_statement(&prepared, LexSettings::default());
            assert_eq!(found, expected.map(str::as_bytes), "{text}");
        };
        check("prepare p as select 1", Some("prepare p as select 1"));
        check(
            "drop table t; PREPARE p (int) as select $1; prepare q as select 2",
            Some("PREPARE p (int) as select $1"),
        );
        check("select 1", None);
    }

    #[test]
    fn names_are_quoted() {
        assert_eq!(quoted(b"a\"b"), b"\"a\"\"b\"");
    }
}
