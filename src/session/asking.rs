//! Questions that the proxy asks a server on its own account, over a connection that is a client's:
//! by extended messages under a name of our own, since a simple Query would drop the client's
//! unnamed statement. What comes unasked meanwhile (notifications, notices) goes to the client.

use std::future::poll_fn;
use std::time::Duration;

use super::relay::{End, Session};
use super::reported::Reported;
use super::state::FIRST_CUSTOM_OID;
use crate::upstream::Stream;
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::{backend, frontend, put_frame};

/// A server that answers these questions at all does so in milliseconds.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const CARRY_NAME: &[u8] = b"pgtandem_carry";

/// Why a question was not answered.
pub(super) enum Trouble {
    Gone(String),
    Refused(String),
}

/// Waits so long for what a server is asked; one that does not answer is as good as gone.
pub(super) async fn within<T>(limit: Duration, asking: impl Future<Output = Result<T, Trouble>>) -> Result<T, Trouble> {
    let silent = |_| Trouble::Gone(format!("no answer within {limit:?} to a question of the proxy's"));
    tokio::time::timeout(limit, asking).await.map_err(silent)?
}

/// Waits for what the session's own server is asked, for as long as one takes that answers at all.
/// The inner error is its refusal.
///
/// # Errors
/// The server is gone.
pub(super) async fn in_time<T>(asking: impl Future<Output = Result<T, Trouble>>) -> Result<Result<T, String>, End> {
    match within(ANSWER_TIMEOUT, asking).await {
        Ok(answer) => Ok(Ok(answer)),
        Err(Trouble::Refused(reason)) => Ok(Err(reason)),
        Err(Trouble::Gone(cause)) => Err(End::ServerGone(cause)),
    }
}

/// What was learned by asking something whose answer is for nobody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// Some described column is of a user-defined type.
    pub custom_types: bool,
}

/// Whether a RowDescription tells of types that the other side calls otherwise.
pub(super) fn has_custom_types(description: &[u8]) -> bool {
    backend::column_types(description).any(|oid| oid >= FIRST_CUSTOM_OID)
}

pub(super) async fn ask(
    mut wire: Wire<'_>,
    frames: &[u8],
    ready: usize,
    unasked: &mut Vec<u8>,
) -> Result<Asked, Trouble> {
    wire.send(frames).await?;
    let mut asked = Asked { custom_types: false };
    for _ in 0..ready {
        // An error comes up again where it matters.
        asked.custom_types |= wire.answer(unasked).await?.custom_types;
    }
    Ok(asked)
}

/// An answer up to its ReadyForQuery.
#[derive(Default)]
pub(super) struct Answer {
    /// Nulls are empty.
    pub rows: Vec<Vec<Vec<u8>>>,
    pub error: Option<String>,
    custom_types: bool,
}

/// A connection that is asked something by the proxy.
pub(super) struct Wire<'a> {
    pub stream: &'a mut Stream,
    pub pending: &'a mut Vec<u8>,
    pub reported: &'a mut Reported,
}

impl Wire<'_> {
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|error| Trouble::Gone(error.to_string()))
    }

    /// Reads one answer; what is for the client goes to `unasked`.
    pub(super) async fn answer(&mut self, unasked: &mut Vec<u8>) -> Result<Answer, Trouble> {
        let mut answer = Answer::default();
        loop {
            let (kind, body) = self.frame().await?;
            match kind {
                b'D' => {
                    let row = backend::columns(&body).map(|column| column.unwrap_or_default().to_vec());
                    answer.rows.push(row.collect());
                }
                b'E' if backend::is_fatal(&body) => return Err(Trouble::Gone(backend::error_text(&body))),
                b'T' => answer.custom_types |= has_custom_types(&body),
                b'E' => answer.error = Some(backend::error_text(&body)),
                b'N' | b'A' => put_frame(unasked, kind, |out| out.extend_from_slice(&body)),
                b'S' => {
                    if let Some((name, value)) = backend::parameter(&body) {
                        self.reported.set(name, value);
                    }
                    put_frame(unasked, kind, |out| out.extend_from_slice(&body));
                }
                b'Z' => return Ok(answer),
                _ => {}
            }
        }
    }

    async fn frame(&mut self) -> Result<(u8, Vec<u8>), Trouble> {
        loop {
            let header = Header::backend(self.pending).map_err(|error| Trouble::Gone(error.to_string()))?;
            if let Some(header) = header
                && self.pending.len() >= header.total
            {
                let body = self.pending[HEADER_LEN..header.total].to_vec();
                self.pending.drain(..header.total);
                if self.pending.is_empty() {
                    *self.pending = Vec::new();
                }
                return Ok((header.kind, body));
            }
            let mut buffer = [0; 4096];
            match poll_fn(|cx| self.stream.poll_read(cx, &mut buffer)).await {
                Ok(0) => return Err(Trouble::Gone("the server closed the connection".into())),
                Ok(read) => self.pending.extend_from_slice(&buffer[..read]),
                Err(error) => return Err(Trouble::Gone(error.to_string())),
            }
        }
    }
}

impl Session {
    /// Has the server that is in use answer frames with so many ReadyForQuery at their end.
    pub(super) async fn ask_server(&mut self, frames: &[u8], ready: usize) -> Result<Asked, Trouble> {
        let (mut unheard, mut aside) = (Vec::new(), self.reported.clone());
        let secondary = self.on_secondary();
        let wire = Wire {
            stream: &mut self.server,
            pending: &mut self.down.pending,
            reported: if secondary { &mut aside } else { &mut self.reported },
        };
        let unasked = if secondary {
            &mut unheard
        } else {
            self.down.outbox.bytes()
        };
        ask(wire, frames, ready, unasked).await
    }

    /// Asks the server that the session is on, over its own connection.
    pub(super) async fn ask(
        &mut self,
        question: &str,
        parameters: &[Option<&[u8]>],
    ) -> Result<Vec<Vec<Vec<u8>>>, Trouble> {
        let mut out = Vec::new();
        frontend::put_parse(&mut out, CARRY_NAME, question.as_bytes(), &[]);
        frontend::put_bind(&mut out, CARRY_NAME, CARRY_NAME, parameters);
        frontend::put_execute(&mut out, CARRY_NAME);
        frontend::put_close_portal(&mut out, CARRY_NAME);
        frontend::put_close_statement(&mut out, CARRY_NAME);
        out.extend_from_slice(frontend::SYNC);
        let answer = self.exchange(&out).await?;
        match answer.error {
            Some(error) => Err(Trouble::Refused(format!("read the session's state: {error}"))),
            None => Ok(answer.rows),
        }
    }

    pub(super) async fn exchange(&mut self, bytes: &[u8]) -> Result<Answer, Trouble> {
        let mut wire = Wire {
            stream: &mut self.server,
            pending: &mut self.down.pending,
            reported: &mut self.reported,
        };
        wire.send(bytes).await?;
        wire.answer(self.down.outbox.bytes()).await
    }
}
