//! Gates about sessions, connections and disk, on real servers: each closes, refuses the flip, can be
//! passed where the operator says why, and opens again.

use pgtandem::admin::api::{Gate, Status};
use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;

use crate::another::Another;
use crate::rig::{APP, DATABASE, Rig, connect};

async fn pair(extra: &str) -> (Rig, Another) {
    let mut rig = Rig::new();
    rig.extra = extra.to_owned();
    rig.serve(Phase::DualRead).await;
    rig.client()
        .await
        .batch_execute("CREATE TABLE t (id serial PRIMARY KEY, v text)")
        .await
        .unwrap();
    let other = Another::beside(&rig, Phase::DualRead).await;
    rig.wait_caught_up().await;
    (rig, other)
}

/// The gate of that name, whatever its database.
fn gate<'a>(status: &'a Status, name: &str) -> Option<&'a Gate> {
    status.gates.iter().find(|gate| gate.name.ends_with(name))
}

/// Waits until the proxy finds the gate so.
async fn until_gate(rig: &Rig, name: &str, open: bool) -> Gate {
    let status = rig
        .until(|status| gate(status, name).is_some_and(|gate| gate.open == open))
        .await;
    gate(&status, name).unwrap().clone()
}

/// A closed gate refuses by every way, and says what it measured.
fn refuses(rig: &Rig, says: &str) {
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, says);
    let text = rig.check(&["switchover", "--to", "new"], 1, says);
    assert!(text.contains("nothing was changed"), "{text}");
}

fn opens(rig: &Rig) {
    rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "the flip could begin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_cannot_be_carried_over_are_named_by_every_proxy() {
    let (rig, other) = pair("").await;
    opens(&rig);
    let temporary = connect(&other.url()).await.unwrap();
    let sql = "SET application_name = 'reports'; CREATE TEMP TABLE mine ()";
    temporary.batch_execute(sql).await.unwrap();
    let gate = until_gate(&rig, "sessions to carry over", false).await;
    let named = format!("pid {} on ", other.pid());
    for says in [
        "1: app (reports) from 127.0.0.1:",
        "on shop",
        &named,
        "it has temporary tables",
    ] {
        assert!(gate.measured.contains(says), "{gate:?} does not say {says}");
    }
    refuses(&rig, "it has temporary tables");
    let status = rig.command(&["status", "--json"]);
    let told: Status = serde_json::from_slice(&status.stdout).unwrap();
    let proxy = told
        .proxies
        .iter()
        .find(|proxy| proxy.name.starts_with(&named))
        .unwrap();
    assert_eq!((proxy.sessions, proxy.in_the_way.len()), (1, 1));
    assert_eq!(proxy.in_the_way[0].application, "reports");

    // A rehearsal is there to find them; a forced flip is given up for them before anybody is held.
    rig.check(&["switchover", "--rehearse"], 0, "temporary tables");
    let forced = ["switchover", "--to", "new", "--force", "--reason", "they were asked"];
    rig.check(&forced, 1, "cannot be carried over");
    let told = rig.check(&["switchover", "--history"], 0, "forced: they were asked");
    assert!(told.contains("abandoned: "), "{told}");

    temporary.batch_execute("DROP TABLE mine").await.unwrap();
    until_gate(&rig, "sessions to carry over", true).await;
    // The others, through the proxy that is asked: its own sessions it asks at once.
    let client = rig.client().await;
    client.batch_execute("SELECT pg_advisory_lock(1)").await.unwrap();
    refuses(&rig, "it holds session advisory locks");
    let sql = "SELECT pg_advisory_unlock(1); BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT";
    client.batch_execute(sql).await.unwrap();
    refuses(&rig, "it has a cursor WITH HOLD: held");
    client.batch_execute("CLOSE held").await.unwrap();
    opens(&rig);
    // One that ends its session is in nobody's way either.
    client.batch_execute("CREATE TEMP TABLE mine ()").await.unwrap();
    refuses(&rig, "it has temporary tables");
    drop(client);
    until_gate(&rig, "sessions to carry over", true).await;
    rig.check(&["switchover", "--to", "new"], 0, "switchover to new");
}

/// What a client has in its own session stays as it was, while that session is asked over and over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn being_asked_is_not_noticed() {
    let (rig, _other) = pair("").await;
    let client = rig.client().await;
    let prepared = client.prepare("SELECT $1::int + 1").await.unwrap();
    client
        .batch_execute("SET search_path = nowhere; LISTEN here")
        .await
        .unwrap();
    for number in 0..20 {
        rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "none is in the way");
        let row = client.query_one(&prepared, &[&number]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), number + 1);
    }
    let path: String = client.query_one("SHOW search_path", &[]).await.unwrap().get(0);
    assert_eq!(path, "nowhere");
    let own = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'pgtandem%'";
    let left: i64 = client.query_one(own, &[]).await.unwrap().get(0);
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_all_proxies_must_fit_on_the_new_side() {
    let (rig, other) = pair("").await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(rig.client().await);
        clients.push(connect(&other.url()).await.unwrap());
    }
    let new = rig.direct(Side::New, SUPERUSER).await;
    opens(&rig);
    let alter = |limit: i32| format!("ALTER ROLE {APP} CONNECTION LIMIT {limit}");
    new.batch_execute(&alter(5)).await.unwrap();
    let gate = until_gate(&rig, "connections", false).await;
    assert!(
        gate.measured.contains("role app has ") && gate.measured.ends_with("for 6 sessions"),
        "{gate:?}"
    );
    refuses(&rig, "role app has ");
    new.batch_execute(&alter(20)).await.unwrap();
    opens(&rig);
    // Room for what the proxies have there themselves, and a few more.
    let used = "SELECT count(*)::int FROM pg_stat_activity WHERE datname = current_database()";
    let used: i32 = new.query_one(used, &[]).await.unwrap().get(0);
    let alter = |limit: i32| format!("ALTER DATABASE {DATABASE} CONNECTION LIMIT {limit}");
    new.batch_execute(&alter(used + 5)).await.unwrap();
    refuses(&rig, "database shop has ");
    new.batch_execute(&alter(-1)).await.unwrap();
    opens(&rig);
    rig.check(&["switchover", "--to", "new"], 0, "6 sessions carried over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_past_the_proxies_are_told_from_those_of_every_proxy() {
    let (rig, other) = pair("switchover: { gates: { direct_sessions: 0 } }").await;
    let through = [rig.client().await, connect(&other.url()).await.unwrap()];
    for client in &through {
        client.batch_execute("SELECT 1").await.unwrap();
    }
    let direct = rig.direct(Side::Legacy, APP).await;
    let sql = "SET application_name = 'nightly'; BEGIN; INSERT INTO t (v) VALUES ('direct')";
    direct.batch_execute(sql).await.unwrap();
    let gate = until_gate(&rig, "sessions past the proxies", false).await;
    for says in ["1: app (nightly) from 127.0.0.1 on legacy, process ", ", writing"] {
        assert!(gate.measured.contains(says), "{gate:?} does not say {says}");
    }
    direct.batch_execute("COMMIT").await.unwrap();
    refuses(&rig, "app (nightly) from 127.0.0.1 on legacy");
    drop(direct);
    until_gate(&rig, "sessions past the proxies", true).await;
    // On either side. Passed with a reason, which is kept.
    let _reading = rig.direct(Side::New, APP).await;
    until_gate(&rig, "sessions past the proxies", false).await;
    let forced = ["switchover", "--to", "new", "--force", "--reason", "it only reads"];
    rig.check(&forced, 0, "switchover to new");
    rig.check(&["switchover", "--history"], 0, "forced: it only reads");
    // Those that were carried over are known on the other side, too.
    let gate = until_gate(&rig, "sessions past the proxies", false).await;
    assert!(
        gate.measured.starts_with("1: ") && gate.measured.contains(" on new"),
        "{gate:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_is_measured_against_what_the_operator_gives() {
    let journal = "journal: { max_bytes: 64MiB }";
    let (mut rig, _other) = pair(&format!(
        "{journal}\nswitchover: {{ gates: {{ disk: {{ new: 65MiB }} }} }}"
    ))
    .await;
    refuses(&rig, "and up to 64 MiB of journal");
    let roomy = format!("{journal}\nswitchover: {{ gates: {{ disk: {{ new: 1GiB, legacy: 1GiB }} }} }}");
    rig.extra = roomy;
    rig.set_phase(Phase::DualRead).await.unwrap();
    let text = rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "new: at most 1.0 GiB");
    assert!(text.contains("legacy: at most 1.0 GiB"), "{text}");
}
