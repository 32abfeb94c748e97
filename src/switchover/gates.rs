//! What must hold before a flip, measured from the status. Pure.
//!
//! A gate without a threshold in `switchover.gates` shows what was measured and stays open.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::admin::api::{CanaryStatus, DatabaseStatus, Gate, Mirroring, Proxy, ServerStatus, ShadowReads, TableStatus};
use crate::config::Gates;
use crate::control::Side;

/// What a gate without a threshold requires.
const NOTHING: &str = "nothing";

/// What the gates are judged by.
pub struct Measured<'a> {
    pub databases: &'a [DatabaseStatus],
    pub proxies: &'a [Proxy],
    /// The side that is primary; the flip leads away from it.
    pub primary: Side,
    pub thresholds: &'a Gates,
    pub now: OffsetDateTime,
}

/// Every gate with what was measured; a flip needs all of them open.
pub fn gates(measured: &Measured<'_>) -> Vec<Gate> {
    let mut gates: Vec<Gate> = measured
        .databases
        .iter()
        .flat_map(|database| of_database(measured, database))
        .collect();
    gates.extend(clocks(measured.proxies, measured.thresholds.clock_offset));
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
    let thresholds = measured.thresholds;
    let mut gates = vec![reachable(database)];
    match &database.mirroring {
        None => gates.push(gate("mirroring", "off", "running", false)),
        Some(mirroring) => {
            let (primary, secondary) = match measured.primary {
                Side::Legacy => (&database.legacy, &database.new),
                Side::New => (&database.new, &database.legacy),
            };
            gates.extend([
                running(mirroring),
                lag(mirroring, thresholds.lag),
                not_synced(mirroring),
                definitions(mirroring),
                way_back(mirroring),
                reverse_capture(secondary),
                quarantine(mirroring),
                gate(
                    "divergences",
                    mirroring.divergences.to_string(),
                    "0",
                    mirroring.divergences == 0,
                ),
                verification(&mirroring.tables, thresholds.verified_within, measured.now),
                shadow_coverage(&database.shadow_reads, thresholds.shadow_coverage),
                shadow_match_rate(&database.shadow_reads, thresholds.shadow_match_rate),
                canary(database.canary.as_ref(), thresholds.canary),
                prepared(primary, thresholds.prepared),
                strays(secondary, thresholds.no_strays_for),
            ]);
        }
    }
    for gate in &mut gates {
        gate.name = format!("{}: {}", database.name, gate.name);
    }
    gates
}

fn reachable(database: &DatabaseStatus) -> Gate {
    let measured = match (&database.legacy.error, &database.new.error) {
        (None, None) => "both answer".to_owned(),
        (Some(error), _) => format!("legacy: {error}"),
        (None, Some(error)) => format!("new: {error}"),
    };
    let open = database.legacy.error.is_none() && database.new.error.is_none();
    gate("both sides reachable", measured, "both answer", open)
}

fn running(mirroring: &Mirroring) -> Gate {
    let measured = match &mirroring.error {
        Some(error) => format!("{}: {error}", mirroring.state),
        None => mirroring.state.clone(),
    };
    // Another proxy may be the one that applies.
    let open = mirroring.state == "running" || (mirroring.state == "waiting" && mirroring.applier.is_some());
    gate("mirroring", measured, "running", open)
}

/// A flip waits for the last round under the hold: a greater lag would make clients wait.
fn lag(mirroring: &Mirroring, most: Duration) -> Gate {
    let seconds = mirroring.lag.seconds;
    gate(
        "lag",
        format!("{seconds:.1} s"),
        format!("at most {}", span(most.as_secs_f64())),
        seconds <= most.as_secs_f64(),
    )
}

fn not_synced(mirroring: &Mirroring) -> Gate {
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
fn definitions(mirroring: &Mirroring) -> Gate {
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

fn way_back(mirroring: &Mirroring) -> Gate {
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
fn reverse_capture(secondary: &ServerStatus) -> Gate {
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

fn quarantine(mirroring: &Mirroring) -> Gate {
    let held = &mirroring.quarantine;
    let measured = match &held.error {
        Some(error) => format!("{} transactions, the oldest: {error}", held.transactions),
        None => "empty".to_owned(),
    };
    gate("quarantine", measured, "empty", held.transactions == 0)
}

/// The table that was found equal longest ago, or never (in this direction).
fn verification(tables: &[TableStatus], within: Option<Duration>, now: OffsetDateTime) -> Gate {
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
fn shadow_coverage(reads: &ShadowReads, least: Option<f64>) -> Gate {
    let compared = compared(reads);
    let others: u64 = reads.not_comparable.values().chain(reads.failed.values()).sum();
    let all = compared + others + reads.skipped + reads.dropped;
    share_gate("shadow coverage", compared, all, "reads compared", least)
}

fn shadow_match_rate(reads: &ShadowReads, least: Option<f64>) -> Gate {
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

/// Clients have been served by the side that is to become primary.
fn canary(canary: Option<&CanaryStatus>, least: Option<Duration>) -> Gate {
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

/// One that has written holds the fence open: the flip would wait for it and be given up.
fn prepared(primary: &ServerStatus, most: Duration) -> Gate {
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

/// What is recorded where `stray_writers: report` lets them pass.
fn strays(secondary: &ServerStatus, quiet: Option<Duration>) -> Gate {
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

/// One for all databases: the proxy whose clock is furthest from the primary's.
fn clocks(proxies: &[Proxy], most: Option<Duration>) -> Option<Gate> {
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

/// `12 s`, `3 min`, `26 h`
fn span(seconds: f64) -> String {
    match seconds {
        short if short < 10.0 => format!("{} s", (short * 10.0).round() / 10.0),
        short if short < 120.0 => format!("{short:.0} s"),
        long if long < 7200.0 => format!("{:.0} min", long / 60.0),
        long => format!("{:.0} h", long / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::{Journal, Lag, LastStray, OldestPrepared, Quarantine};
    use crate::apply::Verified;
    use crate::control::Epoch;
    use crate::shadow::CanaryCounts;

    fn healthy() -> DatabaseStatus {
        DatabaseStatus {
            name: "shop".into(),
            legacy: ServerStatus::default(),
            new: ServerStatus::default(),
            mirroring: Some(Mirroring {
                state: "running".into(),
                error: None,
                applier: None,
                round: 7,
                watermark: None,
                changes_applied: 0,
                lag: Lag::default(),
                journal: Journal::default(),
                not_mirrored: Vec::new(),
                sql_for_dba: Vec::new(),
                different: Vec::new(),
                one_way: Vec::new(),
                sequence_errors: Vec::new(),
                position: None,
                transactions_applied: 0,
                tables: vec![table("synced", None)],
                divergences: 0,
                stray_writes: 0,
                quarantine: Quarantine::default(),
            }),
            shadow_reads: ShadowReads::default(),
            acknowledge: None,
            canary: None,
            backfill: None,
        }
    }

    fn table(seeding: &str, paused: Option<&str>) -> TableStatus {
        TableStatus {
            name: "public.t".into(),
            seeding: seeding.into(),
            paused: paused.map(str::to_owned),
            note: None,
            diverged: 0,
            verified: None,
        }
    }

    const NOW: &str = "2026-03-01T12:00:00Z";

    fn judged(database: DatabaseStatus, proxies: &[Proxy], thresholds: &Gates) -> Vec<Gate> {
        gates(&Measured {
            databases: &[database],
            proxies,
            primary: Side::Legacy,
            thresholds,
            now: OffsetDateTime::parse(NOW, &Rfc3339).unwrap(),
        })
    }

    fn closed(change: impl FnOnce(&mut DatabaseStatus)) -> Vec<String> {
        let mut database = healthy();
        change(&mut database);
        let gates = judged(database, &[], &Gates::default());
        gates
            .into_iter()
            .filter(|gate| !gate.open)
            .map(|gate| gate.name)
            .collect()
    }

    fn mirroring(database: &mut DatabaseStatus) -> &mut Mirroring {
        database.mirroring.as_mut().unwrap()
    }

    #[test]
    fn each_fault_closes_its_gate_and_no_other() {
        assert_eq!(closed(|_| {}), Vec::<String>::new());
        assert_eq!(
            closed(|d| d.new.error = Some("refused".into())),
            ["shop: both sides reachable"]
        );
        assert_eq!(closed(|d| d.mirroring = None), ["shop: mirroring"]);
        assert_eq!(closed(|d| mirroring(d).state = "failing".into()), ["shop: mirroring"]);
        assert_eq!(closed(|d| mirroring(d).state = "halted".into()), ["shop: mirroring"]);
        assert_eq!(
            closed(|d| mirroring(d).quarantine.transactions = 1),
            ["shop: quarantine"]
        );
        assert_eq!(closed(|d| mirroring(d).lag.seconds = 2.5), ["shop: lag"]);
        assert_eq!(closed(|d| mirroring(d).divergences = 1), ["shop: divergences"]);
        assert_eq!(
            closed(|d| mirroring(d).different.push("index public.i".into())),
            ["shop: definitions"]
        );
        assert_eq!(
            closed(|d| mirroring(d).one_way.push("public.t.fax: it has no inverse".into())),
            ["shop: way back"]
        );
        assert_eq!(
            closed(|d| mirroring(d).tables.push(table("unseeded", None))),
            ["shop: tables"]
        );
        assert_eq!(
            closed(|d| mirroring(d).tables.push(table("synced", Some("columns differ")))),
            ["shop: tables"]
        );
    }

    /// What the gate of that name says under `thresholds`: measured, required, open.
    fn says(name: &str, thresholds: &Gates, change: impl FnOnce(&mut DatabaseStatus)) -> (String, String, bool) {
        let mut database = healthy();
        change(&mut database);
        let gates = judged(database, &[], thresholds);
        let gate = gates.into_iter().find(|gate| gate.name == format!("shop: {name}"));
        gate.map(|gate| (gate.measured, gate.required, gate.open)).unwrap()
    }

    #[track_caller]
    fn check(said: (String, String, bool), measured: &str, required: &str, open: bool) {
        assert_eq!((said.0.as_str(), said.1.as_str(), said.2), (measured, required, open));
    }

    #[test]
    fn without_thresholds_the_evidence_is_shown_and_closes_nothing() {
        for (name, measured) in [
            ("verification", "public.t never was"),
            ("shadow coverage", "there were no reads compared"),
            ("shadow match rate", "there were no compared reads alike"),
            ("stray writers", "none recorded"),
        ] {
            check(says(name, &Gates::default(), |_| {}), measured, NOTHING, true);
        }
    }

    #[test]
    fn verification_goes_by_the_table_that_was_compared_longest_ago() {
        let within = |hours: u64| Gates {
            verified_within: Some(Duration::from_secs(hours * 3600)),
            ..Gates::default()
        };
        let at = |at: &str| {
            let mut table = table("synced", None);
            table.verified = Some(Verified {
                at: at.into(),
                round: 3,
                position: "0/0".into(),
            });
            table
        };
        let two = |database: &mut DatabaseStatus| {
            mirroring(database).tables = vec![at("2026-03-01T11:00:00Z"), at("2026-02-28T10:00:00Z")];
        };
        let equal = "all tables found equal, public.t longest ago: 26 h";
        check(
            says("verification", &within(24), two),
            equal,
            "every table found equal within 24 h",
            false,
        );
        check(
            says("verification", &within(48), two),
            equal,
            "every table found equal within 48 h",
            true,
        );
        let one_never = |database: &mut DatabaseStatus| {
            mirroring(database).tables = vec![at("2026-03-01T11:00:00Z"), table("synced", None)];
        };
        check(
            says("verification", &within(24), one_never),
            "public.t never was",
            "every table found equal within 24 h",
            false,
        );
    }

    #[test]
    fn shadow_reads_need_evidence_where_a_share_is_asked_for() {
        let asked = Gates {
            shadow_coverage: Some(20.0),
            shadow_match_rate: Some(99.0),
            ..Gates::default()
        };
        let reads = |database: &mut DatabaseStatus| {
            database.shadow_reads = ShadowReads {
                matched: 97,
                transient: 1,
                mismatched: 2,
                skipped: 299,
                failed: [("timeout".to_owned(), 1)].into(),
                ..ShadowReads::default()
            };
        };
        check(
            says("shadow coverage", &asked, reads),
            "25.00 % (100 of 400 reads compared)",
            "at least 20 %",
            true,
        );
        check(
            says("shadow match rate", &asked, reads),
            "98.00 % (98 of 100 compared reads alike)",
            "at least 99 %",
            false,
        );
        assert!(
            !says("shadow coverage", &asked, |_| {}).2,
            "nothing is proved by no reads"
        );
        assert!(!says("shadow match rate", &asked, |_| {}).2);
    }

    #[test]
    fn a_canary_must_have_been_on_where_that_is_asked_for() {
        let asked = Gates {
            canary: Some(Duration::from_secs(3600)),
            ..Gates::default()
        };
        let canary = |on_seconds: f64, turned_off_by_budget: bool| {
            move |database: &mut DatabaseStatus| {
                database.canary = Some(CanaryStatus {
                    on: !turned_off_by_budget,
                    turned_off_by_budget,
                    on_seconds,
                    counts: CanaryCounts {
                        served: 900,
                        errors: 2,
                        compared: 800,
                        mismatched: 1,
                        ..CanaryCounts::default()
                    },
                    ..CanaryStatus::default()
                });
            }
        };
        let required = "on for 60 min, and not turned off since";
        check(
            says("canary", &asked, canary(7201.0, false)),
            "on for 2 h; 900 reads, 2 failed, 1 of 800 compared were mismatches",
            required,
            true,
        );
        check(
            says("canary", &asked, canary(600.0, false)),
            "on for 10 min; 900 reads, 2 failed, 1 of 800 compared were mismatches",
            required,
            false,
        );
        check(
            says("canary", &asked, canary(7201.0, true)),
            "turned itself off; 900 reads, 2 failed, 1 of 800 compared were mismatches",
            required,
            false,
        );
        check(
            says("canary", &asked, |_| {}),
            "no read was meant for the secondary",
            required,
            false,
        );
        assert!(says("canary", &Gates::default(), |_| {}).2);
    }

    #[test]
    fn what_the_servers_tell_is_asked_of_the_right_side() {
        let old = |seconds| {
            Some(OldestPrepared {
                gid: "p1".into(),
                seconds,
            })
        };
        let by = Gates::default();
        let name = "prepared transactions";
        check(says(name, &by, |_| {}), "none", "none for longer than 60 s", true);
        check(
            says(name, &by, |d| d.legacy.prepared = old(59.0)),
            "p1 for 59 s",
            "none for longer than 60 s",
            true,
        );
        check(
            says(name, &by, |d| d.legacy.prepared = old(180.0)),
            "p1 for 3 min",
            "none for longer than 60 s",
            false,
        );
        assert!(
            says(name, &by, |d| d.new.prepared = old(180.0)).2,
            "on the secondary it is in nobody's way"
        );
        let quiet = Gates {
            no_strays_for: Some(Duration::from_secs(3600)),
            ..by
        };
        let stray = |seconds| {
            let who = "cron () on public.t".to_owned();
            Some(LastStray { seconds, who })
        };
        check(
            says("stray writers", &quiet, |d| d.new.stray = stray(12.0)),
            "cron () on public.t, 12 s ago",
            "none within 60 min",
            false,
        );
        assert!(says("stray writers", &quiet, |d| d.new.stray = stray(3601.0)).2);
        assert!(says("stray writers", &quiet, |d| d.legacy.stray = stray(12.0)).2);
        assert_eq!(
            closed(|d| d.new.uncapturable.push("public.theirs".into())),
            ["shop: reverse capture"]
        );
    }

    #[test]
    fn the_clock_that_is_furthest_off_decides() {
        let proxy = |name: &str, clock_offset_ms| Proxy {
            name: name.into(),
            address: String::new(),
            version: String::new(),
            phase: "dual_read".into(),
            epoch: Epoch(1),
            silent_seconds: 0.1,
            clock_offset_ms,
        };
        let proxies = [proxy("a", 40.0), proxy("b", -700.0)];
        let by = |offset| Gates {
            clock_offset: offset,
            ..Gates::default()
        };
        for (threshold, required, open) in [
            (None, NOTHING, true),
            (Some(Duration::from_millis(500)), "at most 0.5 s off", false),
            (Some(Duration::from_secs(1)), "at most 1 s off", true),
        ] {
            let gate = judged(healthy(), &proxies, &by(threshold)).pop().unwrap();
            assert_eq!(gate.name, "clocks of the proxies");
            check((gate.measured, gate.required, gate.open), "-700 ms: b", required, open);
        }
    }
}
