//! The page in a real browser. `scripts/install-browser` installs one.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgtandem::apply::Entry;
use pgtandem::chain::{Chain, Fsync, Options};
use pgtandem::config::{LoggedValues, MismatchLog};
use pgtandem::report::{
    Divergence, RecordedFlip, Report, SideHistory, VerificationFile, VerifiedDatabase, VerifiedTable, Wanted, gather,
};
use pgtandem::shadow::events;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// What `look.js` saw.
#[derive(Debug, Deserialize)]
struct Seen {
    view: String,
    scheme: String,
    requests: Vec<String>,
    errors: Vec<String>,
    title: String,
    headings: Vec<String>,
    figures: Vec<String>,
    plots: usize,
    scripts: usize,
    images: usize,
    overflow: i64,
    background: String,
    pale: Vec<String>,
}

/// Screenshots stay in `target/tmp/report`, for people to look at.
fn look(page: &Path) -> Vec<Seen> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let paths = fs::read_to_string(root.join(".servers/browser/paths"))
        .expect("scripts/install-browser has not run; `make test` runs it");
    let paths: HashMap<&str, &str> = paths.lines().filter_map(|line| line.split_once('=')).collect();
    let screenshots = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&screenshots).unwrap();
    let output = Command::new(paths["node"])
        .arg(root.join("tests/audit/browser/look.js"))
        .arg(paths["chromium"])
        .arg(page)
        .arg(&screenshots)
        .env("NODE_PATH", paths["node_modules"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn keys(of: Value) -> Map<String, Value> {
    let Value::Object(map) = of else { unreachable!() };
    map
}

const EVIL: &str =
    "select '</style><script>document.title = 1</script>' as \"<img src=http://127.0.0.1:9/x onerror=alert(1)>\"";

/// Latencies spread as those of a real statement are: `middle` is a bucket.
fn buckets(middle: u32, count: u64) -> Value {
    let spread = [1, 4, 9, 14, 18, 20, 17, 11, 6, 3, 2, 1];
    let buckets: Vec<Value> = (middle - 5..)
        .zip(spread)
        .map(|(bucket, share)| json!([bucket, share * count / 100]))
        .collect();
    json!({ "sum_ms": 10.0, "max_ms": 40.0, "buckets": buckets })
}

fn fingerprint(n: u32) -> Value {
    let texts = [
        "select * from orders where customer_id = ? order by placed_at desc limit ?",
        "select o.id, o.total, c.name, sum(l.quantity * l.price) from orders o join customers c on c.id = o.customer_id join order_lines l on l.order_id = o.id where o.placed_at > ? group by o.id, o.total, c.name having sum(l.quantity) > ? order by o.id",
        "select count(*) from products where category = ? and stock > ?",
        EVIL,
    ];
    let compared = 4000 / u64::from(n + 1);
    let side = |shift: u32| json!({ "first_row": buckets(60 + n * 3, compared), "total": buckets(66 + n * 3 + shift, compared) });
    json!({
        "fingerprint": format!("{:016x}", 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(n) + 1)),
        "text": texts[n as usize % texts.len()],
        "counts": {
            "executions": compared * 3, "compared": compared, "matched": compared - u64::from(n == 1),
            "order_ties": 0, "tolerated": 0, "partly": {}, "mismatched": u64::from(n == 1), "transient": 0,
            "not_comparable": {}, "skipped": { "not_sampled": compared * 2 }, "dropped": {}, "failed": {},
        },
        "asked_twice": 3, "disagreed": u64::from(n == 4),
        "latency": { "legacy": side(0), "new": side(if n == 2 { 12 } else { 1 }) },
    })
}

fn mismatch(n: u32, kind: &str) -> Value {
    let of = fingerprint(n);
    json!({
        "database": "shop", "user": "app", "fingerprint": of["fingerprint"], "statement": of["text"],
        "key": "0123456789abcdef", "kind": kind, "primary": "legacy", "rows": { "primary": 9, "secondary": 9 },
        "digest": { "primary": "00112233", "secondary": "44556677" }, "columns": ["id", "total"],
        "differing_columns": ["total"], "latency_ms": { "primary": 1.5, "secondary": 2.5 }, "epoch": 1, "round": 4711,
    })
}

fn flip(id: &str, kind: &str, outcome: &str, held_ms: f64) -> Value {
    let step = |name: &str, ms: f64, held: bool| json!({ "name": name, "at": "2026-01-02T03:04:05.123Z", "who": "pid 4711 on db-proxy-1", "ms": ms, "held": held, "measured": {} });
    json!({
        "id": id, "kind": kind, "to": "new", "epoch": 2, "coordinator": "pid 4711 on db-proxy-1", "by": "ann",
        "at": "2026-01-02T03:04:05.123Z", "ended": "2026-01-02T03:04:06Z", "outcome": outcome,
        "forced": (kind == "flip").then_some("rehearsed twice <i>without</i> trouble"),
        "steps": [step("preparing", 120.5, false), step("probing", 15.25, false), step("holding", 12.0, true), step("fencing", 1.5, true), step("draining", 20.0, true), step("decided", 3.0, true), step("turned", 0.0, false)],
        "held_ms": held_ms, "sessions_carried": 48, "sessions_ended": 1, "in_the_way": [], "fenced_out": ["pid 99 on db-proxy-2"],
    })
}

async fn report(directory: &Path) -> Report {
    let log = MismatchLog {
        path: directory.join("mismatches.jsonl"),
        values: LoggedValues::Hashed,
        columns: Default::default(),
        key_file: directory.join("mismatches.key"),
        mac_key: None,
        max_bytes: 1 << 20,
        max_age: std::time::Duration::from_secs(3600),
        fsync: Fsync::Never,
        statistics_every: std::time::Duration::from_secs(300),
        count_back: std::time::Duration::ZERO,
    };
    let mut chain = Chain::open(Options { ..log.chain() }, Map::new()).unwrap();
    let mut fingerprints: Vec<Value> = (0..14).map(fingerprint).collect();
    let mut never = fingerprint(15);
    never["text"] = json!("select now()");
    never["counts"] = json!({
        "executions": 812, "compared": 0, "matched": 0, "order_ties": 0, "tolerated": 0, "partly": {}, "mismatched": 0,
        "transient": 0, "not_comparable": { "clock": 812 }, "skipped": {}, "dropped": {}, "failed": {},
    });
    never.as_object_mut().unwrap().remove("latency");
    fingerprints.push(never);
    let lines = [
        (
            events::PHASE,
            json!({ "phase": "dual_read", "primary": "legacy", "epoch": 1 }),
        ),
        (events::MISMATCH, mismatch(1, "value")),
        (
            events::ACKNOWLEDGED,
            json!({ "by": "ann", "reason": "rounding of totals, ticket 7 <b>agreed</b>", "fingerprint": fingerprint(1)["fingerprint"] }),
        ),
        (events::MISMATCH, mismatch(3, "missing_row")),
        (
            events::SLOWER,
            json!({
                "database": "shop", "kind": "slower", "fingerprint": fingerprint(2)["fingerprint"], "statement": fingerprint(2)["text"], "reads": 1333,
                "legacy": { "p50_ms": 2.1, "p99_ms": 9.0 }, "new": { "p50_ms": 5.9, "p99_ms": 31.0 }, "ratio": 2.8, "rule": { "reads": 20, "ratio": 2.0, "p50_ms": 1.0 },
                "plans": {
                    "legacy": { "fingerprint": "1f2e3d4c5b6a7988", "nodes": ["Aggregate", "  ->  Index Scan using products_category on products"] },
                    "new": { "fingerprint": "8899aabbccddeeff", "nodes": ["Aggregate", "  ->  Seq Scan on products"] },
                    "same": false,
                },
            }),
        ),
        (
            events::STATISTICS,
            json!({
                "database": "shop", "since": "2026-01-01T00:00:00Z", "fingerprints": fingerprints,
                "ignores": [{ "fingerprint": null, "table": "sessions", "column": "seen_at", "owner": "bob", "reason": "a clock", "expires": "2027-01-31", "expired": false }],
            }),
        ),
        (events::SWITCHOVER, flip("0f3a", "flip", "done", 41.5)),
        (
            events::PHASE,
            json!({ "phase": "switchover", "primary": "new", "epoch": 2 }),
        ),
        (
            events::STRAYS_ACKNOWLEDGED,
            json!({ "by": "bob", "reason": "a nightly job, ticket 9", "strays": [{ "database": "shop", "side": "new", "role": "batch", "application": "psql", "table": "public.orders", "operation": "UPDATE", "writes": 7, "last": "2026-01-02T03:04:05Z" }] }),
        ),
    ];
    for (event, body) in lines {
        chain.append(event, keys(body)).unwrap();
    }
    let wanted = Wanted {
        logs: Vec::new(),
        since: None,
        by: "auditor".into(),
        verifications: Vec::new(),
        slower_ratio: 2.0,
    };
    let mut report = gather(&log, &Default::default(), None, &wanted).await.unwrap();
    for (id, kind, outcome, line) in [
        ("0e11", "rehearsal", "rehearsed", None),
        (
            "0d22",
            "flip",
            "abandoned: transactions were still open after 5s (switchover.drain_timeout)",
            Some(2),
        ),
    ] {
        report.flips.push(RecordedFlip {
            flip: serde_json::from_value(flip(id, kind, outcome, 12.0)).unwrap(),
            in_databases: true,
            line,
        });
    }
    report.verifications.push(VerificationFile {
        file: "verify.json".into(),
        sha256: "5f".repeat(32),
        equal: false,
        databases: vec![VerifiedDatabase {
            database: "shop".into(),
            equal: false,
            began: "2026-01-02T03:04:05Z".into(),
            ended: "2026-01-02T03:14:05Z".into(),
            tables_equal: 3,
            tables_different: 1,
            tables_not_compared: 0,
            rows: 1_234_567,
            rows_differing: 3,
            sequences: 4,
            sequences_different: 1,
            cuts: 12,
        }],
    });
    let shop = &mut report.databases[0];
    shop.legacy = SideHistory {
        server_version: Some("15.13".into()),
        role: Some("secondary".into()),
        epoch: Some(2),
        ..SideHistory::default()
    };
    shop.new = SideHistory {
        server_version: Some("18.1".into()),
        role: Some("primary".into()),
        epoch: Some(2),
        quarantine: vec![Entry {
            id: 17,
            xid: Some("4711".into()),
            held_at: "2026-01-02T03:04:05Z".into(),
            tables: vec!["public.orders".into(), "public.order_lines".into()],
            keys: Vec::new(),
            changes: 12,
            statements: Vec::new(),
            sqlstate: Some("23514".into()),
            error: "new row for relation \"orders\" violates check constraint \"total_positive\"".into(),
            detail: None,
            follows: None,
            attempts: 2,
        }],
        divergences: vec![Divergence {
            table: "public.orders".into(),
            kind: "missing".into(),
            count: 3,
            first: "2026-01-02T03:04:05Z".into(),
            last: "2026-01-02T03:04:06Z".into(),
        }],
        verified: ["customers", "order_lines", "orders", "products"]
            .iter()
            .map(|table| VerifiedTable {
                table: format!("public.{table}"),
                at: "2026-01-02T03:04:05Z".into(),
                epoch: 1,
                round: 4000,
                position: "0/1A2B3C4D".into(),
                rows: 123_456,
                digest: "12345678901234567890".into(),
            })
            .collect(),
        ..SideHistory::default()
    };
    report
}

#[tokio::test]
async fn the_page_opens_without_network_and_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let report = report(directory.path()).await;
    assert!(report.log.chain.intact);
    let page = directory.path().join("report.html");
    fs::write(&page, report.html().unwrap()).unwrap();
    let seen = look(&page);
    assert_eq!(seen.len(), 4);
    for seen in &seen {
        assert!(seen.requests.is_empty() && seen.errors.is_empty(), "{seen:#?}");
        // Nothing of what statements and reasons hold has become markup.
        assert_eq!((seen.scripts, seen.images), (0, 0), "{seen:#?}");
        assert!(seen.title.starts_with("pgtandem report, "), "{seen:#?}");
        assert_eq!(seen.plots, 2, "{seen:#?}");
        assert_eq!(
            seen.headings,
            [
                "Database shop",
                "Verifications",
                "Switchovers",
                "When a proxy ran, and what share it compared",
                "What happened",
                "The log that this report rests on"
            ]
        );
        assert_eq!(seen.figures[3], "intact");
        assert!(seen.overflow <= 0, "{} is wider than its window: {seen:#?}", seen.view);
        assert!(
            seen.pale.is_empty(),
            "{} is hard to read: {:#?}",
            seen.scheme,
            seen.pale
        );
    }
    let backgrounds: Vec<_> = seen.iter().map(|seen| seen.background.as_str()).collect();
    assert!(
        backgrounds[0] == backgrounds[2] && backgrounds[0] != backgrounds[1],
        "{backgrounds:?}"
    );

    let markdown = report.markdown().unwrap();
    assert!(
        !markdown.contains("<script") && !markdown.contains("<img"),
        "{markdown}"
    );
    assert!(
        markdown.contains("| 9e3779b97f4a7c15 | select \\* from orders"),
        "{markdown}"
    );
    assert!(markdown.contains(&report.log.chain.head.hash));
}
