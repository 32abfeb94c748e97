//! Reads that are under way when the primary is switched over.

use pgtandem::control::Side;
use pgtandem::servers::SUPERUSER;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::flips::{Fleet, switchover};
use crate::rig::connect;

/// Until so many sessions of a server wait for a lock.
async fn until_waiting(fleet: &Fleet, count: i64) {
    let sql = "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'app' AND wait_event_type = 'Lock'";
    while fleet.stage.rig.value(Side::Legacy, sql).await != count.to_string() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn version(client: &Client) -> i32 {
    let row = client
        .query_one("SELECT current_setting('server_version_num')", &[])
        .await
        .unwrap();
    row.get::<_, String>(0).parse::<i32>().unwrap() / 10_000
}

async fn set_apart(client: &Client) {
    client
        .batch_execute("SET my.own = 'kept'; LISTEN somebody")
        .await
        .unwrap();
}

async fn assert_kept(client: &Client) {
    let row = client
        .query_one(
            "SELECT current_setting('my.own'), (SELECT string_agg(c, ',') FROM pg_listening_channels() c)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!((row.get(0), row.get(1)), ("kept", "somebody"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_are_not_waited_for_and_finish_where_they_began() {
    let fleet = Fleet::set().await;
    let writer = connect(&fleet.stage.rig.url()).await.unwrap();
    writer
        .batch_execute("INSERT INTO notes (note) VALUES ('before'); INSERT INTO jobs DEFAULT VALUES")
        .await
        .unwrap();

    // Transactions that said that they only read, in several ways, through both proxies.
    let mut transactions = Vec::new();
    for (number, begin) in [
        &["BEGIN READ ONLY"][..],
        &["START TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"],
        &["BEGIN", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY"],
    ]
    .into_iter()
    .enumerate()
    {
        for extended in [false, true] {
            let url = if number % 2 == 0 {
                fleet.other.url()
            } else {
                fleet.stage.rig.url()
            };
            let client = connect(&url).await.unwrap();
            set_apart(&client).await;
            for statement in begin {
                if extended {
                    let prepared = client.prepare(statement).await.unwrap();
                    client.execute(&prepared, &[]).await.unwrap();
                } else {
                    client.batch_execute(statement).await.unwrap();
                }
            }
            client.query("SELECT * FROM notes", &[]).await.unwrap();
            transactions.push(client);
        }
    }

    // Single statements, which wait for a lock on the old side.
    let long = format!("SELECT count(*)::text FROM jobs /* {} */", "long ".repeat(400));
    let mut readers = Vec::new();
    for (text, prepared) in [
        ("SELECT count(*)::text FROM jobs", true),
        ("SELECT count(*)::text FROM jobs", false),
        (&long, true),
        (&long, false),
    ] {
        let client = connect(&fleet.other.url()).await.unwrap();
        set_apart(&client).await;
        let statement = match prepared {
            true => Some(client.prepare(text).await.unwrap()),
            false => None,
        };
        readers.push((client, statement, text.to_owned()));
    }
    let blocking = fleet.stage.rig.direct(Side::Legacy, SUPERUSER).await;
    blocking.batch_execute("BEGIN; LOCK TABLE jobs").await.unwrap();
    let reads: Vec<JoinHandle<(Client, String)>> = readers
        .into_iter()
        .map(|(client, statement, text)| {
            tokio::spawn(async move {
                let count = match &statement {
                    Some(statement) => client.query_one(statement, &[]).await.unwrap().get(0),
                    None => first_value(&client, &text).await,
                };
                (client, count)
            })
        })
        .collect();
    until_waiting(&fleet, 4).await;

    let flip = switchover(fleet.stage.rig.admin_port, Side::New, false).await;
    let flip = flip.unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    assert_eq!((flip.outcome.as_str(), flip.sessions_ended), ("done", 0), "{flip:?}");

    // Writes go on over there; the reads end where they began.
    writer
        .batch_execute("INSERT INTO notes (note) VALUES ('after')")
        .await
        .unwrap();
    assert_eq!(version(&writer).await, 18);
    for client in &transactions {
        assert_eq!(version(client).await, 15);
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(version(client).await, 18);
        assert_kept(client).await;
    }
    blocking.batch_execute("ROLLBACK").await.unwrap();
    for read in reads {
        let (client, count) = read.await.unwrap();
        assert!(count.parse::<i64>().unwrap() >= 1);
        assert_eq!(version(&client).await, 18);
        assert_kept(&client).await;
        client
            .batch_execute("INSERT INTO notes (note) VALUES ('by a reader')")
            .await
            .unwrap();
    }
    fleet.agree().await;
    fleet.assert_exact().await;
}

async fn first_value(client: &Client, text: &str) -> String {
    let messages = client.simple_query(text).await.unwrap();
    let row = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    row.unwrap().to_owned()
}

/// What looks like a read and may write is waited for; so is what has said nothing of itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_write_is_waited_for() {
    let fleet = Fleet::with("switchover: { drain_timeout: 600ms }").await;
    let client = fleet.stage.rig.client().await;
    client
        .batch_execute("CREATE FUNCTION writes() RETURNS bigint LANGUAGE sql AS $$ INSERT INTO notes (note) VALUES ('by a function') RETURNING 1::bigint $$")
        .await
        .unwrap();
    let blocking = fleet.stage.rig.direct(Side::Legacy, SUPERUSER).await;
    for text in [
        "SELECT writes()",
        "SELECT * FROM notes FOR UPDATE",
        "SELECT 1; INSERT INTO notes (note) VALUES ('x')",
    ] {
        blocking.batch_execute("BEGIN; LOCK TABLE notes").await.unwrap();
        let client = connect(&fleet.other.url()).await.unwrap();
        let running = tokio::spawn(async move { client.simple_query(text).await.map(|_| ()) });
        until_waiting(&fleet, 1).await;
        fleet
            .stage
            .rig
            .check(&["switchover", "--to", "new"], 1, "still had a transaction open");
        blocking.batch_execute("ROLLBACK").await.unwrap();
        running.await.unwrap().unwrap();
    }
    let open = fleet.stage.rig.client().await;
    open.batch_execute("BEGIN READ WRITE; SELECT * FROM notes")
        .await
        .unwrap();
    fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 1, "still had a transaction open");
    open.batch_execute("COMMIT").await.unwrap();
    fleet.assert_exact().await;
}
