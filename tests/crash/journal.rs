//! The journal's bound, for writers through every proxy and for those that go past them; and its
//! rotation, which waits for nobody.

use pgtandem::admin::api::Status;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::another::{Another, mirroring};
use crate::rig::{APP, Rig};

const SCHEMA: &str = "CREATE TABLE moved (writer int, number int, filling text, PRIMARY KEY (writer, number));
                      CREATE TABLE kept (id int PRIMARY KEY); INSERT INTO kept SELECT generate_series(1, 100)";

async fn bounded(when_full: &str) -> (Rig, Another) {
    let mut rig = Rig::new();
    rig.extra = format!("journal: {{ max_bytes: 4MiB, when_full: {when_full} }}");
    rig.serve(Phase::DualWrite).await;
    let other = Another::beside(&rig, Phase::DualWrite).await;
    rig.client().await.batch_execute(SCHEMA).await.unwrap();
    rig.wait_caught_up().await;
    (rig, other)
}

/// Through either proxy and past both.
async fn writers(rig: &Rig, other: &Another) -> [Client; 3] {
    [
        rig.client().await,
        crate::rig::connect(&other.url()).await.unwrap(),
        rig.direct(Side::Legacy, APP).await,
    ]
}

/// 100 kB, incompressible, that the ledger in `number` counts.
async fn write(client: &Client, writer: usize, number: i32) -> Result<u64, tokio_postgres::Error> {
    let sql = "INSERT INTO moved SELECT $1, $2, string_agg(md5(random()::text), '') FROM generate_series(1, 3000)";
    client.execute(sql, &[&i32::try_from(writer).unwrap(), &number]).await
}

fn full(status: &Status) -> bool {
    mirroring(status).journal.full
}

fn stopped(status: &Status) -> bool {
    mirroring(status).journal.stopped
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_its_bound_the_journal_refuses_writes_until_it_has_drained() {
    let (mut rig, other) = bounded("block").await;
    rig.new.stop("fast").unwrap();
    let clients = writers(&rig, &other).await;
    let mut written = [0; 3];
    for (writer, client) in clients.iter().enumerate() {
        let refused = loop {
            match write(client, writer, written[writer]).await {
                Ok(_) => written[writer] += 1,
                Err(error) => break error,
            }
        };
        let error = refused.as_db_error().unwrap_or_else(|| panic!("{refused:?}"));
        assert_eq!(error.code(), &SqlState::DISK_FULL);
        assert!(error.message().contains("journal.max_bytes"), "{error:?}");
        assert!(error.detail().unwrap().contains("(new) does not follow"), "{error:?}");
        // Reads are none of the journal's business.
        client.query("SELECT count(*) FROM moved", &[]).await.unwrap();
    }
    assert!(written[0] > 10, "{written:?}");
    assert!(mirroring(&rig.until(full).await).journal.bytes >= 4 << 20);
    other.until(&rig, full).await;
    let told = rig.command(&["status"]);
    assert_eq!(told.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&told.stdout).contains("the journal is full"));

    rig.new.start_again().unwrap();
    let open = |status: &Status| !full(status) && mirroring(status).journal.bytes < 4 << 20;
    rig.until(open).await;
    other.until(&rig, open).await;
    for (writer, client) in clients.iter().enumerate() {
        write(client, writer, written[writer]).await.unwrap();
        written[writer] += 1;
    }
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    let there = rig.value(Side::New, "SELECT count(*) FROM moved").await;
    assert_eq!(there, written.iter().sum::<i32>().to_string());
    assert_eq!(mirroring(&rig.status().await.unwrap()).divergences, 0);
}

/// The secondary is there and the applier waits in the middle of a round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bound_holds_while_a_round_hangs() {
    let (rig, other) = bounded("block").await;
    let locking = rig.direct(Side::New, SUPERUSER).await;
    locking.batch_execute("BEGIN; LOCK TABLE moved").await.unwrap();
    let clients = writers(&rig, &other).await;
    for (writer, client) in clients.iter().enumerate() {
        let mut number = 0;
        let refused = loop {
            match write(client, writer, number).await {
                Ok(_) => number += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.code(), Some(&SqlState::DISK_FULL), "{refused:?}");
    }
    rig.until(full).await;
    locking.batch_execute("ROLLBACK").await.unwrap();
    rig.until(|status| !full(status)).await;
    for client in &clients {
        client.batch_execute("UPDATE kept SET id = -id").await.unwrap();
    }
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

/// Whether the secondary is there at the time or not.
async fn stops_and_starts_again(away: bool) {
    let (mut rig, other) = bounded("stop_mirroring").await;
    if away {
        rig.new.stop("fast").unwrap();
    }
    let clients = writers(&rig, &other).await;
    let mut written = 0;
    // In one transaction, where the applier would otherwise keep up.
    clients[2].batch_execute("BEGIN").await.unwrap();
    for number in 0..60 {
        write(&clients[2], 2, number).await.unwrap();
        written += 1;
    }
    rig.until(stopped).await;
    clients[2].batch_execute("COMMIT").await.unwrap();
    // Nobody is refused.
    for (writer, client) in clients.iter().enumerate() {
        for number in 100..105 {
            write(client, writer, number).await.unwrap();
            written += 1;
        }
    }
    let all_unseeded = |status: &Status| {
        let mirroring = mirroring(status);
        mirroring.journal.stopped
            && mirroring.tables.len() == 2
            && mirroring.tables.iter().all(|table| {
                table.seeding == "unseeded"
                    && table
                        .note
                        .as_ref()
                        .is_some_and(|note| note.contains("the journal was full"))
            })
    };
    rig.until(all_unseeded).await;
    other.until(&rig, all_unseeded).await;
    let told = rig.command(&["status"]);
    assert_eq!(told.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&told.stdout).contains("the secondary must be seeded again"));
    let gate = rig.command(&["switchover", "--to", "new", "--dry-run"]);
    assert_eq!(gate.status.code(), Some(1), "{gate:?}");
    if away {
        // A proxy that knows nothing but what the databases record tells the same.
        rig.kill_proxy();
        rig.spawn_proxy();
        rig.until(|status| {
            let mirrored = status
                .databases
                .first()
                .is_some_and(|database| database.mirroring.is_some());
            mirrored && all_unseeded(status)
        })
        .await;
        rig.new.start_again().unwrap();
    }
    rig.until(all_unseeded).await;
    assert_eq!(
        rig.value(Side::Legacy, "SELECT count(*) FROM moved").await,
        written.to_string()
    );

    // Armed again: capture goes and comes, then what is equal is found to be.
    for phase in [Phase::Initial, Phase::DualWrite] {
        rig.set_phase(phase).await.unwrap();
        other.reload(&rig).await.unwrap();
    }
    let clients = writers(&rig, &other).await;
    let seeding = |status: &Status, table: &str, state: &str| {
        let tables = &mirroring(status).tables;
        tables
            .iter()
            .any(|found| found.name == table && found.seeding == state && found.note.is_none())
    };
    rig.until(|status| {
        !stopped(status) && seeding(status, "public.kept", "synced") && seeding(status, "public.moved", "unseeded")
    })
    .await;
    clients[0]
        .batch_execute("DELETE FROM kept WHERE id % 2 = 0")
        .await
        .unwrap();
    clients[1]
        .batch_execute("INSERT INTO kept VALUES (1000)")
        .await
        .unwrap();
    clients[2].batch_execute("UPDATE kept SET id = -id").await.unwrap();
    rig.wait_caught_up().await;
    for side in [Side::Legacy, Side::New] {
        assert_eq!(
            rig.value(side, "SELECT (count(*), sum(id)) FROM kept").await,
            "(51,-3500)"
        );
    }
    assert_eq!(mirroring(&rig.status().await.unwrap()).divergences, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_its_bound_the_journal_stops_mirroring_and_it_can_be_armed_again() {
    stops_and_starts_again(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirroring_stops_at_the_bound_also_while_nobody_applies() {
    stops_and_starts_again(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_keeps_the_journal_from_rotating_holds_up_nothing_else() {
    let (rig, _other) = bounded("block").await;
    let client = rig.client().await;
    let truncations = "SELECT truncations FROM pgtandem.side";

    // A transaction that stays open may have written to any slot there was since.
    let open = rig.direct(Side::Legacy, APP).await;
    open.batch_execute("BEGIN; INSERT INTO kept VALUES (-1)").await.unwrap();
    let before = rig.value(Side::Legacy, truncations).await;
    for number in 0..25 {
        write(&client, 0, number).await.unwrap();
        rig.wait_caught_up().await;
    }
    let count = "SELECT count(*) FROM moved";
    assert_eq!(rig.value(Side::New, count).await, rig.value(Side::Legacy, count).await);
    // Two looks of the rotation.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(rig.value(Side::Legacy, truncations).await, before);
    open.batch_execute("COMMIT").await.unwrap();
    rig.until(|status| mirroring(status).journal.bytes < 1 << 20).await;

    // A dump reads the journal: it may finish, and writers do not queue behind a TRUNCATE.
    let dump = rig.direct(Side::Legacy, SUPERUSER).await;
    dump.batch_execute(
        "BEGIN; LOCK TABLE pgtandem.change_0, pgtandem.change_1, pgtandem.change_2 IN ACCESS SHARE MODE",
    )
    .await
    .unwrap();
    let before = rig.value(Side::Legacy, truncations).await;
    for number in 100..125 {
        write(&client, 0, number).await.unwrap();
        rig.wait_caught_up().await;
    }
    assert_eq!(rig.value(Side::Legacy, truncations).await, before);
    dump.batch_execute("ROLLBACK").await.unwrap();
    rig.until(|status| mirroring(status).journal.bytes < 1 << 20).await;
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}
