//! Which side is primary, read from what the two databases record. Pure.
//!
//! The order of a flip makes this decidable: the old side is turned to secondary (epoch + 1)
//! and that is flushed before the new side is turned to primary (epoch + 1). So
//! * a side that says *primary* is the primary, whatever the other one, even out of reach, may
//!   say: it would have been turned first;
//! * two sides that both say *secondary* are a flip interrupted half-way: the one with the higher
//!   epoch was primary, and becomes it again unless its record says that the flip was decided
//!   (then the flip is ended first, see [`super::machine`], and this is not asked);
//! * two sides that both say *primary* were never written by this procedure (a restored backup,
//!   a hand at work): nothing is guessed, nobody is served.

use crate::control::{Control, Epoch, Phase, Side};

/// The role a side has recorded for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Recorded {
    Primary(Epoch),
    Secondary(Epoch),
}

/// What was found on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Reached; pgtandem has never been installed there, or was removed.
    Nothing,
    /// Reached; capture is installed and this is its role.
    Role(Recorded),
    /// Reached; only the marker that `complete` leaves.
    Completed,
    Unreachable(String),
}

/// How to begin serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// Begin here; then [`super::plan`] leads to the wish.
    At(Control),
    /// A flip stopped half-way: make `side` primary again under `epoch`, then begin.
    Restore { side: Side, epoch: Epoch },
}

/// Why nobody can be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotBegin {
    #[error("{0}")]
    Contradiction(String),
    /// May pass: ask again.
    #[error("{0}")]
    NotYet(String),
}

pub fn recover(legacy: &Observed, new: &Observed, wish: Phase) -> Result<Beginning, CannotBegin> {
    use Observed::{Completed, Nothing, Role, Unreachable};
    use Recorded::{Primary, Secondary};
    match (legacy, new) {
        (Completed, _) if wish == Phase::Complete => Ok(at(Phase::Complete, Epoch::FIRST)),
        (Completed, _) => contradiction(
            wish,
            "legacy records that this migration was completed; to begin another one, drop schema pgtandem there",
        ),
        (Role(Primary(_)), Role(Primary(_))) => Err(CannotBegin::Contradiction(
            "both sides record that they are the primary: was one restored from a backup? \
             Decide which one holds the truth and drop schema pgtandem on the other"
                .into(),
        )),
        (Role(Primary(epoch)), _) => agreed(Side::Legacy, *epoch),
        (_, Role(Primary(epoch))) => agreed(Side::New, *epoch),
        (Role(Secondary(legacy)), Role(Secondary(new))) if legacy != new => {
            // Epochs count flips that happened: this one did not, so the other side's still holds,
            // and with it the watermark there.
            let (side, epoch) = if legacy > new {
                (Side::Legacy, *new)
            } else {
                (Side::New, *legacy)
            };
            Ok(Beginning::Restore { side, epoch })
        }
        (Role(Secondary(_)), Role(Secondary(_)) | Nothing | Completed) | (Nothing, Role(Secondary(_)) | Completed) => {
            contradiction(
                wish,
                "a side records that it is the secondary, but none that it is the primary",
            )
        }
        (Role(Secondary(_)), Unreachable(cause)) => not_yet(Side::New, cause),
        (Unreachable(cause), Role(Secondary(_)) | Completed) => not_yet(Side::Legacy, cause),
        // Legacy may be gone for good once the migration is over.
        (Unreachable(_), Nothing) if wish == Phase::Complete => Ok(at(Phase::Complete, Epoch::FIRST)),
        (Unreachable(cause), Nothing | Unreachable(_)) => not_yet(Side::Legacy, cause),
        (Nothing, Nothing | Unreachable(_)) => match wish {
            Phase::Initial | Phase::DualWrite | Phase::DualRead => Ok(at(Phase::Initial, Epoch::FIRST)),
            Phase::Switchover | Phase::Complete => contradiction(
                wish,
                "neither side records a migration, so clients belong on legacy; begin with initial or dual_write",
            ),
        },
    }
}

fn at(phase: Phase, epoch: Epoch) -> Beginning {
    Beginning::At(Control {
        phase,
        primary: phase.primary(),
        epoch,
    })
}

/// The databases record a primary, and clients belong there whatever the wish: the flip that made
/// it so may be newer than this proxy's proxy.yaml, and starting a proxy must never flip.
fn agreed(primary: Side, epoch: Epoch) -> Result<Beginning, CannotBegin> {
    Ok(at(
        match primary {
            Side::Legacy => Phase::DualWrite,
            Side::New => Phase::Switchover,
        },
        epoch,
    ))
}

fn contradiction<T>(wish: Phase, why: &str) -> Result<T, CannotBegin> {
    Err(CannotBegin::Contradiction(format!(
        "proxy.yaml says phase: {wish}, but {why}"
    )))
}

fn not_yet<T>(side: Side, cause: &str) -> Result<T, CannotBegin> {
    Err(CannotBegin::NotYet(format!(
        "which side is primary is not known until {side} can be reached: {cause}"
    )))
}

#[cfg(test)]
mod tests {
    use super::Observed::{Completed, Nothing, Role, Unreachable};
    use super::Recorded::{Primary, Secondary};
    use super::*;
    use Phase::{Complete, DualRead, DualWrite, Initial, Switchover};

    fn down() -> Observed {
        Unreachable("connection refused".into())
    }

    fn check(legacy: Observed, new: Observed, wish: Phase, expected: Result<Beginning, &str>) {
        match (recover(&legacy, &new, wish), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{legacy:?} {new:?} {wish}"),
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{error} does not say {says}"),
            (found, expected) => panic!("{legacy:?} {new:?} {wish}: {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn a_fresh_pair_begins_at_initial() {
        for wish in [Initial, DualWrite, DualRead] {
            check(Nothing, Nothing, wish, Ok(at(Initial, Epoch(1))));
            check(Nothing, down(), wish, Ok(at(Initial, Epoch(1))));
        }
        check(Nothing, Nothing, Switchover, Err("begin with initial"));
        check(down(), Nothing, DualWrite, Err("legacy can be reached"));
    }

    #[test]
    fn the_recorded_primary_wins_and_a_contradiction_is_refused() {
        let (p, s) = (Role(Primary(Epoch(4))), Role(Secondary(Epoch(4))));
        check(p.clone(), s.clone(), DualRead, Ok(at(DualWrite, Epoch(4))));
        check(p.clone(), down(), DualRead, Ok(at(DualWrite, Epoch(4))));
        check(p.clone(), s.clone(), Initial, Ok(at(DualWrite, Epoch(4))));
        check(p.clone(), s.clone(), Switchover, Ok(at(DualWrite, Epoch(4))));
        check(s.clone(), p.clone(), Switchover, Ok(at(Switchover, Epoch(4))));
        check(down(), p.clone(), Switchover, Ok(at(Switchover, Epoch(4))));
        check(s.clone(), p.clone(), DualRead, Ok(at(Switchover, Epoch(4))));
        check(p.clone(), p.clone(), DualRead, Err("both sides"));
        check(s.clone(), down(), DualRead, Err("new can be reached"));
        check(s.clone(), Nothing, DualRead, Err("none that it is the primary"));
    }

    #[test]
    fn a_flip_interrupted_before_its_point_of_no_return_goes_back() {
        let restore = |side| Ok(Beginning::Restore { side, epoch: Epoch(4) });
        check(
            Role(Secondary(Epoch(5))),
            Role(Secondary(Epoch(4))),
            DualRead,
            restore(Side::Legacy),
        );
        check(
            Role(Secondary(Epoch(4))),
            Role(Secondary(Epoch(5))),
            Switchover,
            restore(Side::New),
        );
    }

    #[test]
    fn a_completed_migration_stays_completed() {
        check(Completed, Nothing, Complete, Ok(at(Complete, Epoch(1))));
        check(down(), Nothing, Complete, Ok(at(Complete, Epoch(1))));
        check(Completed, Nothing, DualWrite, Err("was completed"));
    }
}
