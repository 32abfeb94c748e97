//! COMMIT PREPARED and ROLLBACK PREPARED during a hold.
//!
//! They begin no transaction, they end one: one that may have written, and whose locks the flip's
//! fence waits for. Held like the beginning of a transaction, they would wait for the flip and the
//! flip for them, until its deadline. So they pass, and nobody waits for them but the fence; the
//! session moves afterwards, as after a read (`reading.rs`). Under the fence no prepared transaction is
//! left, whether it wrote anything or not.

use super::registry::State;
use super::relay::Session;
use super::sniff::sniff;
use super::upward::Frame;
use crate::wire::frontend::{self, Bind, Parse};

impl Session {
    /// Whether what a session begins with is nothing but the end of a prepared transaction.
    pub(super) fn ends_prepared(&self, first: Frame<'_>) -> bool {
        let ends = |text: &[u8]| sniff(text).ends_prepared;
        match first.kind {
            b'Q' => frontend::query_text(first.body).is_some_and(ends),
            b'P' => Parse::read(first.body).is_some_and(|parse| ends(parse.text)),
            b'B' => Bind::read(first.body)
                .and_then(|bind| self.statements.of_name(bind.statement))
                .is_some_and(|known| known.sniff.ends_prepared),
            _ => false,
        }
    }

    /// Begins it where the session is; what follows it waits for the end of the hold.
    pub(super) fn pass_through_hold(&mut self) {
        self.active = true;
        self.reading = true;
        self.transactions += 1;
        self.registered.shared.publish(State::Reading);
        self.registered.registry.came_to_rest();
    }
}
