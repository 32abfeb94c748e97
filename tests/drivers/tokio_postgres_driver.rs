//! tokio-postgres: pipelines whatever is awaited together, portals, binary COPY, notices and
//! notifications as they come.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, TryStreamExt, future};
use pgtandem::servers::PASSWORD;
use serde_json::{Value, json};
use tokio_postgres::binary_copy::{BinaryCopyInWriter, BinaryCopyOutStream};
use tokio_postgres::error::{DbError, ErrorPosition};
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Config, Error, IsolationLevel, NoTls, SimpleQueryMessage};

use crate::pair::{CLIENT, Endpoint};
use crate::report::{Observed, Unexpected};

pub(crate) fn run(endpoint: &Endpoint) -> Vec<Observed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut observed = Vec::new();
    macro_rules! behaviours {
        ($($name:ident),* $(,)?) => {
            $(
                if std::env::var("DRIVER_ONLY").is_ok_and(|only| !stringify!($name).contains(&only)) {
                } else {
                    let result = runtime.block_on($name(endpoint));
                    observed.push(Observed {
                        name: stringify!($name).to_owned(),
                        result: result.map_err(|error| Unexpected(format!("Exception: {error:?}"))),
                    });
                }
            )*
        };
    }
    behaviours!(
        startup,
        refused_connections,
        simple_queries,
        prepared_statements,
        types_in_binary,
        requests_in_flight,
        portals,
        copy_in_and_out,
        copy_failing,
        transactions,
        notices_and_notifications,
        cancel,
        errors_in_full,
        rows_left_unread,
        large_values,
        ended_by_the_server,
    );
    observed
}

type Outcome = Result<Value, Error>;

/// What a connection heard besides answers.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<Value>>>);

impl Heard {
    fn take(&self) -> Vec<Value> {
        std::mem::take(&mut *self.0.lock().expect("not poisoned"))
    }
}

fn config(endpoint: &Endpoint) -> Config {
    let mut config = Config::new();
    config
        .host(Endpoint::HOST)
        .port(endpoint.port)
        .user(CLIENT)
        .password(PASSWORD)
        .dbname(&endpoint.database);
    config
}

async fn connect(config: &Config) -> Result<(Client, Heard), Error> {
    let (client, mut connection) = config.connect(NoTls).await?;
    let heard = Heard::default();
    let hears = heard.clone();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            let value = match message {
                AsyncMessage::Notice(notice) => diagnosis(&notice),
                AsyncMessage::Notification(n) => json!([n.channel(), n.payload()]),
                other => json!(format!("{other:?}")),
            };
            hears.0.lock().expect("not poisoned").push(value);
        }
    });
    Ok((client, heard))
}

fn diagnosis(error: &DbError) -> Value {
    let position = match error.position() {
        Some(ErrorPosition::Original(position)) => json!(position),
        Some(ErrorPosition::Internal { position, query }) => json!([position, query]),
        None => Value::Null,
    };
    // Temporary schemas are numbered by the server as sessions come and go.
    let schema = error.schema().map(|name| {
        if name.starts_with("pg_temp_") {
            "pg_temp_N"
        } else {
            name
        }
    });
    json!([
        error.severity(),
        error.code().code(),
        error.message(),
        error.detail(),
        error.hint(),
        position,
        error.where_(),
        schema,
        error.table(),
        error.column(),
        error.datatype(),
        error.constraint(),
        error.file(),
        error.line(),
        error.routine(),
    ])
}

fn failure(error: &Error) -> Value {
    error.as_db_error().map_or_else(|| json!(error.to_string()), diagnosis)
}

fn answer<T: Into<Value>>(result: Result<T, Error>) -> Value {
    result.map_or_else(|error| failure(&error), Into::into)
}

fn messages(messages: Vec<SimpleQueryMessage>) -> Value {
    let each = messages.iter().map(|message| match message {
        SimpleQueryMessage::Row(row) => json!((0..row.len()).map(|n| row.get(n)).collect::<Vec<_>>()),
        SimpleQueryMessage::CommandComplete(count) => json!({ "complete": count }),
        SimpleQueryMessage::RowDescription(columns) => {
            json!({ "columns": columns.iter().map(|column| column.name()).collect::<Vec<_>>() })
        }
        other => json!(format!("{other:?}")),
    });
    each.collect()
}

async fn startup(endpoint: &Endpoint) -> Outcome {
    let mut config = config(endpoint);
    config.application_name("rust shop").options("-c work_mem=6MB");
    let (client, _) = connect(&config).await?;
    let row = client
        .query_one(
            "SELECT current_setting('work_mem'), current_setting('application_name'), current_user::text",
            &[],
        )
        .await?;
    Ok(json!([
        row.get::<_, &str>(0),
        row.get::<_, &str>(1),
        row.get::<_, &str>(2)
    ]))
}

async fn refused_connections(endpoint: &Endpoint) -> Outcome {
    let mut answers = Vec::new();
    for change in [
        |config: &mut Config| config.password("wrong").clone(),
        |config: &mut Config| config.user("no_such_role").clone(),
        |config: &mut Config| config.dbname("no_such_database").clone(),
        |config: &mut Config| config.options("-c no_such_setting=1").clone(),
    ] {
        let refused = connect(&change(&mut config(endpoint))).await.err();
        // Whoever refuses a connection need not do so in the same line of C.
        answers.push(match refused.as_ref().and_then(Error::as_db_error) {
            Some(error) => json!([error.severity(), error.code().code(), error.message(), error.detail()]),
            None => json!(refused.map(|error| error.to_string())),
        });
    }
    Ok(json!(answers))
}

async fn simple_queries(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let many = client
        .simple_query("SELECT 1 AS a, NULL; CREATE TEMP TABLE t (id int UNIQUE); INSERT INTO t VALUES (1), (2); SELECT 'x' WHERE false;")
        .await?;
    let failing = client.simple_query("INSERT INTO t VALUES (3); SELECT 1/0").await;
    let empty = client.simple_query(" ; ").await?;
    let left = client.simple_query("SELECT count(*) FROM t").await?;
    Ok(json!([
        messages(many),
        answer(failing.map(messages)),
        messages(empty),
        messages(left)
    ]))
}

async fn prepared_statements(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    client
        .batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)")
        .await?;
    let insert = client.prepare("INSERT INTO t VALUES ($1, $2) RETURNING id").await?;
    let described = json!([
        insert.params().iter().map(Type::name).collect::<Vec<_>>(),
        insert
            .columns()
            .iter()
            .map(|c| json!([c.name(), c.type_().name()]))
            .collect::<Vec<_>>(),
    ]);
    let mut answers = vec![described];
    for id in [1, 2, 2, 3] {
        let result = client
            .query_one(&insert, &[&id, &"name"])
            .await
            .map(|row| row.get::<_, i32>(0));
        answers.push(answer(result));
    }
    answers.push(answer(client.prepare("SELECT absent FROM t").await.map(|_| "prepared")));
    let typed = client.prepare_typed("SELECT $1 || 'x'", &[Type::TEXT]).await?;
    answers.push(json!(client.query_one(&typed, &[&"typed "]).await?.get::<_, String>(0)));
    let star = client.prepare("SELECT * FROM t").await?;
    client.batch_execute("ALTER TABLE t ADD COLUMN extra int").await?;
    answers.push(answer(client.query(&star, &[]).await.map(|rows| rows.len())));
    // Dropping a statement closes it on the server.
    drop((star, typed, insert));
    let left = client
        .query_one("SELECT count(*) FROM pg_prepared_statements", &[])
        .await?;
    answers.push(json!(left.get::<_, i64>(0)));
    Ok(json!(answers))
}

async fn types_in_binary(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let row = client
        .query_one(
            "SELECT $1::bool, $2::int2, $3::int8, $4::float8, $5::text, $6::bytea, $7::int4[], $8::text[], $9::text, $10::\"char\", $11::oid",
            &[
                &true, &-7_i16, &i64::MIN, &f64::INFINITY, &"żółć 🐘", &&b"\0\xff"[..], &vec![Some(1), None], &vec!["a,b", "c\"d"],
                &None::<&str>, &65_i8, &u32::MAX,
            ],
        )
        .await?;
    Ok(json!([
        row.get::<_, bool>(0),
        row.get::<_, i16>(1),
        row.get::<_, i64>(2),
        row.get::<_, f64>(3).to_string(),
        row.get::<_, &str>(4),
        row.get::<_, Vec<u8>>(5),
        row.get::<_, Vec<Option<i32>>>(6),
        row.get::<_, Vec<String>>(7),
        row.get::<_, Option<&str>>(8),
        row.get::<_, i8>(9),
        row.get::<_, u32>(10),
    ]))
}

/// Requests that are awaited together go out without waiting for each other's answers.
async fn requests_in_flight(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let divide = client.prepare("SELECT 100 / ($1::int - 20)").await?;
    let quotients = future::join_all((0..100).map(|n| {
        let (client, divide) = (&client, &divide);
        async move { client.query_one(divide, &[&n]).await.map(|row| row.get::<_, i32>(0)) }
    }));
    let mixed = future::join3(
        client.simple_query("SELECT 'simple'; SELECT 1/0; SELECT 'never'"),
        client.query("SELECT n FROM generate_series(1, 3) n", &[]),
        client.prepare("SELEC"),
    );
    let (quotients, (simple, rows, malformed)) = future::join(quotients, mixed).await;
    Ok(json!([
        quotients.into_iter().map(answer).collect::<Vec<_>>(),
        answer(simple.map(messages)),
        answer(rows.map(|rows| rows.len())),
        answer(malformed.map(|_| "prepared")),
    ]))
}

async fn portals(endpoint: &Endpoint) -> Outcome {
    let (mut client, _) = connect(&config(endpoint)).await?;
    let transaction = client.transaction().await?;
    let one = transaction
        .bind("SELECT n FROM generate_series(1, $1::int) n", &[&10])
        .await?;
    let two = transaction.bind("SELECT -n FROM generate_series(1, 3) n", &[]).await?;
    let mut portions = Vec::new();
    for (portal, limit) in [(&one, 4), (&two, 2), (&one, 4), (&two, 0), (&one, 4), (&one, 4)] {
        let rows = transaction.query_portal(portal, limit).await?;
        portions.push(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>());
    }
    let dividing = transaction
        .bind("SELECT 10 / (4 - n) FROM generate_series(1, 9) n", &[])
        .await?;
    let first = transaction.query_portal(&dividing, 2).await?.len();
    let failed = answer(transaction.query_portal(&dividing, 5).await.map(|rows| rows.len()));
    let aborted = answer(transaction.query("SELECT 1", &[]).await.map(|rows| rows.len()));
    transaction.rollback().await?;
    Ok(json!([portions, first, failed, aborted]))
}

async fn copy_in_and_out(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    client.batch_execute("CREATE TEMP TABLE t (id int, name text)").await?;
    let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t FROM STDIN").await?);
    for n in 0..3000 {
        sink.feed(Bytes::from(format!("{n}\tname {n}\n"))).await?;
    }
    let text = sink.finish().await?;
    let sink = client.copy_in("COPY t FROM STDIN (FORMAT binary)").await?;
    let mut writer = pin!(BinaryCopyInWriter::new(sink, &[Type::INT4, Type::TEXT]));
    for n in 3000..3100 {
        writer.as_mut().write(&[&n, &None::<&str>]).await?;
    }
    let binary = writer.finish().await?;
    let out = client.copy_out("COPY (SELECT * FROM t ORDER BY id) TO STDOUT").await?;
    let content: Vec<Bytes> = out.try_collect().await?;
    let content = content.concat();
    let out = client
        .copy_out("COPY (SELECT * FROM t ORDER BY id) TO STDOUT (FORMAT binary)")
        .await?;
    let rows = pin!(BinaryCopyOutStream::new(out, &[Type::INT4, Type::TEXT]))
        .count()
        .await;
    let bytes = content
        .iter()
        .fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    Ok(json!([text, binary, content.len(), bytes, rows]))
}

async fn copy_failing(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    client.batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY)").await?;
    let mut answers = Vec::new();
    for lines in ["1\n2\nx\n", "1\n1\n", "1\t2\n"] {
        let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t FROM STDIN").await?);
        let sent = sink.send(Bytes::from_static(lines.as_bytes())).await;
        answers.push(answer(match sent {
            Ok(()) => sink.finish().await,
            Err(error) => Err(error),
        }));
    }
    {
        // Dropping the sink breaks the copy off.
        let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t FROM STDIN").await?);
        sink.send(Bytes::from_static(b"7\n")).await?;
    }
    let left = client.query_one("SELECT count(*) FROM t", &[]).await?;
    answers.push(json!(left.get::<_, i64>(0)));
    let mut out = pin!(
        client
            .copy_out("COPY (SELECT 1/(3-n) FROM generate_series(1,5) n) TO STDOUT")
            .await?
    );
    // After an error this stream does not end, it repeats it.
    while let Some(piece) = out.next().await {
        let failed = piece.is_err();
        answers.push(answer(piece.map(|bytes| bytes.to_vec())));
        if failed {
            break;
        }
    }
    Ok(json!(answers))
}

async fn transactions(endpoint: &Endpoint) -> Outcome {
    let (mut client, _) = connect(&config(endpoint)).await?;
    client.batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY)").await?;
    let mut answers = Vec::new();
    let mut outer = client
        .build_transaction()
        .isolation_level(IsolationLevel::Serializable)
        .deferrable(true)
        .start()
        .await?;
    outer.execute("INSERT INTO t VALUES (1)", &[]).await?;
    let inner = outer.savepoint("nested").await?;
    answers.push(answer(inner.execute("INSERT INTO t VALUES (1)", &[]).await));
    inner.rollback().await?;
    outer.execute("INSERT INTO t VALUES (2)", &[]).await?;
    outer.commit().await?;
    // Dropped without an end: rolled back.
    let dropped = client.transaction().await?;
    dropped.execute("INSERT INTO t VALUES (3)", &[]).await?;
    drop(dropped);
    let read_only = client.build_transaction().read_only(true).start().await?;
    answers.push(answer(
        read_only
            .batch_execute("CREATE TABLE never (a int)")
            .await
            .map(|()| "created"),
    ));
    answers.push(answer(read_only.commit().await.map(|()| "committed")));
    let left = client.query_one("SELECT array_agg(id ORDER BY id) FROM t", &[]).await?;
    answers.push(json!(left.get::<_, Vec<i32>>(0)));
    Ok(json!(answers))
}

async fn notices_and_notifications(endpoint: &Endpoint) -> Outcome {
    let (client, heard) = connect(&config(endpoint)).await?;
    client
        .batch_execute("LISTEN here; DO $$ BEGIN RAISE NOTICE 'noted' USING HINT = 'h'; RAISE WARNING 'warned'; END $$; NOTIFY here, 'own'")
        .await?;
    let (other, _) = connect(&config(endpoint)).await?;
    other.batch_execute("SELECT pg_notify('here', 'żółć')").await?;
    // With no request of ours under way it still comes.
    let mut all = Vec::new();
    while all.len() < 4 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        all.append(&mut heard.take());
    }
    Ok(json!(all))
}

async fn cancel(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let (other, _) = connect(&config(endpoint)).await?;
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
    let cancels = async {
        let asleep =
            "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state = 'active' AND query LIKE '%pg_sleep%'";
        while other.query_one(asleep, &[&pid]).await?.get::<_, i64>(0) == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        client.cancel_token().cancel_query(NoTls).await
    };
    let (slept, cancelled) = future::join(client.batch_execute("SELECT pg_sleep(60)"), cancels).await;
    cancelled?;
    let after = client.query_one("SELECT 1", &[]).await?.get::<_, i32>(0);
    Ok(json!([answer(slept.map(|()| "slept")), after]))
}

async fn errors_in_full(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    client
        .batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY CHECK (id > 0), needed text NOT NULL); INSERT INTO t VALUES (1, '')")
        .await?;
    let mut answers = Vec::new();
    for statement in [
        "SELEC",
        "SELECT 'ż', absent",
        "INSERT INTO t VALUES (1, '')",
        "INSERT INTO t VALUES (-1, '')",
        "INSERT INTO t VALUES (2)",
        "SELECT * FROM absent",
        "SELECT 'x'::int",
        "SELECT 1/0",
        "DO $$ BEGIN EXECUTE 'SELEC'; END $$",
    ] {
        answers.push(answer(client.batch_execute(statement).await.map(|()| "did not fail")));
        answers.push(answer(client.execute(statement, &[]).await));
    }
    Ok(json!(answers))
}

async fn rows_left_unread(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let mut firsts = Vec::new();
    for count in [50_000, 1] {
        let query = "SELECT n, repeat('r', 100) FROM generate_series(1, $1::int) n";
        let mut rows = pin!(client.query_raw(query, [count]).await?);
        firsts.push(rows.try_next().await?.map(|row| row.get::<_, i32>(0)));
    }
    Ok(json!(firsts))
}

async fn large_values(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let big: Vec<u8> = (0..8_u32 << 20)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let row = client.query_one("SELECT $1::bytea, length($1::bytea)", &[&big]).await?;
    Ok(json!([row.get::<_, Vec<u8>>(0) == big, row.get::<_, i32>(1)]))
}

async fn ended_by_the_server(endpoint: &Endpoint) -> Outcome {
    let (client, _) = connect(&config(endpoint)).await?;
    let ended = client
        .batch_execute("SELECT pg_terminate_backend(pg_backend_pid())")
        .await;
    while !client.is_closed() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    Ok(json!([
        answer(ended.map(|()| "went on")),
        answer(client.batch_execute("SELECT 1").await.map(|()| "went on"))
    ]))
}
