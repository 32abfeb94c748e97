//! What was seen of the secondary so far. How much of it is enough, the operator says.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{NOTHING, gate, span};
use crate::admin::api::{CanaryStatus, Gate, ServerStatus, ShadowReads, TableStatus};

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

/// Of the reads since counting began.
pub(super) fn shadow_coverage(reads: &ShadowReads, least: Option<f64>) -> Gate {
    let compared = compared(reads);
    let others: u64 = reads.not_comparable.values().chain(reads.failed.values()).sum();
    let all = compared + others + reads.skipped + reads.dropped;
    let (of, nothing) = said("reads compared", reads);
    share_gate("shadow coverage", [compared, all], [&of, &nothing], least)
}

pub(super) fn shadow_match_rate(reads: &ShadowReads, least: Option<f64>) -> Gate {
    let compared = compared(reads);
    let alike = compared - reads.mismatched;
    let (of, nothing) = said("compared reads alike", reads);
    share_gate("shadow match rate", [alike, compared], [&of, &nothing], least)
}

/// What is counted, since when; and that there was nothing of it.
fn said(what: &str, reads: &ShadowReads) -> (String, String) {
    let since = reads.since.get(..19).map_or_else(String::new, |since| {
        format!(" since {} UTC", since.replacen('T', " ", 1))
    });
    (format!("{what}{since}"), format!("there were no {what}{since}"))
}

const fn compared(reads: &ShadowReads) -> u64 {
    reads.matched + reads.mismatched + reads.transient
}

/// Clients have been served by the side that is to become primary.
pub(super) fn canary(canary: Option<&CanaryStatus>, least: Option<Duration>) -> Gate {
    let measured = match canary {
        None => "no read was meant for the secondary".to_owned(),
        Some(canary) => {
            let counts = &canary.counts;
            let state = if canary.turned_off_by_budget {
                "turned itself off".to_owned()
            } else {
                format!("on for {}", span(canary.on_seconds))
            };
            format!(
                "{state}; {} reads, {} failed, {} of {} compared were mismatches",
                counts.served,
                counts.failures(),
                counts.mismatched,
                counts.compared
            )
        }
    };
    let required = least.map_or_else(
        || NOTHING.to_owned(),
        |least| format!("on for {}, and not turned off since", span(least.as_secs_f64())),
    );
    let proved = |least: Duration| {
        canary.is_some_and(|canary| {
            !canary.turned_off_by_budget && canary.counts.served > 0 && canary.on_seconds >= least.as_secs_f64()
        })
    };
    gate("canary", measured, required, least.is_none_or(proved))
}

/// Where there was nothing to measure, nothing is proved.
fn share_gate(name: &str, [part, all]: [u64; 2], [of, nothing]: [&str; 2], least: Option<f64>) -> Gate {
    let share = (all > 0).then(|| 100.0 * part as f64 / all as f64);
    let measured = match share {
        Some(share) => format!("{share:.2} % ({part} of {all} {of})"),
        None => nothing.to_owned(),
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
