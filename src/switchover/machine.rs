//! The flip as a state machine: pure transitions, which the coordinator, every proxy that takes
//! part, and whoever finds a flip that nobody leads any more only carry out.
//!
//! ```text
//! preparing ─ probing ─ holding ─ fencing ─ draining ═ decided ─ turned ─ done
//!     └──────────┴─────────┴─────────┴─────────┘          ║
//!                      aborted                    point of no return
//! ```
//!
//! The step is a column of `pgtandem.flip` on the side that is primary when the flip begins (with
//! several databases: in the first by name). Every transition is one statement there that looks
//! at the step it starts from, so that of two who would go on differently one finds itself
//! overruled.
//!
//! `decided` is the one record that matters. It is written by the transaction that holds the
//! fence, which also turns the old side to secondary. So an old side that says *primary* was not
//! decided against, and one that says *secondary* without the record is made primary again
//! ([`resolve`]); with it, the new side is made primary ([`turn`]), by whoever comes first.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::recover::Recorded;
use crate::control::{Epoch, Side};

/// Where a flip stands, as recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Every proxy opens connections to the other side and prepares its sessions there.
    Preparing,
    /// A change travels from the new primary's journal to the old side.
    Probing,
    /// Every proxy holds new transactions, waits for open ones and carries its sessions over.
    Holding,
    /// Writers past the proxies are waited for, and no new one is let in.
    Fencing,
    /// The last round and the sequences.
    Draining,
    /// The old side is secondary. From here it goes forward only.
    Decided,
    /// The new side is primary; clients are released.
    Turned,
    Done,
    /// Everything is as it was.
    Aborted,
}

impl Step {
    pub const ALL: [Self; 9] = [
        Self::Preparing,
        Self::Probing,
        Self::Holding,
        Self::Fencing,
        Self::Draining,
        Self::Decided,
        Self::Turned,
        Self::Done,
        Self::Aborted,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Probing => "probing",
            Self::Holding => "holding",
            Self::Fencing => "fencing",
            Self::Draining => "draining",
            Self::Decided => "decided",
            Self::Turned => "turned",
            Self::Done => "done",
            Self::Aborted => "aborted",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == text)
    }

    /// Before the point of no return, and not given up.
    pub const fn is_open(self) -> bool {
        matches!(
            self,
            Self::Preparing | Self::Probing | Self::Holding | Self::Fencing | Self::Draining
        )
    }

    /// Whether clients wait in it.
    pub const fn holds(self) -> bool {
        matches!(self, Self::Holding | Self::Fencing | Self::Draining | Self::Decided)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Flip,
    /// All of it up to the point of no return, then back.
    Rehearsal,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flip => "flip",
            Self::Rehearsal => "rehearsal",
        }
    }
}

/// How the work of a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Succeeded,
    Failed,
}

/// The coordinator's transition: the step that follows.
pub const fn next(kind: Kind, step: Step, outcome: Outcome) -> Step {
    match (step, outcome) {
        (Step::Preparing, Outcome::Succeeded) => Step::Probing,
        (Step::Probing, Outcome::Succeeded) => Step::Holding,
        (Step::Holding, Outcome::Succeeded) => Step::Fencing,
        (Step::Fencing, Outcome::Succeeded) => Step::Draining,
        (Step::Draining, Outcome::Succeeded) => match kind {
            Kind::Flip => Step::Decided,
            Kind::Rehearsal => Step::Aborted,
        },
        (Step::Preparing | Step::Probing | Step::Holding | Step::Fencing | Step::Draining, Outcome::Failed) => {
            Step::Aborted
        }
        // The new side is tried until it can be turned.
        (Step::Decided, Outcome::Failed) => Step::Decided,
        (Step::Decided, Outcome::Succeeded) => Step::Turned,
        (Step::Turned | Step::Done, _) => Step::Done,
        (Step::Aborted, _) => Step::Aborted,
    }
}

/// The old side's step and role after a flip that nobody leads any more, or whose coordinator does
/// not know what became of its decision. To be written in one transaction that excludes the fence.
pub fn resolve(step: Step, old_side: Recorded, epoch: Epoch) -> (Step, Recorded) {
    if !step.is_open() {
        return (step, old_side);
    }
    let role = match old_side {
        // Turned by a transaction that did not live to record its decision: a sequence is not
        // transactional.
        Recorded::Secondary(turned) if turned == epoch => Recorded::Primary(epoch.previous()),
        other => other,
    };
    (Step::Aborted, role)
}

/// The new side's role once the flip to `epoch` is decided. One that has gone on since stays as it
/// is: whoever was asleep since the decision must not turn it again.
pub fn turn(new_side: Recorded, epoch: Epoch) -> Recorded {
    match new_side {
        Recorded::Secondary(stands) if stands < epoch => Recorded::Primary(epoch),
        other => other,
    }
}

/// Identifies an attempt.
pub type FlipId = String;

/// Where a proxy stands that takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing<Id> {
    Serving,
    /// Its sessions have connections to the other side.
    Prepared(Id),
    /// No transaction is open and none begins.
    Held(Id),
}

/// A flip as a proxy finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlipSeen<Id> {
    pub id: Id,
    pub step: Step,
    pub epoch: Epoch,
    /// Nobody leads it: its coordinator is gone, or its time is over.
    pub orphaned: bool,
}

/// What a proxy finds in the two databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seen<Id> {
    /// The last one on the side that this proxy takes for the primary.
    pub flip: Option<FlipSeen<Id>>,
    /// The side that says it is the primary, as far as it could be asked.
    pub primary: Option<(Side, Epoch)>,
}

/// What a proxy does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    Wait,
    Prepare,
    Hold,
    /// Everything as before the flip.
    Release,
    /// Clients belong on this side now.
    Adopt(Side, Epoch),
    /// Nobody leads the flip: end it one way or the other.
    TakeOver,
}

/// A proxy's transition, from what it has recorded itself and what it sees.
pub fn participate<Id: Copy + Eq>(own: Epoch, standing: Standing<Id>, seen: &Seen<Id>) -> Act {
    let ours = seen.flip.filter(|flip| flip.epoch == own.next());
    if let Some((side, epoch)) = seen.primary
        && epoch > own
        // Turned, but what the old direction's applier left may still be about to write.
        && ours.is_none_or(|flip| matches!(flip.step, Step::Turned | Step::Done))
    {
        return Act::Adopt(side, epoch);
    }
    let taken_part_in = match standing {
        Standing::Serving => None,
        Standing::Prepared(id) | Standing::Held(id) => Some(id),
    };
    let Some(flip) = ours else {
        return if taken_part_in.is_some() {
            Act::Release
        } else {
            Act::Wait
        };
    };
    if taken_part_in.is_some_and(|id| id != flip.id) {
        return Act::Release;
    }
    match flip.step {
        Step::Aborted if taken_part_in.is_some() => Act::Release,
        Step::Aborted | Step::Turned | Step::Done => Act::Wait,
        _ if flip.orphaned => Act::TakeOver,
        Step::Preparing if taken_part_in.is_none() => Act::Prepare,
        Step::Preparing | Step::Probing => Act::Wait,
        Step::Holding | Step::Fencing | Step::Draining | Step::Decided => match standing {
            Standing::Held(_) => Act::Wait,
            Standing::Serving | Standing::Prepared(_) => Act::Hold,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_read_as_it_is_written() {
        for step in Step::ALL {
            assert_eq!(Step::parse(step.as_str()), Some(step));
        }
        assert_eq!(Step::parse("elsewhere"), None);
    }

    #[test]
    fn forward_only_after_the_decision_and_never_to_it_in_a_rehearsal() {
        for step in Step::ALL {
            for outcome in [Outcome::Succeeded, Outcome::Failed] {
                let follows = next(Kind::Flip, step, outcome);
                if step.is_open() {
                    assert_eq!(outcome == Outcome::Failed, follows == Step::Aborted, "{step}");
                } else {
                    assert!(follows >= step, "{step}");
                }
                if step.is_open() {
                    assert!(next(Kind::Rehearsal, step, outcome) != Step::Decided, "{step}");
                }
            }
        }
    }

    #[test]
    fn what_a_proxy_does() {
        let own = Epoch(3);
        let flip = |step, orphaned| Seen {
            flip: Some(FlipSeen {
                id: 1,
                step,
                epoch: Epoch(4),
                orphaned,
            }),
            primary: Some((Side::Legacy, own)),
        };
        let turned = |step| Seen {
            primary: Some((Side::New, Epoch(4))),
            ..flip(step, false)
        };
        let nothing = Seen {
            flip: None,
            primary: Some((Side::Legacy, own)),
        };
        for (standing, seen, act) in [
            (Standing::Serving, nothing, Act::Wait),
            (Standing::Held(1), nothing, Act::Release),
            (Standing::Serving, flip(Step::Preparing, false), Act::Prepare),
            (Standing::Prepared(1), flip(Step::Preparing, false), Act::Wait),
            (Standing::Prepared(0), flip(Step::Preparing, false), Act::Release),
            (Standing::Prepared(1), flip(Step::Holding, false), Act::Hold),
            (Standing::Serving, flip(Step::Fencing, false), Act::Hold),
            (Standing::Held(1), flip(Step::Draining, false), Act::Wait),
            (Standing::Held(1), flip(Step::Draining, true), Act::TakeOver),
            (Standing::Held(1), flip(Step::Decided, true), Act::TakeOver),
            (Standing::Held(1), flip(Step::Aborted, false), Act::Release),
            (Standing::Serving, flip(Step::Aborted, true), Act::Wait),
            (Standing::Held(1), turned(Step::Decided), Act::Wait),
            (Standing::Held(1), turned(Step::Turned), Act::Adopt(Side::New, Epoch(4))),
            (Standing::Serving, turned(Step::Done), Act::Adopt(Side::New, Epoch(4))),
        ] {
            assert_eq!(participate(own, standing, &seen), act, "{standing:?} {seen:?}");
        }
    }
}
