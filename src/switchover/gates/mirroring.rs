//! What the flip rests on: that mirroring works, is complete, and would work the other way.

use std::time::Duration;

use super::{gate, span};
use crate::admin::api::{DatabaseStatus, Gate, Mirroring, ServerStatus};

pub(super) fn reachable(database: &DatabaseStatus) -> Gate {
    let measured = match (&database.legacy.error, &database.new.error) {
        (None, None) => "both answer".to_owned(),
        (Some(error), _) => format!("legacy: {error}"),
        (None, Some(error)) => format!("new: {error}"),
    };
    let open = database.legacy.error.is_none() && database.new.error.is_none();
    gate("both sides reachable", measured, "both answer", open)
}

pub(super) fn running(mirroring: &Mirroring) -> Gate {
    let measured = match &mirroring.error {
        Some(error) => format!("{}: {error}", mirroring.state),
        None => mirroring.state.clone(),
    };
    // Another proxy may be the one that applies.
    let open = mirroring.state == "running" || (mirroring.state == "waiting" && mirroring.applier.is_some());
    gate("mirroring", measured, "running", open)
}

/// A flip waits for the last round under the hold: a greater lag would make clients wait.
pub(super) fn lag(mirroring: &Mirroring, most: Duration) -> Gate {
    let seconds = mirroring.lag.seconds;
    gate(
        "lag",
        format!("{seconds:.1} s"),
        format!("at most {}", span(most.as_secs_f64())),
        seconds <= most.as_secs_f64(),
    )
}

pub(super) fn not_synced(mirroring: &Mirroring) -> Gate {
    let missing: Vec<&str> = mirroring
        .tables
        .iter()
        .filter(|table| table.seeding != "synced" || table.paused.is_some())
        .map(|table| table.name.as_str())
        .collect();
    let measured = match missing.as_slice() {
        [] => format!("all {} tables synced", mirroring.tables.len()),
        [first] => format!("{first} is not"),
        [first, rest @ ..] => format!("{first} and {} more are not", rest.len()),
    };
    gate("tables", measured, "all synced, none paused", missing.is_empty())
}

/// What differs would be another schema to the clients, from the flip on.
pub(super) fn definitions(mirroring: &Mirroring) -> Gate {
    let measured = match mirroring.different.as_slice() {
        [] => "alike".to_owned(),
        [only] => format!("{only} differs; see `pgtandem schema diff` and `schema heal`"),
        [first, rest @ ..] => format!(
            "{first} and {} more differ; see `pgtandem schema diff` and `schema heal`",
            rest.len()
        ),
    };
    gate("definitions", measured, "alike", mirroring.different.is_empty())
}

pub(super) fn way_back(mirroring: &Mirroring) -> Gate {
    let measured = match mirroring.one_way.as_slice() {
        [] => "every table has one".to_owned(),
        [only] => only.clone(),
        [first, rest @ ..] => format!("{first}; and {} more", rest.len()),
    };
    gate(
        "way back",
        measured,
        "every table has one",
        mirroring.one_way.is_empty(),
    )
}

/// A flip captures under the hold what is not captured yet on the side that becomes primary, and
/// is given up where it may not.
pub(super) fn reverse_capture(secondary: &ServerStatus) -> Gate {
    let measured = match secondary.uncapturable.as_slice() {
        [] => "every table has capture or can get it".to_owned(),
        [only] => format!("{only} is not captured there, and the proxy's role does not own it"),
        [first, rest @ ..] => format!(
            "{first} and {} more are not captured there, and the proxy's role does not own them",
            rest.len()
        ),
    };
    gate(
        "reverse capture",
        measured,
        "every table has capture or can get it",
        secondary.uncapturable.is_empty(),
    )
}

pub(super) fn quarantine(mirroring: &Mirroring) -> Gate {
    let held = &mirroring.quarantine;
    let measured = match &held.error {
        Some(error) => format!("{} transactions, the oldest: {error}", held.transactions),
        None => "empty".to_owned(),
    };
    gate("quarantine", measured, "empty", held.transactions == 0)
}
