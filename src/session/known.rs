//! The statements and portals of a session that somebody may ask about later: those that may be
//! DDL or say that their transaction only reads, in shadowing phases all of them, and the unnamed one, which no server would tell.

use std::collections::HashMap;
use std::rc::Rc;

use super::sniff::{Sniff, sniff};
use crate::sql::custom_setting_names;
use crate::wire::frontend::{Bind, Named, Parse};

/// A prepared statement, as its Parse gave it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub text: Box<[u8]>,
    pub types: Box<[u8]>,
    pub sniff: Sniff,
}

/// A portal's statement and the values that were bound to it.
#[derive(Debug, Clone)]
pub(super) struct Portal {
    pub statement: Rc<Known>,
    /// Kept where the read is in the shadow's sample.
    pub values: Option<Box<[u8]>>,
}

/// Text of named statements remembered for one session. Beyond it new ones are not: their reads
/// are not shadowed, their DDL is found by the catalog's watch.
const NAMED_BYTES_MAX: usize = 1 << 20;
const PORTALS_MAX: usize = 256;
const CUSTOM_MAX: usize = 64;
/// An unnamed statement's room that an idle session keeps.
const UNNAMED_KEPT: usize = 1024;
/// What a server shows in any case of the statement that it runs (`track_activity_query_size`, if
/// nobody has made that smaller).
const SHOWN_BY_SERVERS: usize = 1000;

#[derive(Debug, Default)]
pub(super) struct Statements {
    named: HashMap<Box<[u8]>, Rc<Known>>,
    named_bytes: usize,
    /// How many of the named ones tell something by being run.
    named_telling: usize,
    /// The unnamed statement's Parse body; empty where there is none.
    unnamed: Vec<u8>,
    unnamed_known: Option<Rc<Known>>,
    portals: HashMap<Box<[u8]>, Portal>,
    /// The Query under way, where it is longer than what a server shows of it.
    long_query: Option<Box<[u8]>>,
    /// By far the most frequent portal.
    unnamed_portal: Option<Portal>,
    custom: Vec<String>,
    settings_noted: u64,
}

impl Statements {
    /// Takes note of a Parse: of what tells something by being run (DDL, BEGIN READ ONLY), and where
    /// asked of all named or unnamed ones.
    pub(super) fn parsed(&mut self, body: &[u8], all_named: bool, all_unnamed: bool) {
        let Some(parse) = Parse::read(body) else { return };
        let sniff = sniff(parse.text);
        if sniff.setting {
            self.note_setting(parse.text);
        }
        let all = if parse.name.is_empty() { all_unnamed } else { all_named };
        let known = (sniff.tells() || all).then(|| {
            Rc::new(Known {
                text: parse.text.into(),
                types: parse.types.into(),
                sniff,
            })
        });
        if parse.name.is_empty() {
            self.unnamed.clear();
            self.unnamed.shrink_to(UNNAMED_KEPT);
            self.unnamed.extend_from_slice(body);
            self.unnamed_known = known;
            return;
        }
        self.forget_named(parse.name);
        if let Some(known) = known
            && self.named_bytes + known.text.len() <= NAMED_BYTES_MAX
        {
            self.named_bytes += known.text.len();
            self.named_telling += usize::from(known.sniff.tells());
            self.named.insert(parse.name.into(), known);
        }
    }

    /// Takes note of a simple Query: it drops the unnamed statement.
    pub(super) fn queried(&mut self, text: &[u8], sniff: Sniff) {
        self.unnamed.clear();
        self.unnamed_known = None;
        self.long_query = (text.len() >= SHOWN_BY_SERVERS).then(|| text.into());
        if sniff.setting {
            self.note_setting(text);
        }
    }

    /// Takes note of a Bind. `all`: of every statement's, not only of what tells something; `sampled`
    /// says whether its values are kept.
    pub(super) fn bound(&mut self, body: &[u8], all: bool, sampled: impl FnOnce(&Known, &[u8]) -> bool) {
        let Some(bind) = Bind::read(body) else { return };
        let statement = self.of_name(bind.statement).cloned();
        let statement = statement.filter(|statement| all || statement.sniff.tells());
        let portal = statement.map(|statement| Portal {
            values: sampled(&statement, bind.values).then(|| bind.values.into()),
            statement,
        });
        if bind.portal.is_empty() {
            self.unnamed_portal = portal;
            return;
        }
        match portal {
            Some(portal) if self.portals.len() < PORTALS_MAX => {
                self.portals.insert(bind.portal.into(), portal);
            }
            _ => {
                self.portals.remove(bind.portal);
            }
        }
    }

    pub(super) fn closed(&mut self, body: &[u8]) {
        match Named::read(body) {
            Some(Named::Statement(b"")) => {
                self.unnamed.clear();
                self.unnamed_known = None;
            }
            Some(Named::Statement(name)) => self.forget_named(name),
            Some(Named::Portal(b"")) => self.unnamed_portal = None,
            Some(Named::Portal(name)) => {
                self.portals.remove(name);
            }
            None => {}
        }
    }

    /// The statement of that name, or the unnamed one, where it is known.
    pub(super) fn of_name(&self, name: &[u8]) -> Option<&Rc<Known>> {
        if name.is_empty() {
            self.unnamed_known.as_ref()
        } else {
            self.named.get(name)
        }
    }

    pub(super) fn named(&self, name: &[u8]) -> Option<&Rc<Known>> {
        self.named.get(name)
    }

    pub(super) fn portal(&self, name: &[u8]) -> Option<&Portal> {
        if name.is_empty() {
            self.unnamed_portal.as_ref()
        } else {
            self.portals.get(name)
        }
    }

    /// A portal's answer has begun to be observed: what its next Execute gives is the rest of it.
    pub(super) fn observed(&mut self, name: &[u8]) {
        let portal = if name.is_empty() {
            self.unnamed_portal.as_mut()
        } else {
            self.portals.get_mut(name)
        };
        if let Some(portal) = portal {
            portal.values = None;
        }
    }

    /// A transaction is over, and its portals with it.
    pub(super) fn transaction_over(&mut self) {
        self.unnamed_portal = None;
        self.long_query = None;
        if !self.portals.is_empty() {
            self.portals = HashMap::new();
        }
    }

    /// Whether Bind, Execute and Close must be looked at: for DDL, and for what transactions say of
    /// themselves.
    pub(super) fn are_telling(&self) -> bool {
        self.named_telling > 0
            || self.unnamed_known.as_ref().is_some_and(|known| known.sniff.tells())
            || self.unnamed_portal.is_some()
            || !self.portals.is_empty()
    }

    /// Whether a Close may concern anything here.
    pub(super) fn any(&self) -> bool {
        !self.named.is_empty() || !self.unnamed.is_empty() || !self.portals.is_empty()
    }

    /// The statements that are known, and may be under way, whose text begins so.
    pub(super) fn beginning_with<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let named = self.named.values().map(|known| &*known.text);
        let unnamed = self.unnamed().map(|parse| parse.text);
        let query = self.long_query.as_deref();
        named
            .chain(unnamed)
            .chain(query)
            .filter(move |text| text.starts_with(prefix))
    }

    /// The unnamed statement's Parse body, where there is one.
    pub(super) fn unnamed(&self) -> Option<Parse<'_>> {
        Parse::read(&self.unnamed)
    }

    /// Names of custom settings that the session may have set.
    pub(super) fn custom(&self) -> &[String] {
        &self.custom
    }

    /// How many texts have come that may set something.
    pub(super) const fn settings_noted(&self) -> u64 {
        self.settings_noted
    }

    fn note_setting(&mut self, text: &[u8]) {
        self.settings_noted += 1;
        for name in custom_setting_names(text) {
            if self.custom.len() < CUSTOM_MAX && !self.custom.contains(&name) {
                self.custom.push(name);
            }
        }
    }

    fn forget_named(&mut self, name: &[u8]) {
        if let Some(known) = self.named.remove(name) {
            self.named_bytes -= known.text.len();
            self.named_telling -= usize::from(known.sniff.tells());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::HEADER_LEN;
    use crate::wire::frontend::{put_bind, put_parse};

    fn parse(statements: &mut Statements, name: &str, text: &str) {
        let mut frame = Vec::new();
        put_parse(&mut frame, name.as_bytes(), text.as_bytes(), &[]);
        statements.parsed(&frame[HEADER_LEN..], false, false);
    }

    fn bind(statements: &mut Statements, portal: &str, name: &str) {
        let mut frame = Vec::new();
        put_bind(&mut frame, portal.as_bytes(), name.as_bytes(), &[]);
        statements.bound(&frame[HEADER_LEN..], false, |_, _| false);
    }

    #[test]
    fn ddl_is_found_again_through_its_portal() {
        let mut statements = Statements::default();
        parse(&mut statements, "a", "select 1");
        assert!(!statements.are_telling());
        parse(&mut statements, "b", "create table t()");
        assert!(statements.are_telling());
        bind(&mut statements, "", "a");
        assert!(statements.portal(b"").is_none());
        bind(&mut statements, "", "b");
        assert_eq!(&*statements.portal(b"").unwrap().statement.text, b"create table t()");
        bind(&mut statements, "", "a");
        assert!(statements.portal(b"").is_none());
        statements.closed(b"Sb\0");
        assert!(!statements.are_telling());
    }

    #[test]
    fn the_unnamed_statement_lives_until_the_next_query() {
        let mut statements = Statements::default();
        parse(&mut statements, "", "select 1");
        assert_eq!(statements.unnamed().unwrap().text, b"select 1");
        statements.queried(b"select 2", sniff(b"select 2"));
        assert_eq!(statements.unnamed(), None);
    }
}
