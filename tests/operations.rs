//! What operators touch: commands and their exit codes, the admin API, proxy.yaml and reload,
//! tables that held rows before mirroring began, and databases under `"*"`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use pgtandem::admin::api::Status;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::PASSWORD;
use rig::{APP, ONE_ROW, OWN_ROLE, Rig, connect};
use std::fs;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_answer_with_words_and_exit_codes() {
    let mut rig = Rig::new();
    rig.check(&["status"], 2, "proxy.yaml");
    rig.write_config(Phase::DualRead);
    rig.check(&["status"], 2, "is `pgtandem serve` running?");
    rig.check(&["mismatches"], 0, "no mismatches");
    rig.serve(Phase::DualRead).await;
    let client = rig.client_after(ONE_ROW).await;
    rig.check(&["wait", "--caught-up", "--timeout", "30s"], 0, "caught up after");
    rig.check(&["status"], 0, "phase dual_read");
    rig.check(&["explain", "SELECT * FROM t"], 0, "rows compared in any order");
    rig.check(
        &["explain", "SELECT * FROM t"],
        0,
        "canary    no: it could be answered by the secondary, but reads.canary_percent is 0",
    );
    rig.check(&["explain", "SELECT now()"], 0, "clock");
    rig.check(&["explain", "ALTER TABLE t ADD c int"], 0, "barrier");
    rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "could begin");
    rig.check(&["switchover", "--to", "legacy"], 1, "legacy is primary already");
    rig.check(&["reload"], 0, "reloaded; phase dual_read");
    let json = rig.check(&["status", "--json"], 0, "");
    let status: Status = serde_json::from_str(&json).unwrap();
    assert_eq!((status.phase, status.primary), (Phase::DualRead, Side::Legacy));
    assert!(!rig.log().contains(PASSWORD), "a password in the log");

    rig.check(&["switchover", "--to", "new"], 0, "switchover to new");
    rig.check(&["status"], 1, "proxy.yaml still says dual_read");
    let version: String = client.query_one("SHOW server_version", &[]).await.unwrap().get(0);
    assert!(version.starts_with(&rig.new.major.to_string()), "{version}");

    rig.new.stop("immediate").unwrap();
    rig.until(|status| status.databases[0].new.error.is_some()).await;
    rig.check(&["wait", "--caught-up", "--timeout", "200ms"], 1, "not caught up");
    rig.check(&["status"], 1, "new cannot be reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_file_changes_nothing_and_says_so() {
    let rig = Rig::serving(Phase::Initial).await;
    let good = fs::read_to_string(rig.config_path()).unwrap();
    let refused = async |file: &str, says: &str| {
        fs::write(rig.config_path(), file).unwrap();
        let error = rig
            .admin()
            .post::<serde_json::Value>("/api/v1/reload", &())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(
        &good.replace("initial", "initail"),
        "proxy.yaml:3:8: phase: unknown variant",
    )
    .await;
    refused(&format!("{good}\nlimit: {{}}\n"), "unknown field").await;
    refused(
        &good.replace("shop:\n", "shoop:\n"),
        "databases: cannot be changed by a reload",
    )
    .await;
    refused(
        &good.replace("phase: initial", "phase: switchover"),
        "go through dual_write first",
    )
    .await;
    fs::write(rig.config_path(), &good).unwrap();
    rig.check(&["reload"], 0, "phase initial");
    rig.client().await.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_rows_count_as_synced_only_where_both_sides_are_equal() {
    let mut rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        let client = rig.direct(side, APP).await;
        client
            .batch_execute(
                "CREATE TABLE same (id int PRIMARY KEY, v text); INSERT INTO same SELECT i, 'v' FROM generate_series(1, 500) i;
                 CREATE TABLE other (id int PRIMARY KEY, v text); INSERT INTO other SELECT i, 'v' FROM generate_series(1, 500) i",
            )
            .await
            .unwrap();
    }
    let new = rig.direct(Side::New, APP).await;
    new.batch_execute("UPDATE other SET v = 'w' WHERE id = 250")
        .await
        .unwrap();
    rig.serve(Phase::DualWrite).await;
    let seeding = |status: &Status, name: &str| {
        let tables = &status.databases[0].mirroring.as_ref()?.tables;
        let table = tables.iter().find(|table| table.name == name)?;
        Some(table.seeding.clone())
    };
    let status = rig
        .until(|status| seeding(status, "public.same").as_deref() == Some("synced"))
        .await;
    assert_eq!(seeding(&status, "public.other").as_deref(), Some("unseeded"));
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "public.other is not");
    let error = rig.set_phase(Phase::Switchover).await.unwrap_err().to_string();
    assert!(error.contains("a gate is closed"), "{error}");
    // Writes on both are mirrored meanwhile.
    let writes = "UPDATE same SET v = 'x' WHERE id % 3 = 0; UPDATE other SET v = 'mended' WHERE id = 250; DELETE FROM other WHERE id = 1";
    rig.run(writes).await;
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_star_stands_for_every_other_database() {
    let mut rig = Rig::new();
    rig.spawn_with_every_database(Phase::DualWrite);
    rig.until(|status| status.phase == Phase::DualWrite && status.databases.iter().any(|d| d.name == "shop"))
        .await;
    let url = |database: &str| format!("postgresql://{APP}:{PASSWORD}@127.0.0.1:{}/{database}", rig.port);
    let shop = connect(&url("shop")).await.unwrap();
    shop.batch_execute(ONE_ROW).await.unwrap();
    rig.on_both("postgres", "ALTER ROLE app CREATEDB; ALTER ROLE pgtandem CREATEDB");
    // Rounds stand still before the one that creates the database on new, for long enough to be told.
    rig.wait_caught_up().await;
    let holder = rig.direct(Side::New, OWN_ROLE).await;
    holder.batch_execute("BEGIN; LOCK TABLE t IN SHARE MODE").await.unwrap();
    shop.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    shop.batch_execute("CREATE DATABASE fresh").await.unwrap();
    rig.until(|status| {
        status
            .databases
            .iter()
            .any(|database| database.name == "fresh" && database.new.missing)
    })
    .await;
    let status = rig.status().await.unwrap();
    let fresh = status
        .databases
        .iter()
        .find(|database| database.name == "fresh")
        .unwrap();
    assert_eq!(
        (
            fresh.new.error.as_deref(),
            fresh.mirroring.as_ref().unwrap().error.as_deref()
        ),
        (None, None)
    );
    let log = rig.log();
    let mut alarms = log
        .lines()
        .filter(|line| line.contains("\"WARN\"") && line.contains("fresh"));
    assert_eq!(alarms.next(), None);
    holder.batch_execute("COMMIT").await.unwrap();
    // At once: its first row is captured all the same.
    let fresh = connect(&url("fresh")).await.unwrap();
    fresh
        .batch_execute("CREATE TABLE u (id int PRIMARY KEY); INSERT INTO u VALUES (7)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    let copied = connect(&rig.new.url(OWN_ROLE, "fresh")).await.unwrap();
    copied.batch_execute(&format!("SET ROLE {APP}")).await.unwrap();
    let id: i32 = copied.query_one("SELECT id FROM u", &[]).await.unwrap().get(0);
    assert_eq!(id, 7);
    drop((fresh, copied));
    shop.batch_execute("DROP DATABASE fresh").await.unwrap();
    rig.until(|status| !status.databases.iter().any(|database| database.name == "fresh"))
        .await;
    rig.wait_caught_up().await;
    let left = rig
        .value(Side::New, "SELECT count(*) FROM pg_database WHERE datname = 'fresh'")
        .await;
    assert_eq!(left, "0");

    // One that is on its way from nowhere is told, by the log and by the status.
    rig.legacy.sql("postgres", "CREATE DATABASE lonely").unwrap();
    rig.until(|status| {
        let lonely = status.databases.iter().find(|database| database.name == "lonely");
        lonely.is_some_and(|lonely| {
            lonely.new.error.is_some() && lonely.mirroring.as_ref().is_some_and(|m| m.error.is_some())
        })
    })
    .await;
    rig.check(&["status"], 1, "database \"lonely\" does not exist");
    assert!(
        rig.log().contains("database \\\"lonely\\\" does not exist"),
        "{}",
        rig.log()
    );
}

/// The first database by name decides flips, so every proxy has been connected to it on both sides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_that_decided_a_flip_can_be_dropped() {
    let mut rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        rig.server(side)
            .sql(
                "postgres",
                "ALTER ROLE app CREATEDB; ALTER ROLE pgtandem CREATEDB; \
                 CREATE DATABASE aaa OWNER app",
            )
            .unwrap();
    }
    rig.spawn_with_every_database(Phase::DualWrite);
    let mirrored = |status: &Status, name: &str| status.databases.iter().any(|database| database.name == name);
    rig.until(|status| status.phase == Phase::DualWrite && mirrored(status, "shop") && mirrored(status, "aaa"))
        .await;
    rig.wait_caught_up().await;
    for side in ["new", "legacy"] {
        rig.check(&["switchover", "--to", side], 0, "");
    }
    let shop = rig.client().await;
    shop.batch_execute("DROP DATABASE aaa").await.unwrap();
    rig.wait_caught_up().await;
    let left = rig
        .value(Side::New, "SELECT count(*) FROM pg_database WHERE datname = 'aaa'")
        .await;
    assert_eq!(left, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_role_may_not_is_said_as_sql_for_a_dba() {
    let mut rig = Rig::new();
    let table = "CREATE ROLE other; CREATE TABLE theirs (id int PRIMARY KEY); ALTER TABLE theirs OWNER TO other";
    rig.on_both("shop", table);
    rig.new
        .sql(
            "shop",
            &format!("REVOKE SET ON PARAMETER session_replication_role FROM {OWN_ROLE}"),
        )
        .unwrap();
    rig.write_config(Phase::DualWrite);
    rig.spawn_proxy();
    assert_eq!(rig.exit_code().await, Some(2), "{}", rig.log());
    assert!(rig.log().contains("a DBA must run: GRANT"), "{}", rig.log());
    rig.on_both("shop", &format!("GRANT other TO {OWN_ROLE}"));
    rig.serve(Phase::DualWrite).await;
    rig.run(ONE_ROW).await;
    let grant = "GRANT SET ON PARAMETER session_replication_role";
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref();
        let error = mirroring.and_then(|mirroring| mirroring.error.clone());
        error.is_some_and(|error| error.contains(grant))
    })
    .await;
    rig.check(&["status"], 1, grant);
    rig.new.sql("shop", &format!("{grant} TO {OWN_ROLE}")).unwrap();
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_close_on_what_was_measured_and_are_passed_by_a_reason_only() {
    let mut rig = Rig::new();
    let thresholds = "{ verified_within: 1h, prepared: 1ms, shadow_match_rate: 99 }";
    rig.extra = format!("reads: {{ shadow_percent: 100 }}\nswitchover: {{ gates: {thresholds} }}");
    rig.serve(Phase::DualRead).await;
    let client = rig.client_after(ONE_ROW).await;
    rig.wait_caught_up().await;
    let dry_run = ["switchover", "--to", "new", "--dry-run"];
    rig.check(
        &dry_run,
        1,
        "public.t never was (required: every table found equal within 60 min)",
    );
    rig.check(&dry_run, 1, "there were no compared reads alike since ");
    rig.check(&["verify"], 0, "");
    let open = |status: &Status, name: &str| {
        let gate = status.gates.iter().find(|gate| gate.name == format!("shop: {name}"));
        gate.is_some_and(|gate| gate.open)
    };
    rig.until(|status| open(status, "verification")).await;
    // Until the table is known to the shadow, reads of it are not compared.
    let mut tries = 0;
    while !open(&rig.status().await.unwrap(), "shadow match rate") {
        tries += 1;
        assert!(tries < 1200, "{:#?}", rig.status().await);
        client.query("SELECT * FROM t", &[]).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    rig.check(&dry_run, 0, "the flip could begin");

    client
        .batch_execute("BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'forgotten'")
        .await
        .unwrap();
    rig.check(&dry_run, 1, "forgotten for");
    rig.check(
        &["switchover", "--to", "new"],
        1,
        "nothing was changed: a gate is closed",
    );
    // No reason helps past the fence.
    let force = ["switchover", "--to", "new", "--force", "--reason", "asked its owner"];
    rig.check(&force, 1, "the prepared transaction 'forgotten'");
    let legacy = rig.direct(Side::Legacy, APP).await;
    legacy.batch_execute("ROLLBACK PREPARED 'forgotten'").await.unwrap();

    rig.extra = "reads: { shadow_percent: 100 }\nswitchover: { gates: { verified_within: 1ms } }".into();
    rig.set_phase(Phase::DualRead).await.unwrap();
    rig.check(&dry_run, 1, "(required: every table found equal within");
    rig.check(&force, 0, "forced: asked its owner");
    rig.check(&["switchover", "--history"], 0, "forced: asked its owner");
    assert_eq!(rig.status().await.unwrap().primary, Side::New);
    rig.assert_equal().await;
}
