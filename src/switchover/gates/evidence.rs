//! What was seen of the secondary so far. How much of it is enough, the operator says.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{NOTHING, gate, span};
use crate::admin::api::{Gate, ServerStatus, ShadowReads, TableStatus};

/// The table that was found equal longest ago, or never (in this direction).
pub(super) fn verification(tables: &[TableStatus], within: Option<Duration>, now: OffsetDateTime) -> Gate {
    let age = |table: &TableStatus| {
        let verified = table.verified.as_ref()?;
        let at = OffsetDateTime::parse(&verified.at, &Rfc3339).ok()?;
        Some((now - at).as_seconds_f64().max(0.0))
    };
    let never: Vec<&str> = tables
        .iter()
        .filter(|table| age(table).is_none())
        .map(|table| table.name.as_str())
        .collect();
    let oldest = tables
        .iter()
        .filter_map(|table| Some((age(table)?, table.name.as_str())))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let measured = match (never.as_slice(), oldest) {
        ([], None) => "there are no tables".to_owned(),
        ([], Some((age, name))) => format!("all tables found equal, {name} longest ago: {}", span(age)),
        ([only], _) => format!("{only} never was"),
        ([first, rest @ ..], _) => format!("{first} and {} more never were", rest.len()),
    };
    let late = |within: Duration| oldest.is_some_and(|(age, _)| age > within.as_secs_f64());
    let required = within.map_or_else(
        || NOTHING.to_owned(),
        |within| format!("every table found equal within {}", span(within.as_secs_f64())),
    );
    let open = within.is_none_or(|within| never.is_empty() && !late(within));
    gate("verification", measured, required, open)
}

/// Of the reads since this proxy started.
pub(super) fn shadow_coverage(reads: &ShadowReads, least: Option<f64>) -> Gate {
    let compared = compared(reads);
    let others: u64 = reads.not_comparable.values().chain(reads.failed.values()).sum();
    let all = compared + others + reads.skipped + reads.dropped;
    share_gate("shadow coverage", compared, all, "reads compared", least)
}

pub(super) fn shadow_match_rate(reads: &ShadowReads, least: Option<f64>) -> Gate {
    let compared = compared(reads);
    let alike = compared - reads.mismatched;
    share_gate("shadow match rate", alike, compared, "compared reads alike", least)
}

const fn compared(reads: &ShadowReads) -> u64 {
    reads.matched + reads.mismatched + reads.transient
}

/// Where there was nothing to measure, nothing is proved.
fn share_gate(name: &str, part: u64, all: u64, of: &str, least: Option<f64>) -> Gate {
    let share = (all > 0).then(|| 100.0 * part as f64 / all as f64);
    let measured = match share {
        Some(share) => format!("{share:.2} % ({part} of {all} {of})"),
        None => format!("there were no {of}"),
    };
    let required = least.map_or_else(|| NOTHING.to_owned(), |least| format!("at least {least} %"));
    let open = least.is_none_or(|least| share.is_some_and(|share| share >= least));
    gate(name, measured, required, open)
}

/// What is recorded where `stray_writers: report` lets them pass.
pub(super) fn strays(secondary: &ServerStatus, quiet: Option<Duration>) -> Gate {
    let measured = match &secondary.stray {
        None => "none recorded".to_owned(),
        Some(stray) => format!("{}, {} ago", stray.who, span(stray.seconds)),
    };
    let required = quiet.map_or_else(
        || NOTHING.to_owned(),
        |quiet| format!("none within {}", span(quiet.as_secs_f64())),
    );
    let recent = |quiet: Duration| {
        let stray = secondary.stray.as_ref();
        stray.is_some_and(|stray| stray.seconds <= quiet.as_secs_f64())
    };
    gate("stray writers", measured, required, !quiet.is_some_and(recent))
}
