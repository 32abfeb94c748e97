//! What a wish for a phase means from where the migration stands. Pure: data in, enum out.

use crate::control::{Control, Phase, Side};

/// What must be done to make the wish so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// It is so already.
    Nothing,
    /// Install capture on both sides and start the applier.
    StartMirroring,
    /// Stop the applier and remove capture; the secondary must be seeded again afterwards.
    StopMirroring,
    /// Only the phase's name and its shadow reads change.
    Publish,
    /// The switchover procedure.
    Flip { to: Side },
    /// End mirroring, remove what was installed, keep only the marker that says so.
    Complete,
}

/// Why a wish cannot be made so from here, and which way leads there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("phase {from} cannot become {wish}: {why}")]
pub struct Refusal {
    pub from: Phase,
    pub wish: Phase,
    pub why: &'static str,
}

/// The one place that knows which phase may follow which.
pub fn plan(now: Control, wish: Phase) -> Result<Plan, Refusal> {
    use Phase::{Complete, DualRead, DualWrite, Initial, Switchover};
    let refuse = |why| {
        Err(Refusal {
            from: now.phase,
            wish,
            why,
        })
    };
    match (now.phase, wish) {
        (Initial, Initial)
        | (DualWrite, DualWrite)
        | (DualRead, DualRead)
        | (Switchover, Switchover)
        | (Complete, Complete) => Ok(Plan::Nothing),
        (Initial, DualWrite | DualRead) => Ok(Plan::StartMirroring),
        (DualWrite | DualRead, Initial) => Ok(Plan::StopMirroring),
        (DualWrite, DualRead) | (DualRead, DualWrite) => Ok(Plan::Publish),
        (DualWrite | DualRead, Switchover) => Ok(Plan::Flip { to: Side::New }),
        (Switchover, DualWrite | DualRead) => Ok(Plan::Flip { to: Side::Legacy }),
        (Switchover, Complete) => Ok(Plan::Complete),
        (Initial, Switchover) => refuse("nothing has been mirrored yet; go through dual_write first"),
        (Switchover, Initial) => refuse("flip back first, through dual_write or dual_read"),
        (Initial | DualWrite | DualRead, Complete) => {
            refuse("clients are still on legacy; go through switchover first")
        }
        (Complete, Initial | DualWrite | DualRead | Switchover) => {
            refuse("the migration is over and legacy is no longer kept in step")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Epoch;
    use Phase::{Complete, DualRead, DualWrite, Initial, Switchover};

    fn check(from: Phase, wish: Phase, expected: Option<Plan>) {
        let now = Control {
            phase: from,
            primary: from.primary(),
            epoch: Epoch(3),
        };
        assert_eq!(plan(now, wish).ok(), expected, "{from} -> {wish}");
    }

    #[test]
    fn every_pair_of_phases() {
        use Plan::{Flip, Nothing, Publish, StartMirroring, StopMirroring};
        let (new, legacy) = (Flip { to: Side::New }, Flip { to: Side::Legacy });
        let wishes = [Initial, DualWrite, DualRead, Switchover, Complete];
        for (from, plans) in [
            (
                Initial,
                [Some(Nothing), Some(StartMirroring), Some(StartMirroring), None, None],
            ),
            (
                DualWrite,
                [Some(StopMirroring), Some(Nothing), Some(Publish), Some(new), None],
            ),
            (
                DualRead,
                [Some(StopMirroring), Some(Publish), Some(Nothing), Some(new), None],
            ),
            (
                Switchover,
                [None, Some(legacy), Some(legacy), Some(Nothing), Some(Plan::Complete)],
            ),
            (Complete, [None, None, None, None, Some(Nothing)]),
        ] {
            for (wish, expected) in wishes.into_iter().zip(plans) {
                check(from, wish, expected);
            }
        }
    }

    #[test]
    fn only_a_flip_or_nothing_crosses_the_primary() {
        for from in [Initial, DualWrite, DualRead, Switchover, Complete] {
            for wish in [Initial, DualWrite, DualRead, Switchover, Complete] {
                let now = Control {
                    phase: from,
                    primary: from.primary(),
                    epoch: Epoch(1),
                };
                if let Ok(plan) = plan(now, wish) {
                    let crosses = from.primary() != wish.primary();
                    assert_eq!(matches!(plan, Plan::Flip { .. }), crosses, "{from} -> {wish}");
                }
            }
        }
    }
}
