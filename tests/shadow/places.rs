//! Where the tests produce each reason for which a read is not compared. Without wildcards: a new
//! reason does not build until it has its place, and each place's test fails until it produces it.

use pgtandem::shadow::{Dropped, Failed, Outcome, Skipped};
use pgtandem::sql::NotComparable;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// `tests/shadow/reasons.rs`: two servers, and reads handed to the shadows.
    Shadows,
    /// `tests/mirror/reads.rs`: clients of the built proxy.
    Proxy,
    /// Both of them: no read at all is never counted.
    NeverCounted,
}

pub(crate) fn of_reason(reason: NotComparable) -> Place {
    match reason {
        NotComparable::NotARead => Place::NeverCounted,
        NotComparable::SeveralStatements
        | NotComparable::NotUnderstood
        | NotComparable::VolatileFunction
        | NotComparable::UnknownFunction
        | NotComparable::UnknownRelation
        | NotComparable::Clock
        | NotComparable::Session
        | NotComparable::ServerSpecific
        | NotComparable::TemporaryTable
        | NotComparable::Locking
        | NotComparable::EarlierWrite
        | NotComparable::UnknownSettings
        | NotComparable::NotMirrored
        | NotComparable::CursorMovement
        | NotComparable::UnknownStatement
        | NotComparable::CopyToServer => Place::Proxy,
        NotComparable::Transformed
        | NotComparable::Encoding
        | NotComparable::ParameterType
        | NotComparable::PartialAnswer
        | NotComparable::LimitWithoutOrder
        | NotComparable::OrderDependentFunction
        | NotComparable::DistinctOn
        | NotComparable::Sample
        | NotComparable::NonDeterministic
        | NotComparable::Ignored
        | NotComparable::TooManyRows => Place::Shadows,
    }
}

fn of_outcome(outcome: Outcome) -> Place {
    match outcome {
        Outcome::NotComparable(reason) | Outcome::Partly(reason) => of_reason(reason),
        Outcome::Skipped(Skipped::CutOff | Skipped::Pipelined) => Place::Proxy,
        Outcome::Skipped(Skipped::NotSampled | Skipped::Flip | Skipped::PrimaryError)
        | Outcome::Dropped(Dropped::QueueFull | Dropped::TooLarge)
        | Outcome::Failed(Failed::Connection | Failed::Timeout | Failed::NoCut)
        | Outcome::Matched
        | Outcome::OrderTies
        | Outcome::Tolerated
        | Outcome::Mismatched
        | Outcome::Transient => Place::Shadows,
    }
}

/// What a place's test has to produce, as the counters name it: `clock`, `cut_off`, ….
pub(crate) fn produced_in(place: Place) -> Vec<&'static str> {
    let needs_a_reason = |outcome: &Outcome| {
        matches!(
            outcome,
            Outcome::NotComparable(_) | Outcome::Skipped(_) | Outcome::Dropped(_) | Outcome::Failed(_)
        )
    };
    Outcome::all()
        .filter(needs_a_reason)
        .filter(|outcome| of_outcome(*outcome) == place)
        .map(|outcome| outcome.labels().1)
        .collect()
}
