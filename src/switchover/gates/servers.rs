//! What the servers and the proxies' hosts bring along.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Measured, NOTHING, gate, span};
use crate::admin::api::{DatabaseStatus, Gate, Proxy, ServerStatus};
use crate::control::Side;

/// The fence waits for it: one that nobody ends has the flip given up.
pub(super) fn prepared(primary: &ServerStatus, most: Duration) -> Gate {
    let required = format!("none for longer than {}", span(most.as_secs_f64()));
    match &primary.prepared {
        None => gate("prepared transactions", "none", required, true),
        Some(oldest) => gate(
            "prepared transactions",
            format!("{} for {}", oldest.gid, span(oldest.seconds)),
            required,
            oldest.seconds <= most.as_secs_f64(),
        ),
    }
}

/// One for all databases: the proxy whose clock is furthest from the primary's.
pub(super) fn clocks(proxies: &[Proxy], most: Option<Duration>) -> Option<Gate> {
    let furthest = proxies
        .iter()
        .max_by(|a, b| a.clock_offset_ms.abs().total_cmp(&b.clock_offset_ms.abs()))?;
    let required = most.map_or_else(
        || NOTHING.to_owned(),
        |most| format!("at most {} off", span(most.as_secs_f64())),
    );
    Some(gate(
        "clocks of the proxies",
        format!("{:+.0} ms: {}", furthest.clock_offset_ms, furthest.name),
        required,
        most.is_none_or(|most| furthest.clock_offset_ms.abs() <= most.as_secs_f64() * 1000.0),
    ))
}

/// Connections that the flip itself opens to the side that becomes primary.
const OF_THE_FLIP: i64 = 3;

/// Every session of every proxy gets a connection to the side that becomes primary before anybody is
/// held. Of the server's limits, its role's and the database's, the tightest one decides.
pub(super) fn connections(
    measured: &Measured<'_>,
    database: &DatabaseStatus,
    secondary: &ServerStatus,
) -> Option<Gate> {
    let there = secondary.connections.as_ref()?;
    let spare = i64::from(measured.policy.gates.spare_connections);
    let of = |name: &str| sessions_of(measured, name);
    let sessions_here = total(&of(&database.name));
    // Databases of one server share it.
    let on_server = measured.databases.iter().filter(|other| {
        let other = match measured.primary {
            Side::Legacy => &other.new,
            Side::New => &other.legacy,
        };
        server_of(other) == server_of(secondary)
    });
    let sessions_on_server: i64 = on_server.map(|other| total(&of(&other.name))).sum();
    let mut limits = vec![(
        "the server".to_owned(),
        there.limit - there.used,
        sessions_on_server + OF_THE_FLIP + spare,
    )];
    if let Some(limit) = &there.database {
        let needed = sessions_here + OF_THE_FLIP + spare;
        limits.push((format!("database {}", database.name), limit.limit - limit.used, needed));
    }
    for (user, sessions) in of(&database.name) {
        if let Some(limit) = there.roles.get(&user) {
            limits.push((format!("role {user}"), limit.limit - limit.used, sessions + spare));
        }
    }
    let (whose, free, needed) = limits.into_iter().min_by_key(|(_, free, needed)| free - needed)?;
    Some(gate(
        "connections",
        format!("{whose} has {free} left for {sessions_here} sessions"),
        format!("at least {needed} left"),
        free >= needed,
    ))
}

fn server_of(server: &ServerStatus) -> &str {
    server.address.rsplit_once('/').map_or("", |(address, _)| address)
}

/// A database's sessions through all proxies, by user.
fn sessions_of(measured: &Measured<'_>, database: &str) -> BTreeMap<String, i64> {
    let mut users = BTreeMap::new();
    for proxy in measured.sessions.iter().filter(|proxy| proxy.answers) {
        for (user, count) in proxy
            .survey
            .databases
            .get(database)
            .into_iter()
            .flat_map(|of| &of.users)
        {
            *users.entry(user.clone()).or_default() += i64::try_from(*count).unwrap_or(i64::MAX);
        }
    }
    users
}

fn total(users: &BTreeMap<String, i64>) -> i64 {
    users.values().sum()
}

/// What each database takes, against what the operator says that it may: how much is free on a
/// server's disk cannot be asked over SQL. On the side that becomes primary the journal may grow to
/// its bound.
pub(super) fn disk(measured: &Measured<'_>, database: &DatabaseStatus) -> Gate {
    let capacity = &measured.policy.gates.disk;
    let (mut said, mut required, mut open) = (Vec::new(), Vec::new(), true);
    for (side, server, capacity) in [
        (Side::Legacy, &database.legacy, capacity.legacy),
        (Side::New, &database.new, capacity.new),
    ] {
        let journal = if side == measured.primary {
            0
        } else {
            measured.journal_max
        };
        said.push(match server.database_bytes {
            None => format!("{side}: not known"),
            Some(bytes) if journal == 0 => format!("{side}: {}", size(bytes)),
            Some(bytes) => format!("{side}: {} and up to {} of journal", size(bytes), size(journal)),
        });
        if let Some(capacity) = capacity {
            required.push(format!("{side}: at most {}", size(capacity)));
            let needed = server.database_bytes.map(|bytes| bytes.saturating_add(journal));
            open &= needed.is_some_and(|needed| needed <= capacity);
        }
    }
    let required = match required.as_slice() {
        [] => NOTHING.to_owned(),
        some => some.join(", "),
    };
    gate("disk", said.join(", "), required, open)
}

/// `512 MiB`, `1.5 GiB`
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        small if small < 1024.0 => format!("{:.0} MiB", small.max(1.0)),
        large if large < 1024.0 * 1024.0 => format!("{:.1} GiB", large / 1024.0),
        huge => format!("{:.1} TiB", huge / (1024.0 * 1024.0)),
    }
}
