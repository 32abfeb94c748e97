use std::time::Duration;

use time::format_description::well_known::Rfc3339;

use super::super::sessions::OfDatabase;
use super::*;
use crate::admin::api::{
    CanaryStatus, Client, ConnectionLimit, Connections, Mirroring, ServerStatus, SessionInTheWay, ShadowReads,
    TableStatus,
};
use crate::admin::api::{Journal, Lag, LastStray, OldestPrepared, Quarantine};
use crate::apply::Verified;
use crate::config::{Capacity, Gates, Stragglers};
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
        rehearsed_writes: None,
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
        sessions: &[],
        primary: Side::Legacy,
        policy: &policy(thresholds),
        journal_max: 1 << 30,
        now: OffsetDateTime::parse(NOW, &Rfc3339).unwrap(),
    })
}

fn policy(thresholds: &Gates) -> Switchover {
    Switchover {
        drain_timeout: Duration::from_secs(5),
        stragglers: Stragglers::Wait,
        gates: *thresholds,
    }
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
            since: "2026-01-02T03:04:05.678Z".into(),
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
        "25.00 % (100 of 400 reads compared since 2026-01-02 03:04:05 UTC)",
        "at least 20 %",
        true,
    );
    check(
        says("shadow match rate", &asked, reads),
        "98.00 % (98 of 100 compared reads alike since 2026-01-02 03:04:05 UTC)",
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
        sessions: 0,
        in_the_way: Vec::new(),
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

/// A survey of one proxy: sessions of `app`, their processes on legacy, and what is in the way.
fn survey(sessions: usize, pids: &[i32], in_the_way: &[&str]) -> Survey {
    let of = OfDatabase {
        users: [("app".to_owned(), sessions)].into(),
        legacy: pids.iter().copied().collect(),
        ..OfDatabase::default()
    };
    Survey {
        databases: [("shop".to_owned(), of)].into(),
        in_the_way: in_the_way
            .iter()
            .map(|reason| SessionInTheWay {
                user: "app".into(),
                application: "reports".into(),
                address: "10.0.0.7:5000".into(),
                database: "shop".into(),
                reason: (*reason).to_owned(),
            })
            .collect(),
        in_the_way_count: in_the_way.len(),
    }
}

/// What the gate of that name says where two proxies told of their sessions; the second may be silent.
fn of_sessions(
    name: &str,
    policy: &Switchover,
    surveys: [&Survey; 2],
    second_answers: bool,
    change: impl FnOnce(&mut DatabaseStatus),
) -> (String, String, bool) {
    let mut database = healthy();
    change(&mut database);
    let [one, two] = surveys;
    let gates = gates(&Measured {
        databases: &[database],
        proxies: &[],
        sessions: &[
            OfProxy {
                name: "a",
                answers: true,
                survey: one,
            },
            OfProxy {
                name: "b",
                answers: second_answers,
                survey: two,
            },
        ],
        primary: Side::Legacy,
        policy,
        journal_max: 1 << 30,
        now: OffsetDateTime::parse(NOW, &Rfc3339).unwrap(),
    });
    let gate = gates.into_iter().find(|gate| gate.name.ends_with(name));
    gate.map(|gate| (gate.measured, gate.required, gate.open)).unwrap()
}

#[test]
fn sessions_in_the_way_are_named_with_their_proxy() {
    let usual = policy(&Gates::default());
    let (quiet, temporary) = (survey(1, &[], &[]), survey(2, &[], &["it has temporary tables"]));
    let says = |surveys, policy, answers| of_sessions(TO_CARRY, policy, surveys, answers, |_| {});
    check(says([&quiet, &quiet], &usual, true), "none is in the way", "none", true);
    let named = "1: app (reports) from 10.0.0.7:5000 on shop, b: it has temporary tables";
    check(says([&quiet, &temporary], &usual, true), named, "none", false);
    assert!(
        says([&quiet, &temporary], &usual, false).2,
        "a silent proxy is fenced out, not waited for"
    );
    let ending = Switchover {
        stragglers: Stragglers::End,
        ..usual
    };
    let nothing = "nothing: they are ended (switchover.stragglers: end)";
    check(says([&quiet, &temporary], &ending, true), named, nothing, true);
    let many = survey(5, &[], &["x"; 5]);
    let (measured, _, _) = says([&many, &quiet], &usual, true);
    assert!(
        measured.starts_with("5: ") && measured.ends_with("; and 2 more"),
        "{measured}"
    );
    // A rehearsal is there to find them.
    let closed = [gate(TO_CARRY, "1", "none", false)];
    assert!(in_the_way(&closed, Kind::Flip).is_some());
    assert!(in_the_way(&closed, Kind::Rehearsal).is_none());
}

#[test]
fn clients_past_the_proxies_are_those_whose_process_is_nobodys() {
    let client = |pid, seconds, writing| Client {
        pid,
        user: "cron".into(),
        application: "nightly".into(),
        address: Some("10.0.0.9".into()),
        seconds,
        writing,
    };
    let few = |most| {
        policy(&Gates {
            direct_sessions: most,
            ..Gates::default()
        })
    };
    let (one, two) = (survey(1, &[7], &[]), survey(1, &[8], &[]));
    let says = |most, clients: Vec<Client>| {
        of_sessions("past the proxies", &few(most), [&one, &two], true, |database| {
            database.legacy.clients = clients;
        })
    };
    let ours = || {
        vec![
            client(7, Some(60.0), true),
            client(8, None, false),
            client(10, Some(2.0), true),
        ]
    };
    check(says(Some(0), ours()), "none", "at most 0", true);
    let mut all = ours();
    all.push(client(9, Some(180.0), true));
    let named = "1: cron (nightly) from 10.0.0.9 on legacy, process 9, connected for 3 min, writing";
    check(says(Some(0), all.clone()), named, "at most 0", false);
    check(says(Some(1), all.clone()), named, "at most 1", true);
    check(says(None, all), named, NOTHING, true);
}

#[test]
fn the_tightest_limit_decides_whether_the_new_side_holds_all_sessions() {
    let usual = policy(&Gates::default());
    let (one, two) = (survey(4, &[], &[]), survey(6, &[], &[]));
    let says = |policy: &Switchover, database: Option<ConnectionLimit>, role: Option<ConnectionLimit>, used| {
        of_sessions("connections", policy, [&one, &two], true, |status| {
            status.new.connections = Some(Connections {
                limit: 97,
                used,
                database,
                roles: role.map(|limit| ("app".to_owned(), limit)).into_iter().collect(),
            });
        })
    };
    let limit = |limit, used| Some(ConnectionLimit { limit, used });
    check(
        says(&usual, None, None, 84),
        "the server has 13 left for 10 sessions",
        "at least 13 left",
        true,
    );
    check(
        says(&usual, None, None, 85),
        "the server has 12 left for 10 sessions",
        "at least 13 left",
        false,
    );
    let spare = policy(&Gates {
        spare_connections: 5,
        ..Gates::default()
    });
    assert!(!says(&spare, None, None, 84).2 && says(&spare, None, None, 79).2);
    check(
        says(&usual, limit(20, 8), None, 0),
        "database shop has 12 left for 10 sessions",
        "at least 13 left",
        false,
    );
    check(
        says(&usual, limit(50, 8), limit(9, 0), 0),
        "role app has 9 left for 10 sessions",
        "at least 10 left",
        false,
    );
    assert!(says(&usual, limit(50, 8), limit(10, 0), 0).2);
}

#[test]
fn disk_is_judged_by_what_the_operator_says_there_is() {
    let by = |legacy, new| Gates {
        disk: Capacity { legacy, new },
        ..Gates::default()
    };
    let sized = |database: &mut DatabaseStatus| {
        database.legacy.database_bytes = Some(3 << 30);
        database.new.database_bytes = Some(700 << 20);
    };
    let measured = "legacy: 3.0 GiB, new: 700 MiB and up to 1.0 GiB of journal";
    check(says("disk", &by(None, None), sized), measured, NOTHING, true);
    check(
        says("disk", &by(None, Some(1 << 30)), sized),
        measured,
        "new: at most 1.0 GiB",
        false,
    );
    check(
        says("disk", &by(Some(4 << 30), Some(2 << 30)), sized),
        measured,
        "legacy: at most 4.0 GiB, new: at most 2.0 GiB",
        true,
    );
    assert!(
        !says("disk", &by(None, Some(1 << 40)), |_| {}).2,
        "not known is not enough"
    );
}
