//! The gauges of `/metrics`: the status, once a second, as numbers. Counters are kept where
//! things happen (the shadow reads').

use std::sync::Arc;
use std::time::Duration;

use metrics::{describe_gauge, describe_histogram, gauge};

use super::world::World;
use crate::admin::api::{DatabaseStatus, Mirroring};
use crate::control::Phase;
use crate::session::count_by_state;
use crate::switchover::Step;

const EVERY: Duration = Duration::from_secs(1);

/// Publishes as long as the process lives.
pub(super) async fn publish(world: Arc<World>) {
    describe();
    loop {
        let control = world.control_now();
        for phase in [
            Phase::Initial,
            Phase::DualWrite,
            Phase::DualRead,
            Phase::Switchover,
            Phase::Complete,
        ] {
            gauge!("pgtandem_phase", "phase" => phase.as_str()).set(one_if(phase == control.phase));
        }
        gauge!("pgtandem_epoch").set(control.epoch.0 as f64);
        gauge!("pgtandem_problem").set(one_if(world.facts().problem.is_some()));
        let under_way = world.under_way().map(|under_way| under_way.step);
        for step in Step::ALL {
            gauge!("pgtandem_switchover_step", "step" => step.as_str()).set(one_if(under_way == Some(step)));
        }
        gauge!("pgtandem_proxies").set(world.proxies().len() as f64);
        let sessions = count_by_state(&world.sessions.registry.sessions());
        for state in ["opening", "waiting", "idle", "active", "in_transaction", "reading"] {
            let count = sessions.get(state).copied().unwrap_or(0);
            gauge!("pgtandem_sessions", "state" => state).set(count as f64);
        }
        let log = world.shadows.log().status();
        gauge!("pgtandem_mismatch_log_failing").set(one_if(log.failing.is_some()));
        gauge!("pgtandem_mismatch_log_lines").set(log.head.seq as f64);
        gauge!("pgtandem_mismatch_log_lost").set(log.lost as f64);
        for database in world.databases().await {
            of_database(&database);
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn of_database(status: &DatabaseStatus) {
    let name = || status.name.clone();
    for (side, server) in [("legacy", &status.legacy), ("new", &status.new)] {
        gauge!("pgtandem_server_up", "database" => name(), "side" => side).set(one_if(server.version.is_some()));
    }
    let running = status
        .mirroring
        .as_ref()
        .is_some_and(|mirroring| mirroring.state == "running");
    gauge!("pgtandem_mirroring_running", "database" => name()).set(one_if(running));
    if let Some(both) = &status.acknowledge {
        gauge!("pgtandem_acknowledge_degraded", "database" => name()).set(one_if(both.degraded_seconds.is_some()));
        gauge!("pgtandem_acknowledge_early", "database" => name()).set(both.answered_early as f64);
        gauge!("pgtandem_acknowledge_refused", "database" => name()).set(both.refused as f64);
    }
    if let Some(canary) = &status.canary {
        for (gauge_name, value) in [
            ("pgtandem_canary_on", one_if(canary.on)),
            ("pgtandem_canary_turned_off", one_if(canary.turned_off_by_budget)),
            ("pgtandem_canary_share_percent", canary.share),
            ("pgtandem_canary_window_errors_percent", canary.spent.errors),
            ("pgtandem_canary_window_mismatches_percent", canary.spent.mismatches),
            ("pgtandem_canary_window_latency_ratio", canary.spent.latency_ratio),
            ("pgtandem_canary_waits", canary.counts.waits as f64),
            ("pgtandem_canary_waited_seconds", canary.counts.waited_ms / 1000.0),
        ] {
            gauge!(gauge_name, "database" => name()).set(value);
        }
    }
    if let Some(mirroring) = &status.mirroring {
        of_mirroring(&status.name, mirroring);
    }
}

fn of_mirroring(database: &str, mirroring: &Mirroring) {
    let paused = mirroring.tables.iter().filter(|table| table.paused.is_some()).count();
    for (gauge_name, value) in [
        ("pgtandem_round", mirroring.round as f64),
        ("pgtandem_lag_seconds", mirroring.lag.seconds),
        ("pgtandem_lag_bytes", mirroring.lag.bytes as f64),
        ("pgtandem_lag_transactions", mirroring.lag.transactions as f64),
        ("pgtandem_journal_bytes", mirroring.journal.bytes as f64),
        ("pgtandem_changes_applied", mirroring.changes_applied as f64),
        ("pgtandem_divergences", mirroring.divergences as f64),
        ("pgtandem_stray_writes", mirroring.stray_writes as f64),
        ("pgtandem_tables_paused", paused as f64),
        (
            "pgtandem_quarantine_transactions",
            mirroring.quarantine.transactions as f64,
        ),
        (
            "pgtandem_quarantine_oldest_seconds",
            mirroring.quarantine.oldest_seconds as f64,
        ),
        ("pgtandem_mirroring_halted", one_if(mirroring.state == "halted")),
    ] {
        gauge!(gauge_name, "database" => database.to_owned()).set(value);
    }
    if let Some(position) = mirroring.position.as_deref().and_then(log_position) {
        gauge!("pgtandem_watermark_position_bytes", "database" => database.to_owned()).set(position);
    }
    for seeding in ["unseeded", "seeding", "synced"] {
        let count = mirroring.tables.iter().filter(|table| table.seeding == seeding).count();
        gauge!("pgtandem_tables", "database" => database.to_owned(), "seeding" => seeding).set(count as f64);
    }
}

fn describe() {
    for (name, what) in [
        ("pgtandem_phase", "1 for the phase that is served"),
        ("pgtandem_epoch", "grows with every flip"),
        (
            "pgtandem_problem",
            "1 while proxy.yaml's phase is not what is served; status says why",
        ),
        (
            "pgtandem_mismatch_log_failing",
            "1 while the mismatch log cannot be written; status says why",
        ),
        (
            "pgtandem_mismatch_log_lines",
            "number of the mismatch log's newest line",
        ),
        (
            "pgtandem_mismatch_log_lost",
            "mismatches that could not be written since the proxy started",
        ),
        (
            "pgtandem_switchover_step",
            "1 for the step of a switchover that is under way",
        ),
        (
            "pgtandem_proxies",
            "proxies on the pair that were heard of within a minute",
        ),
        ("pgtandem_sessions", "client sessions"),
        ("pgtandem_server_up", "1 while the server answers"),
        ("pgtandem_mirroring_running", "1 while rounds are applied"),
        (
            "pgtandem_acknowledge_degraded",
            "1 while commits are acknowledged by the primary alone because the secondary is late",
        ),
        (
            "pgtandem_acknowledge_early",
            "commits that were acknowledged by the primary alone for that",
        ),
        (
            "pgtandem_acknowledge_refused",
            "commits whose client got an error for that",
        ),
        ("pgtandem_canary_on", "1 while the secondary may answer reads"),
        (
            "pgtandem_canary_turned_off",
            "1 since canary reads exceeded their budget, until a reload",
        ),
        (
            "pgtandem_canary_share_percent",
            "of the reads considered, answered by the secondary",
        ),
        (
            "pgtandem_canary_window_errors_percent",
            "canary reads that failed on the secondary alone, in the budget's window",
        ),
        (
            "pgtandem_canary_window_mismatches_percent",
            "canary reads that were confirmed mismatches, in the budget's window",
        ),
        (
            "pgtandem_canary_window_latency_ratio",
            "the secondary's time of the primary's for the same reads, in the budget's window",
        ),
        (
            "pgtandem_canary_waits",
            "reads that waited for their session's own writes",
        ),
        ("pgtandem_canary_waited_seconds", "how long they waited in all"),
        ("pgtandem_round", "the last applied round"),
        ("pgtandem_lag_seconds", "since the secondary last equalled the primary"),
        ("pgtandem_lag_bytes", "of the primary's log beyond the watermark"),
        ("pgtandem_lag_transactions", "committed and not yet applied, at most"),
        ("pgtandem_journal_bytes", "size of the journal's tables on the primary"),
        ("pgtandem_changes_applied", "since the applier connected"),
        (
            "pgtandem_divergences",
            "rows that were not as expected on the secondary",
        ),
        (
            "pgtandem_stray_writes",
            "writes that reached the secondary past pgtandem and that nobody acknowledged",
        ),
        (
            "pgtandem_quarantine_transactions",
            "transactions in quarantine: refused by the secondary, or following one that was",
        ),
        ("pgtandem_quarantine_oldest_seconds", "since the oldest was put there"),
        (
            "pgtandem_mirroring_halted",
            "1 while mirroring has stopped because too much was refused",
        ),
        ("pgtandem_tables_paused", "tables whose mirroring is paused"),
        ("pgtandem_tables", "mirrored tables by seeding state"),
        (
            "pgtandem_watermark_position_bytes",
            "the watermark's place in the primary's log",
        ),
    ] {
        describe_gauge!(name, what);
    }
    describe_histogram!(
        "pgtandem_switchover_step_seconds",
        "how long the steps of switchovers and rehearsals took that this proxy led"
    );
}

fn one_if(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

/// `16/B374D848` as bytes since the log's beginning.
fn log_position(text: &str) -> Option<f64> {
    let (high, low) = text.split_once('/')?;
    let parse = |part| u64::from_str_radix(part, 16).ok();
    Some((parse(high)? << 32 | parse(low)?) as f64)
}

#[cfg(test)]
mod tests {
    use super::log_position;

    #[test]
    fn log_positions() {
        assert_eq!(log_position("0/10"), Some(16.0));
        assert_eq!(log_position("1/0"), Some(4_294_967_296.0));
        assert_eq!(log_position("none"), None);
    }
}
