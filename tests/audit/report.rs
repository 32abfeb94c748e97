//! The log and the report over a whole migration: two servers, the proxy, reads that differ, an
//! acknowledgement, a kill, a flip, and somebody who edits the log.

use std::fs;
use std::time::Duration;

use pgtandem::admin::api::{ShadowsAnswer, Status};
use pgtandem::control::{Phase, Side};
use serde_json::Value;
use tokio_postgres::Client;

use crate::rig::{self, DATABASE, OWN_ROLE, Rig};

const CONSTANT: &str = "a value that nobody else may read";

async fn until_compared(rig: &Rig, matched: u64, mismatched: u64) {
    rig.until(|status| {
        let reads = &status.databases[0].shadow_reads;
        reads.matched >= matched && reads.mismatched >= mismatched
    })
    .await;
}

/// A new table is known to the shadow reads a moment later; how many were compared until then.
async fn until_known(rig: &Rig, client: &Client) -> u64 {
    for _ in 0..1200 {
        client.simple_query("SELECT count(*) FROM item").await.unwrap();
        let matched = rig.status().await.unwrap().databases[0].shadow_reads.matched;
        if matched > 0 {
            // What is still on its way comes before this one.
            client.simple_query("SELECT id FROM item").await.unwrap();
            return settled(rig).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the table was never known: {}", rig.log());
}

/// Matched reads, once there are no more to come.
async fn settled(rig: &Rig) -> u64 {
    let mut last = 0;
    loop {
        let answer: ShadowsAnswer = rig.admin().get("/api/v1/shadows").await.unwrap();
        let totals = &answer.databases[DATABASE].totals;
        if totals.waiting == 0 && totals.counts.matched == last {
            return last;
        }
        last = totals.counts.matched;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// As the proxy's own role: any other would be refused on the secondary.
async fn on_new(rig: &Rig, sql: &str) {
    let client = rig.direct(Side::New, OWN_ROLE).await;
    client.batch_execute(&format!("SET ROLE app; {sql}")).await.unwrap();
}

fn report(rig: &Rig, code: i32, arguments: &[&str]) -> Value {
    let all: Vec<&str> = ["report", "--json"].iter().chain(arguments).copied().collect();
    let output = rig.command(&all);
    assert_eq!(output.status.code(), Some(code), "{output:?}\n{}", rig.log());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every read is compared; `log` says how the mismatch log is kept, and table `item` has so many rows.
async fn comparing(log: &str, rows: u32) -> (Rig, Client) {
    let mut rig = Rig::new();
    rig.extra = format!("reads: {{ shadow_percent: 100 }}\nmismatch_log: {log}\n");
    rig.serve(Phase::DualRead).await;
    let items = format!(
        "CREATE TABLE item (id int PRIMARY KEY, name text);
         INSERT INTO item SELECT n, 'item ' || n FROM generate_series(1, {rows}) n"
    );
    let client = rig.client_after(&items).await;
    rig.wait_caught_up().await;
    (rig, client)
}

/// `which`: a fingerprint, or `--line` and its number.
fn acknowledge(rig: &Rig, which: &[&str], reason: &str, by: &str) {
    let all = [&["mismatches", "ack"], which, &["--reason", reason, "--by", by]].concat();
    rig.check(&all, 0, &format!("by {by}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_as_an_auditor_sees_it() {
    let (mut rig, client) = comparing(
        "{ mac_key: only the auditor has it, statistics_every: 1h, count_back: 0s }",
        20,
    )
    .await;
    let known = until_known(&rig, &client).await;
    for _ in 0..20 {
        client.simple_query("SELECT * FROM item").await.unwrap();
        client.simple_query("SELECT now()").await.unwrap();
    }
    until_compared(&rig, known + 20, 0).await;

    // A difference: found, told by kind, not readable, acknowledged, and open again when it is back.
    rig.check(&["mismatches"], 0, "no mismatches");
    on_new(&rig, &format!("UPDATE item SET name = '{CONSTANT}' WHERE id = 7")).await;
    client
        .simple_query("SELECT name, id FROM item WHERE id < 10")
        .await
        .unwrap();
    until_compared(&rig, known + 20, 1).await;
    let shown = rig.check(
        &["mismatches", "--kind", "value"],
        1,
        "select name, id from item where id < ?",
    );
    assert!(
        shown.contains("differing columns: name") && !shown.contains(CONSTANT),
        "{shown}"
    );
    rig.check(&["mismatches", "--kind", "order"], 0, "no mismatches");
    rig.check(
        &["mismatches", "--since", "2000-01-01T00:00:00Z"],
        1,
        "differing columns: name",
    );
    let fingerprint = shown.split_whitespace().next().unwrap().to_owned();
    rig.check(&["mismatches", "ack", "0000"], 2, "--reason");
    rig.check(
        &["mismatches", "ack", "nothing", "--reason", "x"],
        2,
        "no such mismatch",
    );
    acknowledge(&rig, &[&fingerprint[..6]], "planted", "ann");
    rig.check(&["mismatches"], 0, "acknowledged by ann");
    rig.check(&["mismatches", "--verify-log"], 0, "intact");
    on_new(&rig, "UPDATE item SET name = 'item 7' WHERE id = 7").await;

    let first = report(&rig, 0, &[]);
    let shop = &first["databases"][0];
    assert_eq!(
        (&shop["rate"]["compared"], &shop["rate"]["mismatched"]),
        (&(known + 21).into(), &1.into())
    );
    assert!(shop["rate"]["upper_bound"].as_f64().unwrap() > 1.0 / (known as f64 + 21.0));
    assert_eq!(shop["kinds"]["value"], 1);
    assert_eq!(shop["reads"]["totals"]["not_comparable"]["clock"], 20);
    assert_eq!(shop["mismatches"][0]["open"], 0);
    let fingerprints = shop["reads"]["fingerprints"].as_array().unwrap();
    let read = fingerprints
        .iter()
        .find(|one| one["text"] == "select * from item")
        .unwrap();
    let latency = &read["latency"];
    assert!(latency["new"]["total"]["p50_ms"].as_f64().unwrap() > 0.0, "{latency}");
    assert_eq!(
        (&shop["legacy"]["role"], &shop["new"]["role"]),
        (&"primary".into(), &"secondary".into())
    );
    let head = first["log"]["chain"]["head"].clone();

    // Killed and begun anew: what was counted before is still there.
    rig.kill_proxy();
    rig.check(&["mismatches", "--verify-log"], 0, "intact");
    let without_proxy = report(&rig, 0, &[]);
    assert_eq!(without_proxy["proxy"], Value::Null);
    assert_eq!(without_proxy["overall"], first["overall"]);
    rig.check(
        &["mismatches", "ack", "--line", "1", "--reason", "x"],
        2,
        "no such mismatch",
    );
    let line = first["databases"][0]["mismatches"][0]["example"]["seq"].to_string();
    acknowledge(&rig, &["--line", &line], "once more", "bob");
    rig.serve(Phase::DualRead).await;
    let client = rig.client().await;
    let again = until_known(&rig, &client).await;
    for _ in 0..10 {
        client.simple_query("SELECT * FROM item").await.unwrap();
    }
    until_compared(&rig, again + 10, 0).await;
    let compared = known + 21 + again + 10;
    rig.check(
        &["switchover", "--rehearse", "--force", "--reason", "a first look"],
        0,
        "rehearsal of a switchover",
    );
    rig.check(&["switchover", "--to", "new", "--by", "ann"], 0, "ordered by ann");

    let page = rig.directory.path().join("report.html");
    rig.check(
        &["report", "--since", "1h", "-o", &page.to_string_lossy()],
        0,
        &format!("{compared} reads compared, 1 mismatched; log intact"),
    );
    let page = fs::read_to_string(page).unwrap();
    for says in [
        &format!("Of {compared} reads compared, 1 differed"),
        "planted",
        "flip to new, epoch 2",
        "a first look",
        "switchover to new: done",
        "phase dual_read, legacy is primary",
        &fingerprint,
    ] {
        assert!(page.contains(says), "{says}");
    }
    assert!(
        !page.contains(CONSTANT) && !page.contains("item 7"),
        "values are hidden"
    );
    rig.check(&["report", "--md"], 0, "# Migration report");
    // Killed once; that somebody acknowledged something in between was no run.
    let told = report(&rig, 0, &[]);
    let runs: Vec<_> = told["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["ended"].clone())
        .collect();
    assert_eq!(runs, ["killed", "running"], "{}", told["runs"]);
    // As the databases record it, with who and why; one that was given up besides.
    let flips = report(&rig, 0, &[])["flips"].clone();
    assert_eq!(flips.as_array().unwrap().len(), 2, "{flips}");
    let (done, tried) = (&flips[0], &flips[1]);
    assert_eq!(
        (&done["outcome"], &done["to"], &done["forced"]),
        (&"done".into(), &"new".into(), &Value::Null)
    );
    assert_eq!(
        (&done["by"], &done["in_databases"]),
        (&"ann".into(), &true.into()),
        "{done}"
    );
    assert!(
        done["line"].as_u64().is_some() && done["coordinator"].as_str().unwrap().starts_with("pid "),
        "{done}"
    );
    assert!(
        done["steps"]
            .as_array()
            .unwrap()
            .iter()
            .any(|step| step["name"] == "decided"),
        "{done}"
    );
    assert_eq!(
        (&tried["kind"], &tried["forced"]),
        (&"rehearsal".into(), &"a first look".into()),
        "{tried}"
    );

    let later = report(&rig, 0, &[]);
    assert!(later["log"]["chain"]["head"]["seq"].as_u64() > head["seq"].as_u64());
    assert!(later["log"]["chain"]["signed"].as_u64().unwrap() > 10);

    // Somebody edits the log.
    let path = rig.directory.path().join("mismatches.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(CONSTANT));
    fs::write(&path, text.replacen("\"kind\":\"value\"", "\"kind\":\"order\"", 1)).unwrap();
    rig.check(&["mismatches", "--verify-log"], 1, "its MAC is wrong");
    let edited = report(&rig, 1, &[]);
    assert_eq!(edited["log"]["chain"]["intact"], false);
}

/// A proxy that is killed loses what came after its last line of statistics; what is shown by the
/// next one says since when it counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_counted_outlives_the_proxy() {
    let (mut rig, client) = comparing("{ statistics_every: 1h }\nwrites: { rehearse_percent: 100 }", 5).await;
    until_known(&rig, &client).await;
    // Known to the rehearsals, too.
    let rehearsed = |status: &Status| status.databases[0].rehearsed_writes.clone().unwrap_or_default();
    while rehearsed(&rig.status().await.unwrap()).counts.matched == 0 {
        client.simple_query("UPDATE item SET id = 1 WHERE false").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    settled(&rig).await;
    rig.until(|status| rehearsed(status).waiting == 0).await;
    // A report has the newest counts written.
    let first = report(&rig, 0, &[]);
    let before = rig.status().await.unwrap();
    rig.kill_proxy();

    let without_proxy = report(&rig, 0, &[]);
    let shop = &without_proxy["databases"][0];
    assert_eq!(shop["writes"], first["databases"][0]["writes"]);
    let told = rehearsed(&before);
    assert_eq!(shop["writes"]["totals"]["matched"], told.counts.matched);
    let update = &shop["writes"]["statements"][0];
    assert_eq!(update["text"], "update item set id = ? where false");
    assert!(update["new"]["p50_ms"].as_f64().unwrap() > 0.0, "{update}");

    // The next one goes on from there, by name since when.
    rig.serve(Phase::DualRead).await;
    let reads = before.databases[0].shadow_reads.clone();
    rig.until(|status| status.databases[0].shadow_reads.matched >= reads.matched)
        .await;
    let now = rig.status().await.unwrap();
    let shown = &now.databases[0].shadow_reads;
    assert_eq!(
        (&shown.since, shown.matched, shown.skipped),
        (&reads.since, reads.matched, reads.skipped)
    );
    assert_eq!(rehearsed(&now), told);
    // Killed once, and what was to be compared.
    let told = report(&rig, 0, &[]);
    let runs: Vec<_> = told["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["ended"].clone())
        .collect();
    assert_eq!(runs, ["killed", "running"], "{}", told["runs"]);
    assert!(told["runs"][0]["blind_seconds"].as_f64().is_some());
    let sampled = told["sampled"].as_array().unwrap();
    assert_eq!(sampled.len(), 2, "{sampled:?}");
    assert_eq!(sampled[1]["sampling"]["shadow"]["percent"], 100.0);
    assert_eq!(sampled[1]["sampling"]["rehearse"]["percent"], 100.0);
    // Another proxy's log: both counts, each with its head.
    let path = rig.directory.path().join("mismatches.jsonl");
    let other = rig.directory.path().join("other.jsonl");
    fs::copy(&path, &other).unwrap();
    let (path, other) = (path.to_string_lossy(), other.to_string_lossy());
    let both = report(&rig, 0, &["--log", &path, "--log", &other]);
    assert_eq!(
        both["overall"]["compared"],
        2 * told["overall"]["compared"].as_u64().unwrap()
    );
    assert_eq!(both["runs"].as_array().unwrap().len(), 4);
    assert_eq!(both["runs"][3]["log"], 1);
    assert_eq!(both["other_logs"][0]["chain"]["intact"], true);
    let absent = rig.command(&["report", "--log", "nowhere.jsonl"]);
    assert_eq!(absent.status.code(), Some(2), "{absent:?}");
    let head = told["log"]["chain"]["head"]["hash"].as_str().unwrap();
    rig.check(
        &["mismatches", "--verify-log", "--head", head],
        0,
        "the head that was kept is line number",
    );
    rig.check(
        &["mismatches", "--verify-log", "--head", &"5f".repeat(32)],
        1,
        "is none of its lines",
    );
    rig.check(&["mismatches", "--verify-log", "--head", "5f"], 2, "64 hex digits");
    let since = format!("since {}", reads.since[..19].replace('T', " "));
    rig.check(&["status"], 0, &since);
    let gates = rig::printed(&rig.command(&["switchover", "--to", "new", "--dry-run"]));
    assert!(gates.contains(&format!("reads compared {since}")), "{gates}");
    let answer: ShadowsAnswer = rig.admin().get("/api/v1/shadows").await.unwrap();
    let told = &answer.databases[DATABASE];
    assert_eq!(told.since, reads.since);
    assert!(told.running_since.as_ref().is_some_and(|since| *since > reads.since));
    assert_eq!(told.totals.counts.matched, reads.matched);
    // What is counted now comes on top, and is told to the log once.
    let client = rig.client().await;
    loop {
        client.simple_query("SELECT * FROM item").await.unwrap();
        if settled(&rig).await > reads.matched {
            break;
        }
    }
    let all = settled(&rig).await;
    assert_eq!(report(&rig, 0, &[])["databases"][0]["reads"]["totals"]["matched"], all);
    rig.kill_proxy();
    rig.extra = rig.extra.replace("1h", "1h, count_back: 0s");
    rig.serve(Phase::DualRead).await;
    let now = rig.status().await.unwrap();
    assert_eq!(now.databases[0].shadow_reads.matched, 0);
    assert!(now.databases[0].shadow_reads.since > reads.since);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_is_told_and_stops_nobody() {
    let (rig, client) = comparing("{ path: logs/mismatches.jsonl, key_file: the.key }", 1).await;
    rig.check(&["status"], 1, "the mismatch log cannot be written");
    until_known(&rig, &client).await;
    on_new(&rig, "DELETE FROM item").await;
    client.simple_query("SELECT * FROM item").await.unwrap();
    until_compared(&rig, 0, 1).await;
    rig.until(|status| status.databases[0].shadow_reads.log_lost == 1).await;

    // The folder is there now: the log goes on, and tells what it does not have.
    fs::create_dir(rig.directory.path().join("logs")).unwrap();
    client.simple_query("SELECT id FROM item").await.unwrap();
    until_compared(&rig, 0, 2).await;
    rig.until(|status| status.mismatch_log.as_ref().is_some_and(|log| log.failing.is_none()))
        .await;
    rig.check(&["mismatches"], 1, "select id from item");
    let told = report(&rig, 1, &[]);
    // With the phase, which could not be told either.
    assert!(told["log"]["lost"].as_u64().unwrap() >= 1, "{told}");
    assert_eq!(told["overall"]["mismatched"], 2);
}

/// Killed again and again while mismatches and statistics are being written, over many rotations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_killed_while_it_writes_leaves_a_whole_chain() {
    let (mut rig, client) = comparing("{ max_size: 64KiB, statistics_every: 1s, count_back: 0s }", 20).await;
    until_known(&rig, &client).await;
    on_new(&rig, "UPDATE item SET name = 'other'").await;
    let path = rig.directory.path().join("mismatches.jsonl");
    for turn in 0..4 {
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let url = rig.url();
                tokio::spawn(async move {
                    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
                    tokio::spawn(connection);
                    // Until the proxy is killed.
                    for n in 0.. {
                        let sql = format!("SELECT name, id FROM item WHERE id = {}", (reader * 5 + n) % 20 + 1);
                        if client.simple_query(&sql).await.is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        rig.until(|status| status.databases[0].shadow_reads.mismatched >= 20 + 5 * turn)
            .await;
        let told = rig.status().await.unwrap().mismatch_log.unwrap().head;
        rig.kill_proxy();
        futures_util::future::join_all(readers).await;

        // What the proxy said it had written is there, in a chain that does not break.
        rig.check(&["mismatches", "--verify-log"], 0, "intact");
        let line = pgtandem::chain::lines(&path, None)
            .unwrap()
            .map(|line| line.unwrap().bytes)
            .find(|bytes| serde_json::from_slice::<Value>(bytes).is_ok_and(|line| line["seq"] == told.seq));
        assert_eq!(pgtandem::chain::sha256(&line.unwrap()), told.hash);
        rig.serve(Phase::DualRead).await;
        let client = rig.client().await;
        // Known again.
        while rig.status().await.unwrap().databases[0].shadow_reads.mismatched == 0 {
            client.simple_query("SELECT name, id FROM item").await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert!(pgtandem::chain::files(&path).unwrap().len() > 1);
}
