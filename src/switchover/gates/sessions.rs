//! Clients' sessions: those that a flip could not carry over, and those that are not the proxies'.

use std::collections::BTreeSet;

use super::{Measured, NOTHING, OfProxy, gate, span};
use crate::admin::api::{Client, DatabaseStatus, Gate};
use crate::config::Stragglers;
use crate::control::Side;

/// Named in a gate; `status --json` has all.
const NAMED: usize = 3;
/// A connection this young may be one that its proxy has not told of yet.
const YOUNG_SECONDS: f64 = 5.0;

/// What an operator reads here a flip would find: it is given up before anybody is held, or ends
/// these sessions.
pub(super) fn uncarriable(proxies: &[OfProxy<'_>], stragglers: Stragglers) -> Gate {
    let answering = || proxies.iter().filter(|proxy| proxy.answers);
    let count: usize = answering().map(|proxy| proxy.survey.in_the_way_count).sum();
    let named = answering().flat_map(|proxy| {
        proxy.survey.in_the_way.iter().map(|session| {
            format!(
                "{} ({}) from {} on {}, {}: {}",
                session.user, session.application, session.address, session.database, proxy.name, session.reason
            )
        })
    });
    let (required, open) = match stragglers {
        Stragglers::Wait => ("none", count == 0),
        Stragglers::End => ("nothing: they are ended (switchover.stragglers: end)", true),
    };
    gate(
        super::TO_CARRY,
        listed("none is in the way", named, count),
        required,
        open,
    )
}

/// Sessions that would not follow a flip: what they write on the old primary is refused then.
pub(super) fn past_the_proxies(measured: &Measured<'_>, database: &DatabaseStatus) -> Gate {
    let most = measured.policy.gates.direct_sessions;
    let mut direct = Vec::new();
    for (side, server) in [(Side::Legacy, &database.legacy), (Side::New, &database.new)] {
        let known: BTreeSet<i32> = measured
            .sessions
            .iter()
            .filter_map(|proxy| proxy.survey.databases.get(&database.name))
            .flat_map(|sessions| sessions.pids(side).iter().copied())
            .collect();
        let others = server.clients.iter().filter(|client| !known.contains(&client.pid));
        direct.extend(others.filter(|client| !is_young(client)).map(|client| (side, client)));
    }
    let named = direct.iter().map(|(side, client)| {
        format!(
            "{} ({}) from {} on {side}, process {}{}{}",
            client.user,
            client.application,
            client
                .address
                .as_deref()
                .unwrap_or("an address that the proxy's role may not see"),
            client.pid,
            client
                .seconds
                .map_or_else(String::new, |seconds| format!(", connected for {}", span(seconds))),
            if client.writing { ", writing" } else { "" }
        )
    });
    let required = most.map_or_else(|| NOTHING.to_owned(), |most| format!("at most {most}"));
    let open = most.is_none_or(|most| direct.len() <= most as usize);
    gate(
        "sessions past the proxies",
        listed("none", named, direct.len()),
        required,
        open,
    )
}

fn is_young(client: &Client) -> bool {
    client.seconds.is_some_and(|seconds| seconds < YOUNG_SECONDS)
}

fn listed(none: &str, named: impl Iterator<Item = String>, count: usize) -> String {
    let first: Vec<String> = named.take(NAMED).collect();
    match (count, count.saturating_sub(first.len())) {
        (0, _) => none.to_owned(),
        (count, 0) => format!("{count}: {}", first.join("; ")),
        (count, more) => format!("{count}: {}; and {more} more", first.join("; ")),
    }
}
