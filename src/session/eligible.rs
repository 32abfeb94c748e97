//! What a batch of the client's asks for, and whether the secondary may answer it.

use xxhash_rust::xxh3::xxh3_64;

use super::batch::Batch;
use super::canary::Plan;
use super::hooks::{Asked, CanaryRead};
use super::relay::Session;
use crate::sql::{Class, SetWhat, TransactionControl};
use crate::wire::frontend::{self, Bind, Named, Parse};

/// One Execute of a batch, or its Query.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub text: &'a [u8],
    values: &'a [u8],
}

pub(super) struct Asks<'a> {
    len: usize,
    pub texts: Vec<Ask<'a>>,
    names: Vec<Box<[u8]>>,
    unnamed: bool,
}

impl Asks<'_> {
    fn plan(self, begins: bool, reads: bool) -> Plan {
        Plan {
            len: self.len,
            text: self.texts.first().map_or(&[][..], |ask| ask.text).into(),
            names: self.names,
            unnamed: self.unnamed,
            begins,
            reads,
        }
    }
}

impl Session {
    fn asked<'a>(&'a self, text: &'a [u8], values: &'a [u8]) -> Asked<'a> {
        Asked {
            database: &self.pair.name,
            user: &self.login.user,
            application: &self.registered.shared.application,
            text,
            values,
        }
    }

    pub(super) fn plan_canary(&self, batch: &Batch<'_>) -> Option<Plan> {
        let hook = self.canary_hook()?;
        let asks = self.asks(batch, false)?;
        let first = asks.texts.first()?;
        let canary = self.canary.as_ref()?;
        if !canary.unfit.is_empty() && canary.unfit.contains(&xxh3_64(first.text)) {
            return None;
        }
        let script = self.context.hooks.statements.get_as(first.text, self.lex);
        let begins = match script.single().map(|statement| &statement.class) {
            Some(Class::Read(_) | Class::CopyTo(_)) => {
                let read = self.canary_read(first.text, &script);
                if !hook.chooses(&self.asked(first.text, first.values), &read) {
                    return None;
                }
                false
            }
            Some(Class::Transaction(TransactionControl::Begin { read_only }))
                if *read_only || self.reads_by_default(first.text) =>
            {
                let session = self.registered.shared.id.0;
                let drawn = xxh3_64(&[session.to_be_bytes(), self.transactions.to_be_bytes()].concat());
                if !hook.chooses_transaction(&self.asked(first.text, &[]), drawn) {
                    return None;
                }
                true
            }
            _ => return None,
        };
        let others = &asks.texts[1..];
        let served = others.iter().all(|other| self.servable(other.text, begins).is_some());
        let reads = !begins || others.iter().any(|other| self.servable(other.text, true) == Some(true));
        served.then(|| asks.plan(begins, reads))
    }

    /// BEGIN without a word about it, where transactions only read unless they say otherwise.
    fn reads_by_default(&self, begin: &[u8]) -> bool {
        self.reported.get(b"default_transaction_read_only") == Some(b"on")
            && !begin.to_ascii_lowercase().windows(5).any(|word| word == b"write")
    }

    pub(super) fn plan_inside(&self, batch: &Batch<'_>) -> Option<Plan> {
        let asks = self.asks(batch, true)?;
        let mut reads = false;
        for ask in &asks.texts {
            reads |= self.servable(ask.text, true)?;
        }
        Some(asks.plan(false, reads))
    }

    fn canary_read<'a>(&'a self, text: &'a [u8], script: &'a crate::sql::Script) -> CanaryRead<'a> {
        CanaryRead {
            database: &self.pair.name,
            text,
            script,
            temporary: &self.shadowing.temporary,
        }
    }

    /// Whether the secondary can run a statement; `Some(true)` where it gives an answer that binds
    /// a transaction to its side.
    fn servable(&self, text: &[u8], inside: bool) -> Option<bool> {
        let hook = self.context.hooks.canary.as_deref()?;
        let script = self.context.hooks.statements.get_as(text, self.lex);
        if script.statements.is_empty() {
            return (!script.unterminated).then_some(false);
        }
        let class = &script.single()?.class;
        match class {
            Class::Read(_) | Class::CopyTo(_) => {
                hook.servable(&self.canary_read(text, &script), inside).then_some(true)
            }
            _ if !inside => None,
            Class::Transaction(
                TransactionControl::Commit { .. }
                | TransactionControl::Rollback { .. }
                | TransactionControl::Savepoint
                | TransactionControl::Release
                | TransactionControl::RollbackTo,
            ) => Some(false),
            Class::Set(set) if set.local => match &set.what {
                SetWhat::Setting(name) => (name != "transaction_read_only").then_some(false),
                SetWhat::Transaction { read_write } => (!read_write).then_some(false),
                SetWhat::Constraints | SetWhat::Role => Some(false),
                SetWhat::SessionAuthorization | SetWhat::SessionCharacteristics => None,
            },
            Class::Show => Some(false),
            Class::Declare(declare) if !declare.hold => {
                let query = self.context.hooks.statements.get_as(&declare.query, self.lex);
                hook.servable(&self.canary_read(&declare.query, &query), true)
                    .then_some(true)
            }
            Class::Fetch(_) | Class::Close(_) => Some(true),
            _ => None,
        }
    }

    /// What a batch runs, and what it needs for that; `None` where it holds what is not understood.
    /// `inside` a transaction that the secondary runs, portals of earlier batches are there.
    pub(super) fn asks<'a>(&'a self, batch: &Batch<'a>, inside: bool) -> Option<Asks<'a>> {
        match batch {
            Batch::Query { len, text } => {
                let texts = vec![Ask { text, values: &[] }];
                Some(Asks {
                    len: *len,
                    texts,
                    names: Vec::new(),
                    unnamed: false,
                })
            }
            Batch::Extended { len, frames } => {
                let mut asks = Asks {
                    len: *len,
                    texts: Vec::new(),
                    names: Vec::new(),
                    unnamed: false,
                };
                self.read_frames(frames, inside, &mut asks)?;
                Some(asks)
            }
            Batch::More | Batch::Other => None,
        }
    }

    fn read_frames<'a>(&'a self, frames: &[(u8, &'a [u8])], inside: bool, asks: &mut Asks<'a>) -> Option<()> {
        let mut parsed: Vec<Parse<'a>> = Vec::new();
        let mut bound: Vec<(&'a [u8], Ask<'a>)> = Vec::new();
        for &(kind, body) in frames {
            match kind {
                b'P' => {
                    let parse = Parse::read(body)?;
                    self.same_types(parse.types)?;
                    parsed.push(parse);
                }
                b'B' => {
                    let bind = Bind::read(body)?;
                    let text = self.statement_text(bind.statement, &parsed, asks)?;
                    let ask = Ask {
                        text,
                        values: bind.values,
                    };
                    bound.push((bind.portal, ask));
                }
                b'D' => match Named::read(body)? {
                    Named::Statement(name) => {
                        self.statement_text(name, &parsed, asks)?;
                    }
                    Named::Portal(name) => self.portal_text(name, &bound, inside).map(|_| ())?,
                },
                b'E' => {
                    let portal = frontend::execute_portal(body)?;
                    asks.texts.push(self.portal_text(portal, &bound, inside)?);
                }
                b'C' => {
                    Named::read(body)?;
                }
                _ => return None,
            }
        }
        Some(())
    }

    /// Frames go as they are, so the types must be called the same on both sides.
    fn same_types(&self, types: &[u8]) -> Option<()> {
        let hook = self.context.hooks.canary.as_deref()?;
        (types.is_empty() || hook.types(&self.pair.name, types).is_some_and(|there| there == types)).then_some(())
    }

    fn statement_text<'a>(&'a self, name: &[u8], parsed: &[Parse<'a>], asks: &mut Asks<'a>) -> Option<&'a [u8]> {
        if let Some(parse) = parsed.iter().rfind(|parse| parse.name == name) {
            return Some(parse.text);
        }
        if name.is_empty() {
            let unnamed = self.statements.unnamed()?;
            self.same_types(unnamed.types)?;
            asks.unnamed = true;
            return Some(unnamed.text);
        }
        let known = self.statements.named(name)?;
        self.same_types(&known.types)?;
        asks.names.push(name.into());
        Some(&known.text)
    }

    fn portal_text<'a>(&'a self, name: &[u8], bound: &[(&'a [u8], Ask<'a>)], inside: bool) -> Option<Ask<'a>> {
        if let Some((_, ask)) = bound.iter().rfind(|(portal, _)| *portal == name) {
            return Some(*ask);
        }
        let portal = self.statements.portal(name).filter(|_| inside)?;
        Some(Ask {
            text: &portal.statement.text,
            values: &[],
        })
    }
}
