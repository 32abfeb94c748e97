//! sqlx: describes and caches every statement, leaves streams half read, pools.

use futures_util::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError, PgListener, PgPoolOptions, PgRow, PgSslMode};
use sqlx::{Column, ConnectOptions, Connection, Error, Executor, Row, Statement, TypeInfo};

use crate::pair::Endpoint;
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
        cached_statements,
        types,
        raw_statements,
        streams_left_unread,
        transactions,
        copy,
        listener,
        errors_in_full,
        large_values,
        pool,
    );
    observed
}

type Outcome = Result<Value, Error>;

fn options(endpoint: &Endpoint) -> PgConnectOptions {
    let options: PgConnectOptions = endpoint.url().parse().expect("a URL");
    options.ssl_mode(PgSslMode::Disable)
}

async fn connect(endpoint: &Endpoint) -> Result<PgConnection, Error> {
    options(endpoint).connect().await
}

fn diagnosis(error: &PgDatabaseError) -> Value {
    let position = error.position().map(|position| format!("{position:?}"));
    let schema = error.schema().map(|name| {
        if name.starts_with("pg_temp_") {
            "pg_temp_N"
        } else {
            name
        }
    });
    json!([
        format!("{:?}", error.severity()),
        error.code(),
        error.message(),
        error.detail(),
        error.hint(),
        position,
        error.r#where(),
        schema,
        error.table(),
        error.column(),
        error.data_type(),
        error.constraint(),
        error.file(),
        error.line(),
        error.routine(),
    ])
}

fn answer<T: Into<Value>>(result: Result<T, Error>) -> Value {
    match result {
        Ok(value) => value.into(),
        Err(Error::Database(error)) => match error.try_downcast_ref::<PgDatabaseError>() {
            Some(error) => diagnosis(error),
            None => json!(error.to_string()),
        },
        Err(error) => json!(error.to_string()),
    }
}

async fn startup(endpoint: &Endpoint) -> Outcome {
    let mut c = options(endpoint)
        .application_name("sqlx shop")
        .options([("work_mem", "6MB"), ("search_path", "pg_catalog,public")])
        .connect()
        .await?;
    let row: (String, String, String) = sqlx::query_as(
        "SELECT current_setting('work_mem'), current_setting('application_name'), current_setting('search_path')",
    )
    .fetch_one(&mut c)
    .await?;
    let version = c.server_version_num();
    c.ping().await?;
    c.close().await?;
    Ok(json!([row, version]))
}

async fn refused_connections(endpoint: &Endpoint) -> Outcome {
    let mut answers = Vec::new();
    for options in [
        options(endpoint).password("wrong"),
        options(endpoint).username("no_such_role"),
        options(endpoint).database("no_such_database"),
        options(endpoint).options([("no_such_setting", "1")]),
    ] {
        // Whoever refuses a connection need not do so in the same line of C.
        answers.push(match options.connect().await {
            Err(Error::Database(error)) => json!([error.code(), error.message()]),
            Err(error) => json!(error.to_string()),
            Ok(_) => json!("was let in"),
        });
    }
    Ok(json!(answers))
}

async fn cached_statements(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)").await?;
    let mut answers = Vec::new();
    for id in [1, 2, 2, 3] {
        let result = sqlx::query("INSERT INTO t VALUES ($1, $2) RETURNING *")
            .bind(id)
            .bind(format!("n{id}"))
            .fetch_one(&mut c)
            .await;
        answers.push(answer(
            result.map(|row: PgRow| json!([row.get::<i32, _>(0), row.get::<String, _>(1)])),
        ));
    }
    let statement = c
        .prepare(sqlx::SqlStr::from_static(
            "SELECT id, name, 1.5::numeric AS n FROM t WHERE id > $1",
        ))
        .await?;
    let columns: Vec<_> = statement
        .columns()
        .iter()
        .map(|column| json!([column.name(), column.type_info().name()]))
        .collect();
    answers.push(json!(columns));
    answers.push(json!(c.cached_statements_size()));
    let star = "SELECT * FROM t WHERE id = 1";
    answers.push(json!(sqlx::query(star).fetch_one(&mut c).await?.len()));
    c.execute("ALTER TABLE t ADD COLUMN extra int").await?;
    answers.push(answer(sqlx::query(star).fetch_one(&mut c).await.map(|row| row.len())));
    c.clear_cached_statements().await?;
    answers.push(answer(sqlx::query(star).fetch_one(&mut c).await.map(|row| row.len())));
    answers.push(answer(
        sqlx::query("SELECT 1 AS one")
            .persistent(false)
            .fetch_one(&mut c)
            .await
            .map(|row| row.len()),
    ));
    let listed: Vec<(String,)> = sqlx::query_as("SELECT statement FROM pg_prepared_statements ORDER BY 1")
        .fetch_all(&mut c)
        .await?;
    answers.push(json!(listed));
    Ok(json!(answers))
}

async fn types(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    c.execute("DROP TYPE IF EXISTS sqlx_mood; CREATE TYPE sqlx_mood AS ENUM ('sad', 'merry')")
        .await?;
    let row = sqlx::query(
        "SELECT $1::bool, $2::int2, $3::int8, $4::float8, $5::text, $6::bytea, $7::int4[], $8::text, 'sad'::sqlx_mood",
    )
    .bind(true)
    .bind(-7_i16)
    .bind(i64::MIN)
    .bind(f64::NEG_INFINITY)
    .bind("żółć 🐘")
    .bind(&b"\0\xff"[..])
    .bind(vec![Some(1), None])
    .bind(None::<String>)
    .fetch_one(&mut c)
    .await?;
    let result = json!([
        row.get::<bool, _>(0),
        row.get::<i16, _>(1),
        row.get::<i64, _>(2),
        row.get::<f64, _>(3).to_string(),
        row.get::<&str, _>(4),
        row.get::<Vec<u8>, _>(5),
        row.get::<Vec<Option<i32>>, _>(6),
        row.get::<Option<&str>, _>(7),
        row.column(8).type_info().name(),
    ]);
    c.execute("DROP TYPE sqlx_mood").await?;
    Ok(result)
}

async fn raw_statements(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    let rows =
        sqlx::raw_sql("CREATE TEMP TABLE t (id int UNIQUE); INSERT INTO t VALUES (1), (2); SELECT * FROM t; SELECT 7")
            .fetch_all(&mut c)
            .await?;
    let failing = sqlx::raw_sql("INSERT INTO t VALUES (3); SELECT 1/0")
        .execute(&mut c)
        .await;
    let left: (i64,) = sqlx::query_as("SELECT count(*) FROM t").fetch_one(&mut c).await?;
    Ok(json!([
        rows.iter().map(|row| row.get::<i32, _>(0)).collect::<Vec<_>>(),
        answer(failing.map(|done| done.rows_affected())),
        left
    ]))
}

async fn streams_left_unread(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    let mut answers = Vec::new();
    for _ in 0..3 {
        let first = {
            let mut rows = sqlx::query("SELECT n, repeat('r', 100) FROM generate_series(1, 20000) n").fetch(&mut c);
            rows.try_next().await?.map(|row| row.get::<i32, _>(0))
        };
        answers.push(json!(first));
    }
    let mut rows = sqlx::query("SELECT 10 / (4 - n) FROM generate_series(1, 9) n").fetch(&mut c);
    while let Some(row) = rows.next().await {
        answers.push(answer(row.map(|row| row.get::<i32, _>(0))));
    }
    drop(rows);
    answers.push(json!(
        sqlx::query("SELECT 7")
            .fetch_optional(&mut c)
            .await?
            .map(|row| row.get::<i32, _>(0))
    ));
    Ok(json!(answers))
}

async fn transactions(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)").await?;
    let mut answers = Vec::new();
    let mut outer = c.begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE").await?;
    outer.execute("INSERT INTO t VALUES (1)").await?;
    let mut inner = outer.begin().await?;
    answers.push(answer(
        inner
            .execute("INSERT INTO t VALUES (1)")
            .await
            .map(|done| done.rows_affected()),
    ));
    inner.rollback().await?;
    outer.execute("INSERT INTO t VALUES (2)").await?;
    outer.commit().await?;
    {
        // Dropped without an end: rolled back with the next use of the connection.
        let mut dropped = c.begin().await?;
        dropped.execute("INSERT INTO t VALUES (3)").await?;
    }
    let left: (Vec<i32>,) = sqlx::query_as("SELECT array_agg(id ORDER BY id) FROM t")
        .fetch_one(&mut c)
        .await?;
    answers.push(json!(left));
    Ok(json!(answers))
}

async fn copy(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)").await?;
    let mut copy = c.copy_in_raw("COPY t FROM STDIN").await?;
    copy.send(&b"1\n2\n"[..]).await?;
    let mut answers = vec![json!(copy.finish().await?)];
    let mut copy = c.copy_in_raw("COPY t FROM STDIN").await?;
    copy.send(&b"x\n"[..]).await?;
    answers.push(answer(copy.finish().await));
    let mut copy = c.copy_in_raw("COPY t FROM STDIN").await?;
    copy.send(&b"7\n"[..]).await?;
    answers.push(answer(
        copy.abort("the client changes its mind").await.map(|()| "aborted"),
    ));
    answers.push(answer(c.copy_in_raw("COPY absent FROM STDIN").await.map(|_| "begun")));
    let out: Vec<_> = c.copy_out_raw("COPY t TO STDOUT").await?.try_collect().await?;
    answers.push(json!(out.concat()));
    Ok(json!(answers))
}

async fn listener(endpoint: &Endpoint) -> Outcome {
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .connect_with(options(endpoint))
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen_all(["here", "Odd name"]).await?;
    sqlx::query("SELECT pg_notify('here', 'one'), pg_notify('Odd name', 'żółć')")
        .execute(&pool)
        .await?;
    let mut heard = Vec::new();
    for _ in 0..2 {
        let notification = listener.recv().await?;
        heard.push(json!([notification.channel(), notification.payload()]));
    }
    listener.unlisten("here").await?;
    Ok(json!(heard))
}

async fn errors_in_full(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY CHECK (id > 0), needed text NOT NULL)")
        .await?;
    c.execute("INSERT INTO t VALUES (1, '')").await?;
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
    ] {
        answers.push(answer(
            sqlx::raw_sql(statement)
                .execute(&mut c)
                .await
                .map(|done| done.rows_affected()),
        ));
        answers.push(answer(
            sqlx::query(statement)
                .execute(&mut c)
                .await
                .map(|done| done.rows_affected()),
        ));
    }
    Ok(json!(answers))
}

async fn large_values(endpoint: &Endpoint) -> Outcome {
    let mut c = connect(endpoint).await?;
    let big: Vec<u8> = (0..8_u32 << 20)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let (back, length): (Vec<u8>, i32) = sqlx::query_as("SELECT $1::bytea, length($1::bytea)")
        .bind(&big)
        .fetch_one(&mut c)
        .await?;
    Ok(json!([back == big, length]))
}

async fn pool(endpoint: &Endpoint) -> Outcome {
    let pool = PgPoolOptions::new()
        .max_connections(6)
        .connect_with(options(endpoint))
        .await?;
    let doubled = futures_util::future::try_join_all((0..100).map(|n| {
        let pool = pool.clone();
        async move {
            sqlx::query_scalar::<_, i32>("SELECT $1 * 2")
                .bind(n)
                .fetch_one(&pool)
                .await
        }
    }))
    .await?;
    pool.close().await;
    Ok(json!(doubled))
}
