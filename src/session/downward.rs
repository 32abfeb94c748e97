//! What becomes of each frame of the server's, decided as it passes.

use super::acknowledge::Verdict;
use super::canary;
use super::outbox::Gather;
use super::registry::lock;
use super::relay::{End, Session};
use crate::wire::backend;
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::tracker::Owner;

/// Longer frames than this are not waited for; nothing that must be understood is as long.
const UNDERSTOOD_MAX: usize = 1 << 20;

impl Session {
    /// Goes through a chunk; returns how much of it was used.
    pub(super) fn server_frames(&mut self, gather: &mut Gather<'_>) -> Result<usize, End> {
        let chunk = gather.chunk();
        let mut at = 0;
        while at < chunk.len() {
            let rest = &chunk[at..];
            if !self.down.framer.at_boundary() {
                let taken = self.down.framer.rest(rest.len());
                if let Some(attention) = &mut self.attention {
                    attention.piece(&rest[..taken], self.down.framer.at_boundary());
                }
                if !self.skips_answers() {
                    gather.keep(at..at + taken);
                }
                at += taken;
                continue;
            }
            let header = match Header::backend(rest) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(_) => return Err(End::ServerGone("the server sent what is not a message".into())),
            };
            if rest.len() < header.total && self.waits_for(header) {
                break;
            }
            let said = if self.acknowledging.is_some() {
                match self.acknowledge(header, rest, gather)? {
                    Verdict::Stay => break,
                    verdict => verdict == Verdict::Pass,
                }
            } else {
                true
            };
            let body = &rest[HEADER_LEN..header.total.min(rest.len())];
            let said = if self.on_secondary() {
                let frame = &rest[..header.total.min(rest.len())];
                self.canary_frame(header.kind, body, frame, gather)? == canary::Verdict::Pass && said
            } else {
                said
            };
            let keep = if self.attention.is_some() {
                let whole = rest.len() >= header.total;
                self.attend(header.kind, body, whole, gather)
            } else {
                // Rows and COPY data are nobody's last reply.
                if !matches!(header.kind, b'D' | b'd') {
                    self.tracker.received(header.kind, body);
                }
                true
            };
            match header.kind {
                b'S' if said => self.parameter_changed(body),
                b'E' => {
                    self.note_primary_error();
                    self.server_fatal |= backend::is_fatal(body);
                    self.shadowing.failed();
                    self.rehearsal_failed();
                }
                _ => {}
            }
            let taken = self.down.framer.pass(header, rest.len());
            if keep && said {
                gather.keep(at..at + taken);
            }
            at += taken;
            if header.kind == b'Z' {
                self.note_primary_ready();
                self.ready();
            }
        }
        Ok(at)
    }

    /// Whether a frame must lie here as a whole before anything is done with it.
    fn waits_for(&self, header: Header) -> bool {
        if header.total > UNDERSTOOD_MAX {
            return false;
        }
        match header.kind {
            // Read; and what comes unasked must not be cut in two by a flip.
            b'Z' | b'S' | b'E' | b'N' | b'A' => true,
            // Rows pass as they come, unless they answer the proxy itself.
            b'D' | b'd' => {
                self.attention.is_some() && self.tracker.front().is_some_and(|front| front.owner == Owner::Hook)
            }
            // May be held back or dropped.
            _ => self.attention.is_some() || self.on_secondary(),
        }
    }

    fn parameter_changed(&mut self, body: &[u8]) {
        if let Some((name, value)) = backend::parameter(body) {
            if name == b"application_name" {
                *lock(&self.registered.shared.application) = String::from_utf8_lossy(value).into_owned();
            }
            self.reported.set(name, value);
            self.lex = self.reported.lex();
        }
    }
}
