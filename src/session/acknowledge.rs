//! `writes.acknowledge: both`: a commit's answer is withheld until a round that began after it has
//! been applied.
//!
//! The commit's answer is the `CommandComplete` of COMMIT, or of the last statement before a Sync
//! or the end of a simple Query (some clients wait for no more), or else the ReadyForQuery that ends
//! an implicit transaction. It lies unread in
//! `down.pending` meanwhile, with all that follows it; the client may go on sending.

use std::task::{Context as TaskContext, Poll};

use super::hooks::{Acknowledge, Applied};
use super::outbox::Gather;
use super::relay::{End, Session};
use crate::wire::backend::Status;
use crate::wire::error::{Severity, SqlError, sqlstate};
use crate::wire::frame::{HEADER_LEN, Header};

/// Where a transaction that may have written stands.
pub(super) struct Acknowledging(Stage);

enum Stage {
    /// Its commit has not been answered yet.
    Open,
    /// The answer waits.
    Waiting(Applied),
    /// The answer may pass.
    Applied,
    /// Nothing was committed, or it has been said already: ReadyForQuery is no news.
    Said,
    /// The client hears this instead.
    Late(String),
    /// The client has heard an error: nothing passes up to ReadyForQuery.
    Skipping,
}

/// What becomes of a server's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Drop,
    /// It stays unread: more bytes, or the round, must come first.
    Stay,
}

/// What a frame says about the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    Committed,
    /// Rolled back, or failed.
    Undone,
    /// The transaction goes on.
    StillOpen,
    /// At any moment, and about something else.
    Aside,
    Nothing,
    /// Cannot be told before more bytes have come.
    Unknown,
}

/// Reads a whole frame; `behind` are the bytes that follow it, `more_comes` says that the server
/// sends some in any case.
fn news(kind: u8, body: &[u8], behind: &[u8], more_comes: bool) -> News {
    match kind {
        b'Z' if Status::read(body) == Status::Idle => News::Committed,
        b'Z' => News::StillOpen,
        b'E' => News::Undone,
        b'N' | b'S' | b'A' => News::Aside,
        b'C' if body.starts_with(b"COMMIT") => News::Committed,
        // Of a savepoint or of all: ReadyForQuery says which.
        b'C' if body.starts_with(b"ROLLBACK\0") => News::Undone,
        b'C' if more_comes => match behind {
            [b'Z', _, _, _, _, status, ..] if Status::read(&[*status]) == Status::Idle => News::Committed,
            [b'Z', ..] if behind.len() < HEADER_LEN + 1 => News::Unknown,
            [] => News::Unknown,
            _ => News::Nothing,
        },
        _ => News::Nothing,
    }
}

impl Session {
    /// The hook, where commits wait for both sides now.
    pub(super) fn acknowledges_both(&self) -> Option<&dyn Acknowledge> {
        let hook = self.context.hooks.acknowledge.as_deref()?;
        (self.control.phase.mirrors() && hook.wanted()).then_some(hook)
    }

    /// A statement is about to be sent. `None`: it is not known.
    pub(super) fn note_write(&mut self, text: Option<&[u8]>) {
        let Some(hook) = self.acknowledges_both() else { return };
        let may_write = text.is_none_or(|text| {
            let script = self.context.hooks.statements.get_as(text, self.lex);
            hook.may_write(&self.pair.name, &script)
        });
        if !may_write {
            return;
        }
        self.tracker.next_may_write();
        if self.acknowledging.is_none() {
            self.acknowledging = Some(Box::new(Acknowledging(Stage::Open)));
        }
    }

    /// Whether pieces of a long frame are kept from the client, too.
    pub(super) fn skips_answers(&self) -> bool {
        matches!(self.acknowledging.as_deref(), Some(Acknowledging(Stage::Skipping)))
    }

    /// Ready when no answer waits for a round.
    pub(super) fn poll_applied(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        let Some(acknowledging) = &mut self.acknowledging else {
            return Poll::Ready(());
        };
        let Stage::Waiting(applied) = &mut acknowledging.0 else {
            return Poll::Ready(());
        };
        let Poll::Ready(outcome) = applied.as_mut().poll(cx) else {
            return Poll::Pending;
        };
        acknowledging.0 = match outcome {
            Ok(()) => Stage::Applied,
            Err(why) => Stage::Late(why),
        };
        // What lies there is looked at again.
        self.down.blocked = true;
        Poll::Ready(())
    }

    /// Looks at a server's frame of a transaction that may have written. `rest` begins with it.
    pub(super) fn acknowledge(&mut self, header: Header, rest: &[u8], gather: &mut Gather<'_>) -> Result<Verdict, End> {
        let Some(Acknowledging(stage)) = self.acknowledging.as_deref_mut() else {
            return Ok(Verdict::Pass);
        };
        if !matches!(header.kind, b'Z' | b'C' | b'E' | b'N' | b'S' | b'A') {
            // Rows and the like. After the answer to a commit they are another transaction's.
            return Ok(match stage {
                Stage::Skipping => Verdict::Drop,
                Stage::Said => {
                    *stage = Stage::Open;
                    Verdict::Pass
                }
                _ => Verdict::Pass,
            });
        }
        if rest.len() < header.total {
            return Ok(Verdict::Stay);
        }
        let (body, behind) = (&rest[HEADER_LEN..header.total], &rest[header.total..]);
        let news = news(header.kind, body, behind, self.tracker.ready_follows());
        let is_ready = header.kind == b'Z';
        match (&*stage, news) {
            (_, News::Aside) => return Ok(Verdict::Pass),
            (_, News::Unknown) => return Ok(Verdict::Stay),
            (Stage::Late(_), _) => {
                let Stage::Late(why) = std::mem::replace(stage, Stage::Skipping) else {
                    return Ok(Verdict::Pass);
                };
                gather.insert().extend_from_slice(&late(why).to_frame());
                if !is_ready {
                    return Ok(Verdict::Drop);
                }
            }
            (Stage::Skipping, _) if !is_ready => return Ok(Verdict::Drop),
            (Stage::Applied, _) if !is_ready => {
                *stage = Stage::Said;
                return Ok(Verdict::Pass);
            }
            (Stage::Open, News::Committed) => return Ok(self.wait_for_round()),
            // Another commit, behind the one that has been answered.
            (Stage::Said, News::Committed) if !is_ready => return Ok(self.wait_for_round()),
            (_, News::StillOpen) => {
                *stage = Stage::Open;
                return Ok(Verdict::Pass);
            }
            (_, News::Undone) => *stage = Stage::Said,
            (Stage::Said, News::Nothing) => *stage = Stage::Open,
            _ => {}
        }
        if is_ready {
            // What was pipelined behind it may have written, too.
            self.acknowledging = self
                .tracker
                .writes_beyond_ready()
                .then(|| Box::new(Acknowledging(Stage::Open)));
        }
        Ok(Verdict::Pass)
    }

    fn wait_for_round(&mut self) -> Verdict {
        let applied = self.acknowledges_both().map(|hook| hook.applied(&self.pair.name));
        match (applied, self.acknowledging.as_deref_mut()) {
            (Some(applied), Some(acknowledging)) => {
                acknowledging.0 = Stage::Waiting(applied);
                Verdict::Stay
            }
            // Switched off meanwhile.
            _ => {
                self.acknowledging = None;
                Verdict::Pass
            }
        }
    }
}

/// No class that a client would take for a reason to try the transaction again.
fn late(why: String) -> SqlError {
    SqlError {
        severity: Severity::Error,
        sqlstate: sqlstate::SYSTEM_ERROR,
        message: format!("the transaction is committed on the primary, but {why}"),
        hint: Some("Do not run it again: it is mirrored as soon as the secondary follows.".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_frame_says_of_the_commit() {
        const IDLE: &[u8] = b"Z\0\0\0\x05I";
        const OPEN: &[u8] = b"Z\0\0\0\x05T";
        for (kind, body, behind, more_comes, expected) in [
            (b'Z', &b"I"[..], &b""[..], false, News::Committed),
            (b'Z', b"T", b"", false, News::StillOpen),
            (b'Z', b"E", b"", true, News::StillOpen),
            (b'C', b"COMMIT\0", b"", false, News::Committed),
            (b'C', b"COMMIT PREPARED\0", b"", true, News::Committed),
            (b'C', b"ROLLBACK\0", b"", false, News::Undone),
            (b'C', b"INSERT 0 1\0", IDLE, true, News::Committed),
            (b'C', b"INSERT 0 1\0", OPEN, true, News::Nothing),
            (b'C', b"INSERT 0 1\0", b"T\0\0\0\x05", true, News::Nothing),
            (b'C', b"INSERT 0 1\0", b"", true, News::Unknown),
            (b'C', b"INSERT 0 1\0", b"Z\0\0\0\x05", true, News::Unknown),
            // Without its Sync it is not committed, and nothing may follow.
            (b'C', b"INSERT 0 1\0", b"", false, News::Nothing),
            (b'E', b"\0", b"", true, News::Undone),
            (b'A', b"", b"", true, News::Aside),
        ] {
            assert_eq!(
                news(kind, body, behind, more_comes),
                expected,
                "{kind} {body:?} {behind:?}"
            );
        }
    }
}
