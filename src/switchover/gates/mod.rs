//! What must hold before a flip, measured from the status. Pure.
//!
//! A gate without a threshold in `switchover.gates` shows what was measured and stays open.

mod evidence;
mod mirroring;
mod servers;
mod sessions;
#[cfg(test)]
mod tests;

use time::OffsetDateTime;

use super::machine::Kind;
use super::sessions::Survey;
use crate::admin::api::{DatabaseStatus, Gate, Proxy};
use crate::config::Switchover;
use crate::control::Side;

/// What a gate without a threshold requires.
const NOTHING: &str = "nothing";
/// The gate that says which sessions a flip could not carry over.
const TO_CARRY: &str = "sessions to carry over";

/// What the gates are judged by.
pub struct Measured<'a> {
    pub databases: &'a [DatabaseStatus],
    pub proxies: &'a [Proxy],
    pub sessions: &'a [OfProxy<'a>],
    /// The side that is primary; the flip leads away from it.
    pub primary: Side,
    pub policy: &'a Switchover,
    /// Bytes that the journal may grow to.
    pub journal_max: u64,
    pub now: OffsetDateTime,
}

/// One proxy's sessions, as it told of them.
pub struct OfProxy<'a> {
    pub name: &'a str,
    /// It is not silent: a flip would wait for it, and carry its sessions over.
    pub answers: bool,
    pub survey: &'a Survey,
}

/// The first closed gate that is in the way. Sessions that stay where they are are in the way of no
/// rehearsal: it is there to find them.
pub fn in_the_way(gates: &[Gate], kind: Kind) -> Option<&Gate> {
    let told_by_a_rehearsal = |gate: &&Gate| kind == Kind::Rehearsal && gate.name == TO_CARRY;
    gates.iter().find(|gate| !gate.open && !told_by_a_rehearsal(gate))
}

/// Every gate with what was measured; a flip needs all of them open.
pub fn gates(measured: &Measured<'_>) -> Vec<Gate> {
    let mut gates: Vec<Gate> = measured
        .databases
        .iter()
        .flat_map(|database| of_database(measured, database))
        .collect();
    if measured.databases.iter().any(|database| database.mirroring.is_some()) {
        gates.push(sessions::uncarriable(measured.sessions, measured.policy.stragglers));
    }
    gates.extend(servers::clocks(measured.proxies, measured.policy.gates.clock_offset));
    gates
}

/// A gate of the database whose name is put before it later.
fn gate(what: &str, measured: impl Into<String>, required: impl Into<String>, open: bool) -> Gate {
    Gate {
        name: what.to_owned(),
        measured: measured.into(),
        required: required.into(),
        open,
    }
}

fn of_database(measured: &Measured<'_>, database: &DatabaseStatus) -> Vec<Gate> {
    let thresholds = &measured.policy.gates;
    let mut gates = vec![mirroring::reachable(database)];
    match &database.mirroring {
        None => gates.push(gate("mirroring", "off", "running", false)),
        Some(mirrored) => {
            let (primary, secondary) = match measured.primary {
                Side::Legacy => (&database.legacy, &database.new),
                Side::New => (&database.new, &database.legacy),
            };
            gates.extend([
                mirroring::running(mirrored),
                mirroring::lag(mirrored, thresholds.lag),
                mirroring::not_synced(mirrored),
                mirroring::definitions(mirrored),
                mirroring::way_back(mirrored),
                mirroring::reverse_capture(secondary),
                mirroring::quarantine(mirrored),
                gate(
                    "divergences",
                    mirrored.divergences.to_string(),
                    "0",
                    mirrored.divergences == 0,
                ),
                evidence::verification(&mirrored.tables, thresholds.verified_within, measured.now),
                evidence::shadow_coverage(&database.shadow_reads, thresholds.shadow_coverage),
                evidence::shadow_match_rate(&database.shadow_reads, thresholds.shadow_match_rate),
                evidence::canary(database.canary.as_ref(), thresholds.canary),
                servers::prepared(primary, thresholds.prepared),
                evidence::strays(secondary, thresholds.no_strays_for),
                sessions::past_the_proxies(measured, database),
                servers::disk(measured, database),
            ]);
            gates.extend(servers::connections(measured, database, secondary));
        }
    }
    for gate in &mut gates {
        gate.name = format!("{}: {}", database.name, gate.name);
    }
    gates
}

/// `12 s`, `3 min`, `26 h`
fn span(seconds: f64) -> String {
    match seconds {
        short if short < 10.0 => format!("{} s", (short * 10.0).round() / 10.0),
        short if short < 120.0 => format!("{short:.0} s"),
        long if long < 7200.0 => format!("{:.0} min", long / 60.0),
        long => format!("{:.0} h", long / 3600.0),
    }
}
