//! Canary reads: which of a client's batches the secondary answers, and what is done with its
//! frames.
//!
//! ```text
//! idle ── a batch of reads, chosen ──▶ turn ──▶ the lanes are swapped ── answer ──▶ swapped back
//!           │ or BEGIN READ ONLY        │                                   │
//!           └ else: the primary         └ no connection, writes not there   └ an error, or the connection
//!                                         yet: the primary                    broke: the primary is asked
//! ```
//! The session has two lanes, of which the relay uses one: while a read runs on the secondary, the
//! server's socket *is* the secondary's, and cancel requests, holds and shadow reads find it like
//! any other. Lanes are swapped only where nothing is outstanding and no transaction is open, so
//! none ever spans both. What needs time (opening, settings, waiting for the session's own writes)
//! is done in [`turn`](super::turn), before anything has been sent.
//!
//! Up to the first row the answer's frames are held back: if it turns out to be an error, or to go no
//! further, the client hears the primary's answer instead, and none of this.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use tokio::time::{Duration, Instant};

use super::asking::has_custom_types;
use super::batch::Batch;
use super::eligible::Ask;
use super::hooks::{Applied, Canary as Hook};
use super::known::Known;
use super::observe::Observation;
use super::outbox::Gather;
use super::relay::{End, Session};
use super::standby::Standby;
use super::state::State;
use crate::shadow::{CanaryEvent, Fallback};
use crate::sql::Class;
use crate::wire::backend;
use crate::wire::frontend::{Named, Parse};

/// Frames that are held back; an answer with more in front of its first row is let go.
const HELD_BYTES_MAX: usize = 256 * 1024;

/// What a session keeps for canary reads, while they are on.
pub(super) struct Canary {
    /// The lane that is not in use: of the secondary, or while a read runs there, of the primary.
    pub lane: Option<Box<Standby>>,
    pub on_secondary: bool,
    /// What the secondary's lane was brought to.
    pub state: Option<State>,
    /// The session's settings may have changed since.
    pub dirty: bool,
    /// Statements that were parsed on the secondary's lane.
    pub named: HashMap<Box<[u8]>, Rc<Known>>,
    /// Parse and Close frames of the client's that the primary has not seen.
    pub owed: Vec<u8>,
    pub owes_unnamed: bool,
    /// The session has written, and the secondary may not have it yet.
    pub behind: Option<Behind>,
    /// After a failure the secondary is left alone until then.
    pub not_before: Option<Instant>,
    /// What is to be done before the next batch goes out.
    pub turn: Option<Turn>,
    pub batch: Running,
    /// The read-only transaction that the secondary runs.
    pub transaction: Option<Transaction>,
    /// The transaction that the secondary ran is lost, and the client has not heard of it.
    pub lost: bool,
    /// The primary is asked what the secondary gave an error for.
    pub retrying: Option<Retrying>,
    /// Hashes of texts whose rows the client would not understand.
    pub unfit: HashSet<u64>,
}

pub(super) struct Behind {
    /// A round that began after the writes.
    pub arrived: Option<Applied>,
    /// How long reads have waited for it.
    pub waited: Duration,
}

pub(super) enum Turn {
    /// The primary first hears what it has not been told.
    PayBack,
    /// To the secondary.
    Divert(Plan),
    /// More of a transaction there, with statements that are not there yet.
    Serve(Plan),
    /// The transaction asks for what the secondary cannot do.
    Leave(usize),
    /// The secondary has failed at what was asked: the primary is asked.
    Retry,
    /// The transaction was lost between two batches: this one is answered by that.
    Tell(usize),
}

/// A batch that the secondary is to answer.
pub(super) struct Plan {
    pub len: usize,
    /// The first read, or the BEGIN.
    pub text: Box<[u8]>,
    /// Named statements that it uses.
    pub names: Vec<Box<[u8]>>,
    /// It uses the unnamed statement of a batch before it.
    pub unnamed: bool,
    pub begins: bool,
    /// It holds more than transaction control and settings.
    pub reads: bool,
}

/// The batch that the secondary is answering.
#[derive(Default)]
pub(super) struct Running {
    /// Its bytes, for the primary, should that have to answer.
    pub bytes: Vec<u8>,
    /// How much of it has not gone out.
    pub left: usize,
    pub text: Box<[u8]>,
    pub reads: bool,
    /// Nothing of the answer has been passed on.
    pub holding: bool,
    pub held: Vec<u8>,
    /// The secondary gave an error, up to whose ReadyForQuery nothing passes.
    pub failing: bool,
    /// What it fails at is only that its rows are of types that the client knows otherwise.
    pub unfit: bool,
    /// What was owed to the primary before it.
    pub owed: usize,
    /// Requests to cancel that the session had been sent when it began.
    pub cancels: u32,
}

#[derive(Default)]
pub(super) struct Transaction {
    /// A read has been answered: the transaction is bound to its side.
    pub served: bool,
    /// The batches before that.
    pub answered: Vec<u8>,
    /// What was owed to the primary before them.
    pub owed: usize,
}

pub(super) struct Retrying {
    pub text: Box<[u8]>,
    pub failed: bool,
}

impl Default for Canary {
    fn default() -> Self {
        Self {
            lane: None,
            on_secondary: false,
            state: None,
            // What happened before is not known.
            dirty: true,
            named: HashMap::new(),
            owed: Vec::new(),
            owes_unnamed: false,
            behind: Some(Behind::now()),
            not_before: None,
            turn: None,
            batch: Running::default(),
            transaction: None,
            lost: false,
            retrying: None,
            unfit: HashSet::new(),
        }
    }
}

impl Behind {
    pub(super) const fn now() -> Self {
        Self {
            arrived: None,
            waited: Duration::ZERO,
        }
    }
}

impl Canary {
    /// Something is under way that has not been sent, or will be sent again.
    pub(super) const fn busy(&self) -> bool {
        self.turn.is_some() || self.batch.left > 0 || self.batch.failing
    }

    /// The secondary's lane is as good as gone.
    pub(super) fn forget_secondary(&mut self) {
        self.state = None;
        self.named.clear();
    }

    pub(super) fn run(&mut self, batch: Running) {
        self.batch = Running {
            owed: self.owed.len(),
            ..batch
        };
    }

    /// The session may have written, or changed what a session has.
    fn wrote(&mut self) {
        self.dirty = true;
        self.behind = Some(Behind::now());
    }
}

/// What becomes of the batch that lies in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// On it goes, wherever the lanes stand.
    Pass,
    /// Its end must come first.
    More,
    /// It waits for an answer, or for the end of a hold.
    Wait,
    /// A turn comes first.
    Turn,
}

/// What becomes of a server's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Drop,
}

impl Session {
    pub(super) fn on_secondary(&self) -> bool {
        self.canary.as_ref().is_some_and(|canary| canary.on_secondary)
    }

    /// Whether the frame in front has to be looked at: asked for each of a client's frames.
    pub(super) fn looks_for_canary(&self) -> bool {
        match &self.canary {
            None => {
                !self.active
                    && self
                        .context
                        .hooks
                        .canary
                        .as_deref()
                        .is_some_and(super::hooks::Canary::wanted)
            }
            Some(canary) => !self.active || canary.lost || canary.on_secondary && canary.batch.left == 0,
        }
    }

    /// The hook, where the secondary may answer reads of this session now.
    pub(super) fn canary_hook(&self) -> Option<&dyn Hook> {
        let hook = self.context.hooks.canary.as_deref()?;
        let quiet = self.standby.is_none() && self.opening.is_none();
        (quiet && self.control.phase.shadows() && hook.wanted() && hook.on(&self.pair.name)).then_some(hook)
    }

    pub(super) fn look(&mut self, bytes: &[u8]) -> Result<Look, End> {
        if self.on_secondary() {
            if !self.tracker.at_rest() {
                return Ok(Look::Wait);
            }
            return Ok(self.look_inside(bytes));
        }
        if self.canary.as_ref().is_some_and(|canary| canary.lost) {
            return Ok(self.look_after_loss(bytes));
        }
        if self.canary_hook().is_none() {
            let look = self.let_pass(bytes)?;
            if look == Look::Pass {
                // Nothing is owed to the primary, and the secondary's connection is not kept.
                self.canary = None;
            }
            return Ok(look);
        }
        self.canary.get_or_insert_default();
        let plan = match Batch::read(bytes) {
            Batch::More => return Ok(Look::More),
            batch => self.plan_canary(&batch),
        };
        let left_alone = self.canary.as_ref().and_then(|canary| canary.not_before);
        let Some(plan) = plan.filter(|_| left_alone.is_none_or(|until| until <= Instant::now())) else {
            return self.let_pass(bytes);
        };
        self.begin_turn(Turn::Divert(plan))
    }

    /// The primary answers; where it has not been told of statements that the batch may use, it is
    /// told first.
    fn let_pass(&mut self, bytes: &[u8]) -> Result<Look, End> {
        let Some(canary) = &mut self.canary else {
            return Ok(Look::Pass);
        };
        let unnamed = std::mem::take(&mut canary.owes_unnamed) && !Batch::replaces_unnamed(bytes);
        if bytes.first() == Some(&b'X') || canary.owed.is_empty() && !unnamed {
            return Ok(Look::Pass);
        }
        canary.owes_unnamed = unnamed;
        self.begin_turn(Turn::PayBack)
    }

    fn begin_turn(&mut self, turn: Turn) -> Result<Look, End> {
        if !self.begin(None)? {
            return Ok(Look::Wait);
        }
        let still_on = self.canary_hook().is_some();
        if let Some(canary) = &mut self.canary {
            // The phase may have changed since.
            let turn = match turn {
                Turn::Divert(_) if !still_on => Turn::PayBack,
                turn => turn,
            };
            canary.turn = Some(turn);
        }
        Ok(Look::Turn)
    }

    /// The next batch of a transaction that the secondary runs.
    fn look_inside(&mut self, bytes: &[u8]) -> Look {
        let batch = match Batch::read(bytes) {
            Batch::More => return Look::More,
            batch => batch,
        };
        let plan = self.plan_inside(&batch);
        let cancels = self.registered.shared.cancels();
        let missing = plan.as_ref().is_some_and(|plan| self.lacks(plan));
        let Some(canary) = &mut self.canary else {
            return Look::Pass;
        };
        match (plan, batch) {
            (Some(plan), _) if missing => canary.turn = Some(Turn::Serve(plan)),
            (Some(plan), _) => {
                canary.run(Running::new(plan, bytes, cancels));
                return Look::Pass;
            }
            (None, Batch::Query { len, .. } | Batch::Extended { len, .. }) => canary.turn = Some(Turn::Leave(len)),
            // Terminate; or what breaks the protocol wherever it is sent.
            (None, _) if bytes.first() == Some(&b'X') => return Look::Pass,
            (None, _) => canary.turn = Some(Turn::Leave(0)),
        }
        Look::Turn
    }

    /// The first batch of a client's that does not know that its transaction is lost. On the primary
    /// it has failed, so what ends it may go there.
    fn look_after_loss(&mut self, bytes: &[u8]) -> Look {
        let batch = match Batch::read(bytes) {
            Batch::More => return Look::More,
            batch => batch,
        };
        let ends = self.asks(&batch, true).is_some_and(|asks| {
            let script = |ask: &Ask<'_>| self.context.hooks.statements.get_as(ask.text, self.lex);
            asks.texts.iter().map(script).any(|script| {
                let class = script.single().map(|statement| &statement.class);
                matches!(class, Some(Class::Transaction(_)))
            })
        });
        let Some(canary) = &mut self.canary else {
            return Look::Pass;
        };
        canary.lost = false;
        match batch {
            Batch::Query { len, .. } | Batch::Extended { len, .. } if !ends => {
                canary.turn = Some(Turn::Tell(len));
                Look::Turn
            }
            _ => Look::Pass,
        }
    }

    /// Whether a statement that a batch uses is not on the secondary's lane.
    fn lacks(&self, plan: &Plan) -> bool {
        plan.unnamed || self.missing(plan).next().is_some()
    }

    pub(super) fn missing<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = (&'a [u8], Rc<Known>)> + 'a {
        plan.names.iter().filter_map(|name| {
            let known = self.statements.named(name)?.clone();
            let there = self.canary.as_ref().and_then(|canary| canary.named.get(name));
            let same = there.is_some_and(|there| Rc::ptr_eq(there, &known));
            (!same).then_some((&name[..], known))
        })
    }

    /// Takes note of a Parse or Close that has gone to the secondary.
    pub(super) fn note_statement(&mut self, kind: u8, body: &[u8]) {
        let Some(canary) = self.canary.as_mut().filter(|canary| canary.on_secondary) else {
            return;
        };
        let name = match kind {
            b'P' => Parse::read(body).map(|parse| parse.name),
            _ => match Named::read(body) {
                Some(Named::Statement(name)) => Some(name),
                _ => None,
            },
        };
        match name {
            None => {}
            Some(b"") => canary.owes_unnamed = kind == b'P',
            Some(name) => {
                crate::wire::put_frame(&mut canary.owed, kind, |out| out.extend_from_slice(body));
                let known = self.statements.named(name).filter(|_| kind == b'P').cloned();
                match known {
                    Some(known) => drop(canary.named.insert(name.into(), known)),
                    None => drop(canary.named.remove(name)),
                }
            }
        }
    }

    /// Bytes of the client's have gone out.
    pub(super) fn note_passed(&mut self, bytes: usize) {
        if let Some(canary) = &mut self.canary {
            canary.batch.left = canary.batch.left.saturating_sub(bytes);
        }
    }

    /// Something passes to the primary of which it is not known what it does.
    pub(super) fn note_unknown(&mut self) {
        if self.canary.is_some() {
            self.shadowing.wrote = true;
        }
    }

    /// A statement passes to the primary.
    pub(super) fn note_for_canary(&mut self, setting: bool) {
        if let Some(canary) = self.canary.as_mut().filter(|canary| !canary.on_secondary) {
            canary.dirty |= setting;
        }
    }

    /// The transaction is over, on whichever side.
    pub(super) fn note_end(&mut self) {
        // While reads are not looked at, writes are not either.
        if let Some(canary) = &mut self.canary {
            canary.lost = false;
        }
        let wrote = self.shadowing.wrote || !self.shadow_wanted();
        if let Some(canary) = &mut self.canary {
            if canary.on_secondary {
                canary.transaction = None;
            } else if wrote {
                canary.wrote();
            }
        }
    }

    /// Looks at a frame of the secondary's.
    pub(super) fn canary_frame(
        &mut self,
        kind: u8,
        body: &[u8],
        frame: &[u8],
        gather: &mut Gather<'_>,
    ) -> Result<Verdict, End> {
        let cancels = self.registered.shared.cancels();
        let Some(canary) = self.canary.as_mut().filter(|canary| canary.on_secondary) else {
            return Ok(Verdict::Pass);
        };
        let batch = &mut canary.batch;
        let bound = canary.transaction.as_ref().is_some_and(|open| open.served);
        match kind {
            b'A' => return Ok(Verdict::Drop),
            // Of settings that the client has made; what else changes there is not its concern.
            b'S' if canary.transaction.is_none() => return Ok(Verdict::Drop),
            b'S' => return Ok(Verdict::Pass),
            b'E' if backend::is_fatal(body) => return Err(End::ServerGone(backend::error_text(body))),
            b'T' if batch.holding && !bound && has_custom_types(body) => {
                (batch.failing, batch.unfit, batch.holding) = (true, true, false);
                batch.held.clear();
                self.forget_observation();
            }
            b'E' if batch.holding && !bound && !(cancels != batch.cancels && is_cancelled(body)) => {
                batch.failing = true;
                batch.holding = false;
                batch.held.clear();
                tracing::debug!(
                    session = self.registered.shared.id.0,
                    error = backend::error_text(body),
                    "canary read failed: the primary is asked"
                );
                self.forget_observation();
            }
            _ => {}
        }
        let Some(canary) = &mut self.canary else {
            return Ok(Verdict::Pass);
        };
        let batch = &mut canary.batch;
        if batch.failing {
            return Ok(Verdict::Drop);
        }
        if !batch.holding {
            return Ok(Verdict::Pass);
        }
        if b"TtnN123H".contains(&kind) && batch.held.len() < HELD_BYTES_MAX {
            batch.held.extend_from_slice(frame);
            return Ok(Verdict::Drop);
        }
        batch.holding = false;
        gather.insert().append(&mut batch.held);
        Ok(Verdict::Pass)
    }

    fn forget_observation(&mut self) {
        if let Some(attention) = &mut self.attention
            && let Some(observation) = attention.observation.take()
        {
            Observation::forget(observation);
        }
    }

    /// The server's frames of a chunk are through: whether the lanes stand as they should.
    pub(super) fn canary_settled(&mut self) {
        let status = self.tracker.status();
        let at_rest = self.tracker.at_rest();
        let Some(canary) = self.canary.as_mut().filter(|canary| canary.on_secondary) else {
            return;
        };
        if !at_rest || canary.turn.is_some() || canary.batch.left > 0 {
            return;
        }
        if canary.batch.failing {
            canary.turn = Some(Turn::Retry);
            return;
        }
        let batch = std::mem::take(&mut canary.batch);
        if !batch.bytes.is_empty() {
            if batch.reads {
                self.count_canary(&batch.text, CanaryEvent::Served);
            }
            if let Some(open) = self.canary.as_mut().and_then(|canary| canary.transaction.as_mut()) {
                open.served |= batch.reads;
                if open.served {
                    open.answered = Vec::new();
                } else {
                    open.answered.extend_from_slice(&batch.bytes);
                }
            }
        }
        if status == backend::Status::Idle && !self.active {
            self.swap_lanes();
        }
    }

    pub(super) fn count_canary(&self, text: &[u8], event: CanaryEvent) {
        if let Some(hook) = &self.context.hooks.canary {
            hook.count(&self.pair.name, text, event);
        }
    }

    /// Takes note of an error of the primary's.
    pub(super) fn note_primary_error(&mut self) {
        if let Some(canary) = &mut self.canary
            && let Some(retrying) = &mut canary.retrying
        {
            retrying.failed = true;
        }
    }

    /// A ReadyForQuery of the primary's: what came of asking it again.
    pub(super) fn note_primary_ready(&mut self) {
        let retried = self.canary.as_mut().and_then(|canary| canary.retrying.take());
        if let Some(Retrying { text, failed }) = retried {
            let event = if failed {
                CanaryEvent::BothFailed
            } else {
                CanaryEvent::Error
            };
            self.count_canary(&text, event);
        }
    }

    /// The connection to the secondary's side that a flip can have, if there is one.
    pub(super) fn give_up_lane(&mut self, side: crate::control::Side) -> Option<Box<Standby>> {
        let canary = self.canary.as_mut().filter(|canary| !canary.on_secondary)?;
        let lane = canary.lane.take_if(|lane| lane.side == side)?;
        canary.forget_secondary();
        Some(lane)
    }

    pub(super) fn fell_back(&self, text: &[u8], why: Fallback) {
        self.count_canary(text, CanaryEvent::Fallback(why));
    }
}

fn is_cancelled(error: &[u8]) -> bool {
    backend::error_field(error, b'C') == Some(b"57014")
}

impl Running {
    pub(super) fn new(plan: Plan, bytes: &[u8], cancels: u32) -> Self {
        Self {
            bytes: bytes[..plan.len].to_vec(),
            left: plan.len,
            text: plan.text,
            reads: plan.reads,
            holding: true,
            cancels,
            ..Self::default()
        }
    }
}
