//! `pgtandem status`: one screen that says where the migration stands and what is wrong.

use super::backfill::{table_line, total_line};
use super::switchover::{print_flip, print_gates};
use super::{print_json, say};
use crate::admin::api::{CanaryStatus, DatabaseStatus, Mirroring, ServerStatus, ShadowReads, Status};
use crate::admin::client::AdminClient;
use crate::reconcile::backfill::BackfillStatus;
use crate::shadow::rehearsal::Rehearsed;

/// Tables shown before the rest is only counted.
const TABLES_MAX: usize = 20;

/// Of the objects that differ, this many are named.
const DIFFERENT_MAX: usize = 8;

pub(super) async fn run(client: &AdminClient, json: bool) -> anyhow::Result<bool> {
    let status: Status = client.get("/api/v1/status").await?;
    let problems = problems(&status);
    if json {
        print_json(&status)?;
    } else {
        print(&status, &problems);
    }
    Ok(problems.is_empty())
}

/// What an operator must look at, a line each.
fn problems(status: &Status) -> Vec<String> {
    let mut problems: Vec<String> = status.problem.iter().cloned().collect();
    if let Some(log) = &status.mismatch_log
        && let Some(error) = &log.failing
    {
        problems.push(format!(
            "the mismatch log cannot be written: {error}; {} mismatches were lost so far",
            log.lost
        ));
    }
    for database in &status.databases {
        let name = &database.name;
        for (side, server) in [("legacy", &database.legacy), ("new", &database.new)] {
            if let Some(error) = &server.error {
                problems.push(format!("{name}: {side} cannot be reached: {error}"));
            }
        }
        if database.shadow_reads.log_lost > 0 {
            problems.push(format!(
                "{name}: {} mismatches could not be written to the log",
                database.shadow_reads.log_lost
            ));
        }
        if let Some(canary) = database.canary.as_ref().filter(|canary| canary.turned_off_by_budget) {
            problems.push(format!(
                "{name}: the canary turned itself off: {}; `pgtandem reload` turns it on again",
                canary.off_because.as_deref().unwrap_or_default()
            ));
        }
        if let Some(seconds) = database.acknowledge.as_ref().and_then(|both| both.degraded_seconds) {
            problems.push(format!(
                "{name}: commits are acknowledged by the primary alone, for {seconds:.1} s: the secondary does not follow within writes.both_timeout"
            ));
        }
        if let Some(backfill) = &database.backfill
            && matches!(backfill.state.as_str(), "stopped" | "interrupted")
        {
            problems.push(format!(
                "{name}: a backfill {}: {}; run `pgtandem backfill` to go on",
                if backfill.state == "stopped" {
                    "has stopped"
                } else {
                    "was interrupted"
                },
                backfill.note.as_deref().unwrap_or_default()
            ));
        }
        let Some(mirroring) = &database.mirroring else {
            continue;
        };
        if let Some(error) = &mirroring.error {
            problems.push(format!("{name}: mirroring is {}: {error}", mirroring.state));
        }
        if mirroring.journal.full {
            problems.push(format!(
                "{name}: the journal is full, writes are refused until it has drained"
            ));
        }
        if mirroring.journal.stopped {
            problems.push(format!(
                "{name}: the journal was full and capture is switched off; the secondary must be seeded again"
            ));
        }
        for sql in &mirroring.sql_for_dba {
            problems.push(format!(
                "{name}: the proxy's role lacks privileges; a DBA must run: {sql}"
            ));
        }
        for error in &mirroring.sequence_errors {
            problems.push(format!("{name}: sequences: {error}"));
        }
        for table in &mirroring.tables {
            if let Some(why) = &table.note {
                problems.push(format!("{name}: {}: {why}", table.name));
            }
            if let Some(why) = &table.paused {
                problems.push(format!(
                    "{name}: mirroring of {} is paused: {why}. `pgtandem schema heal --table {}` brings it in line",
                    table.name, table.name
                ));
            }
        }
        if !mirroring.different.is_empty() {
            problems.push(different(name, &mirroring.different));
        }
        if mirroring.quarantine.transactions > 0 {
            problems.push(format!(
                "{name}: {} transactions are in quarantine, {} of them refused by the secondary; see `pgtandem quarantine list`",
                mirroring.quarantine.transactions, mirroring.quarantine.refused
            ));
        }
        if mirroring.divergences > 0 {
            problems.push(format!(
                "{name}: {} rows were not as expected on the secondary (table pgtandem.divergence there)",
                mirroring.divergences
            ));
        }
        if mirroring.stray_writes > 0 {
            problems.push(format!(
                "{name}: {} writes reached the secondary without pgtandem; see `pgtandem strays`",
                mirroring.stray_writes
            ));
        }
    }
    problems
}

/// What was changed by DDL that nobody saw.
fn different(database: &str, objects: &[String]) -> String {
    let shown = objects
        .iter()
        .take(DIFFERENT_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let more = match objects.len().saturating_sub(DIFFERENT_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "{database}: defined otherwise on the secondary: {shown}{more}. `pgtandem schema heal` brings it in line, `pgtandem schema diff` shows it"
    )
}

fn print(status: &Status, problems: &[String]) {
    say(&format!(
        "phase {}   primary {}   epoch {}   sessions {}/{}   up {} s   (pgtandem {}, pid {})",
        status.phase,
        status.primary,
        status.epoch,
        status.sessions.open,
        status.sessions.limit,
        status.uptime_seconds,
        status.version,
        status.pid
    ));
    if let Some(under_way) = &status.switchover {
        let waiting = match under_way.waiting_for.as_slice() {
            [] => String::new(),
            names => format!(", waiting for {}", names.join(", ")),
        };
        say(&format!(
            "{} to {} under way: {}{waiting} (led by {})",
            under_way.kind.as_str(),
            under_way.to,
            under_way.step,
            under_way.coordinator
        ));
    }
    if status.wish != status.phase {
        say(&format!("proxy.yaml asks for phase {}", status.wish));
    }
    for problem in problems {
        say(&format!("  !  {problem}"));
    }
    for database in &status.databases {
        print_database(database);
    }
    if !status.proxies.is_empty() {
        say("\nproxies");
        for proxy in &status.proxies {
            say(&format!(
                "  {}  {}  {}  phase {}, epoch {}, {} sessions, last seen {:.1} s ago, clock {:+.0} ms",
                proxy.name,
                proxy.address,
                proxy.version,
                proxy.phase,
                proxy.epoch,
                proxy.sessions,
                proxy.silent_seconds,
                proxy.clock_offset_ms
            ));
        }
    }
    if !status.gates.is_empty() {
        say("\ngates of the next switchover");
        print_gates(&status.gates);
    }
    if let Some(flip) = &status.last_flip {
        say("");
        print_flip(flip);
    }
}

fn print_database(database: &DatabaseStatus) {
    say(&format!("\ndatabase {}", database.name));
    print_server("legacy", &database.legacy);
    print_server("new", &database.new);
    match &database.mirroring {
        Some(mirroring) => print_mirroring(mirroring),
        None => say("  mirroring  off in this phase"),
    }
    if let Some(backfill) = &database.backfill {
        print_backfill(backfill);
    }
    if let Some(both) = &database.acknowledge {
        say(&format!(
            "  commits    wait for both sides; {} did not because the secondary was late, {} got an error for it",
            both.answered_early, both.refused
        ));
    }
    print_shadow_reads(&database.shadow_reads);
    if let Some(writes) = &database.rehearsed_writes {
        print_rehearsed(writes);
    }
    if let Some(canary) = &database.canary {
        print_canary(canary);
    }
}

fn print_canary(canary: &CanaryStatus) {
    let counts = &canary.counts;
    let state = match &canary.off_because {
        Some(_) if canary.turned_off_by_budget => "turned itself off".to_owned(),
        Some(why) => format!("off: {why}"),
        None => format!("on for {:.0} s", canary.on_seconds),
    };
    say(&format!(
        "  canary     {state}; {} reads answered by the secondary ({:.1} % of {}), {} read-only transactions{}",
        counts.served,
        canary.share,
        counts.considered,
        counts.transactions,
        since(&canary.since)
    ));
    let fallbacks = &counts.fallbacks;
    say(&format!(
        "             {} errors, {} of both sides; the primary answered instead: {} no connection, {} broken, {} own writes late, {} session, {} types",
        counts.errors,
        counts.both_failed,
        fallbacks.connection,
        fallbacks.broken,
        fallbacks.wait,
        fallbacks.session,
        fallbacks.types
    ));
    let spent = &canary.spent;
    say(&format!(
        "             in the last {:.0} s: {} reads, {:.2} % failed, {:.2} % mismatched, {:.2} times the primary's time",
        canary.window_seconds, spent.reads, spent.errors, spent.mismatches, spent.latency_ratio
    ));
    for off in &canary.turned_off {
        say(&format!("             turned off {}: {}", off.at, off.reason));
    }
}

fn print_server(side: &str, server: &ServerStatus) {
    let state = match (&server.version, &server.error) {
        (_, Some(error)) => format!("cannot be reached: {error}"),
        (Some(version), None) => format!("Postgres {version}"),
        (None, None) => "not asked yet".to_owned(),
    };
    say(&format!("  {side:9}  {}  {state}", server.address));
}

fn print_mirroring(mirroring: &Mirroring) {
    say(&format!(
        "  mirroring  {}, round {}, {} changes applied by this proxy",
        mirroring.state, mirroring.round, mirroring.changes_applied
    ));
    if let Some(applier) = &mirroring.applier {
        say(&format!("  applier    {applier}"));
    }
    say(&format!(
        "  lag        {} transactions, {}, {:.1} s; journal {}",
        mirroring.lag.transactions,
        human_bytes(mirroring.lag.bytes),
        mirroring.lag.seconds,
        human_bytes(mirroring.journal.bytes)
    ));
    if let Some(oldest) = &mirroring.quarantine.oldest {
        say(&format!(
            "  quarantine {} transactions ({} refused), {} changes, the oldest since {oldest}",
            mirroring.quarantine.transactions, mirroring.quarantine.refused, mirroring.quarantine.changes
        ));
    }
    for object in &mirroring.not_mirrored {
        say(&format!("  not mirrored  {object}"));
    }
    let count = |seeding: &str| mirroring.tables.iter().filter(|table| table.seeding == seeding).count();
    say(&format!(
        "  tables     {} synced, {} seeding, {} unseeded",
        count("synced"),
        count("seeding"),
        count("unseeded")
    ));
    let remarkable: Vec<_> = mirroring
        .tables
        .iter()
        .filter(|table| table.seeding != "synced" || table.paused.is_some() || table.diverged > 0)
        .collect();
    for table in remarkable.iter().take(TABLES_MAX) {
        let paused = if table.paused.is_some() { ", paused" } else { "" };
        let diverged = match table.diverged {
            0 => String::new(),
            rows => format!(", {rows} rows diverged"),
        };
        say(&format!(
            "             {}: {}{paused}{diverged}",
            table.name, table.seeding
        ));
    }
    let proved: Vec<_> = mirroring
        .tables
        .iter()
        .filter_map(|table| table.verified.as_ref())
        .collect();
    if let Some(oldest) = proved.iter().min_by_key(|verified| &verified.at) {
        say(&format!(
            "  verified   {} of {} tables, the longest ago at {} (round {})",
            proved.len(),
            mirroring.tables.len(),
            oldest.at,
            oldest.round
        ));
    }
    if remarkable.len() > TABLES_MAX {
        say(&format!("             and {} more", remarkable.len() - TABLES_MAX));
    }
}

fn print_backfill(backfill: &BackfillStatus) {
    say(&format!("  backfill   {}: {}", backfill.state, total_line(backfill)));
    for table in backfill
        .tables
        .iter()
        .filter(|table| table.state == "copying")
        .take(TABLES_MAX)
    {
        say(&format!("             {}: {}", table.name, table_line(table)));
    }
}

fn print_shadow_reads(reads: &ShadowReads) {
    let not_comparable: u64 = reads.not_comparable.values().sum();
    let failed: u64 = reads.failed.values().sum();
    say(&format!(
        "  shadow     {} matched, {} mismatched, {} transient, {not_comparable} not comparable, {} dropped, {failed} failed{}",
        reads.matched,
        reads.mismatched,
        reads.transient,
        reads.dropped,
        since(&reads.since)
    ));
    for (reason, count) in &reads.not_comparable {
        say(&format!("             not comparable: {count} {reason}"));
    }
    for (reason, count) in &reads.failed {
        say(&format!("             failed: {count} {reason}"));
    }
}

/// When counting began.
fn since(rfc3339: &str) -> String {
    rfc3339.get(..19).map_or_else(String::new, |seconds| {
        format!(", since {} UTC", seconds.replacen('T', " ", 1))
    })
}

fn print_rehearsed(writes: &Rehearsed) {
    let counts = &writes.counts;
    let sum = |map: &std::collections::BTreeMap<String, u64>| map.values().sum::<u64>();
    say(&format!(
        "  rehearsed  {} matched, {} mismatched, {} unsettled, {} left out, {} dropped, {} failed{}",
        counts.matched,
        counts.mismatched,
        counts.unsettled,
        sum(&counts.left_out),
        sum(&counts.dropped),
        sum(&counts.failed),
        since(&writes.since)
    ));
    for (what, reasons) in [("left out", &counts.left_out), ("failed", &counts.failed)] {
        for (reason, count) in reasons {
            say(&format!("             {what}: {count} {reason}"));
        }
    }
}

/// `1.5 MiB`; powers of 1024.
pub(super) fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::human_bytes;

    #[test]
    fn bytes_for_people() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 30, "10.0 GiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
