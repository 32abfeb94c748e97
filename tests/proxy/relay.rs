//! An open session: every form of the protocol, and how sessions end.

use std::time::Duration;

use pgtandem::control::Side;
use pgtandem::servers::{Binaries, PASSWORD, Server};
use pgtandem::wire::{frontend, put_frame};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use crate::common::{APP, Options, Proxy, Raw, direct, extended};

/// One sequence of frames, sent to the proxy and to the server, must be answered alike.
async fn alike(proxy: &Proxy, steps: &[&[u8]]) -> String {
    let mut kinds = Vec::new();
    let ports = [proxy.address.port(), proxy.servers.legacy.port];
    for port in ports {
        let mut raw = Raw::connect(([127, 0, 0, 1], port).into()).await;
        raw.login(APP, &proxy.database, PASSWORD, &[]).await;
        let mut answers = Vec::new();
        for step in steps {
            raw.send(step).await;
            answers.extend(raw.answer().await);
        }
        kinds.push(answers);
    }
    let direct = kinds.pop().unwrap();
    let proxied = kinds.pop().unwrap();
    assert_eq!(proxied, direct);
    proxied.iter().map(|frame| char::from(frame.kind)).collect()
}

fn query(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    frontend::put_query(&mut out, text.as_bytes());
    out
}

fn copy_data(data: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_frame(&mut out, b'd', |out| out.extend_from_slice(data.as_bytes()));
    out
}

const COPY_DONE: &[u8] = b"c\0\0\0\x04";
const SYNC: &[u8] = frontend::SYNC;

#[tokio::test]
async fn every_form_of_the_protocol_is_answered_as_by_the_server() {
    let proxy = Proxy::start("forms", Options::default()).await;
    let mut setup = proxy.client().await;
    setup.query("create table t (a int primary key, b text)").await;
    let copy_fail = {
        let mut out = Vec::new();
        put_frame(&mut out, b'f', |out| out.extend_from_slice(b"no\0"));
        out
    };
    let suspended = {
        let mut out = Vec::new();
        frontend::put_parse(&mut out, b"s", b"select generate_series(1, 5)", &[]);
        frontend::put_bind(&mut out, b"p", b"s", &[]);
        for _ in 0..3 {
            put_frame(&mut out, b'E', |out| out.extend_from_slice(b"p\0\0\0\0\x02"));
        }
        frontend::put_close_portal(&mut out, b"p");
        frontend::put_close_statement(&mut out, b"s");
        out
    };
    let function_call = {
        let mut out = Vec::new();
        // pg_catalog.int4pl(2, 3), binary.
        put_frame(&mut out, b'F', |out| {
            out.extend_from_slice(b"\0\0\0\xb1\0\x01\0\x01\0\x02\0\0\0\x04\0\0\0\x02\0\0\0\x04\0\0\0\x03\0\x01");
        });
        out
    };
    let copy_in = "copy t from stdin";
    let rows = "1\tone\n2\ttwo\n";
    for (steps, kinds) in [
        (vec![query("select 1; select 2; select 3")], "TDCTDCTDCZ"),
        (vec![query("")], "IZ"),
        (vec![query("select 1; selec 2")], "EZ"),
        (
            vec![
                query("begin"),
                query("select 1/0"),
                query("select 1"),
                query("rollback"),
            ],
            "CZEZEZCZ",
        ),
        (vec![[&extended("", "select 1")[..], SYNC].concat()], "12TDCZ"),
        // Several Syncs in flight, an error in the middle.
        (
            vec![
                [
                    &extended("", "select 1")[..],
                    SYNC,
                    &extended("", "select 1/0"),
                    &extended("", "select 2"),
                    SYNC,
                    &extended("", "select 3"),
                    SYNC,
                ]
                .concat(),
                Vec::new(),
                Vec::new(),
            ],
            "12TDCZ1EZ12TDCZ",
        ),
        (vec![[&suspended[..], SYNC].concat()], "12DDsDDsDC33Z"),
        (vec![function_call], "VZ"),
        // A truncated Bind, a Bind of nothing, a Close of nothing.
        (
            vec![
                b"B\0\0\0\x06\0\0S\0\0\0\x04".to_vec(),
                [&b"C\0\0\0\x07Sx\0"[..], SYNC].concat(),
            ],
            "EZ3Z",
        ),
        (
            vec![
                query("begin"),
                [&query(copy_in)[..], &copy_data(rows), COPY_DONE].concat(),
                query("rollback"),
            ],
            "CZGCZCZ",
        ),
        (
            vec![[&query(copy_in)[..], &copy_data("broken\n"), COPY_DONE].concat()],
            "GEZ",
        ),
        (vec![[&query(copy_in)[..], &copy_fail].concat()], "GEZ"),
        (
            vec![
                [&query(copy_in)[..], &copy_data("x\n"), COPY_DONE, &query("select 1")].concat(),
                Vec::new(),
            ],
            "GEZTDCZ",
        ),
        (vec![query("copy (values (1), (2)) to stdout")], "HddcCZ"),
        (
            vec![query("copy (select 1/(2-g) from generate_series(1,3) g) to stdout")],
            "HdEZ",
        ),
        // COPY by the extended protocol, as libpq sends it: Sync with the Execute, and again.
        (
            vec![
                [&extended("", copy_in)[..], SYNC, &copy_data(rows), COPY_DONE, SYNC].concat(),
                query("delete from t"),
            ],
            "12nGCZCZ",
        ),
        (
            vec![
                [
                    &extended("", copy_in)[..],
                    SYNC,
                    &copy_data("broken\n"),
                    COPY_DONE,
                    SYNC,
                ]
                .concat(),
            ],
            "12nGEZ",
        ),
        (
            vec![[&extended("", "copy (values (1)) to stdout")[..], SYNC].concat()],
            "12nHdcCZ",
        ),
    ] {
        let steps: Vec<&[u8]> = steps.iter().map(|step| &step[..]).collect();
        assert_eq!(alike(&proxy, &steps).await, kinds);
    }
    assert_eq!(setup.value("select count(*) from t").await, "0");
}

#[tokio::test]
async fn flush_brings_answers_without_a_sync() {
    let proxy = Proxy::start("flushes", Options::default()).await;
    let mut raw = proxy.client().await;
    raw.send(&[&extended("", "select 1")[..], frontend::FLUSH].concat())
        .await;
    let mut kinds = String::new();
    while !kinds.ends_with('C') {
        kinds.push(char::from(raw.frame().await.kind));
    }
    assert_eq!(kinds, "12TDC");
    raw.send(SYNC).await;
    assert_eq!(raw.kinds().await, "Z");
}

#[tokio::test]
async fn bytes_in_other_encodings_pass_as_they_are() {
    let proxy = Proxy::start("encodings", Options::default()).await;
    let mut raw = Raw::connect(proxy.address).await;
    raw.login(APP, &proxy.database, PASSWORD, &[("client_encoding", "LATIN1")])
        .await;
    let mut out = Vec::new();
    frontend::put_query(&mut out, b"select 'caf\xe9', length('\xe9')");
    raw.send(&out).await;
    let frames = raw.answer().await;
    assert!(frames[1].body.windows(4).any(|bytes| bytes == b"caf\xe9"));
    assert_eq!(frames[1].columns()[1], "1");
}

#[tokio::test]
async fn notifications_and_parameters_come_at_any_moment() {
    let proxy = Proxy::start("notifies", Options::default()).await;
    let mut raw = proxy.client().await;
    raw.query("listen x").await;
    proxy.client().await.query("notify x, 'hello'").await;
    let frame = raw.frame().await;
    assert_eq!(frame.kind, b'A');
    assert!(frame.body.ends_with(b"x\0hello\0"));
    raw.query("set timezone = 'Asia/Tokyo'").await;
    assert_eq!(raw.parameters["TimeZone"], "Asia/Tokyo");
}

#[tokio::test]
async fn a_pipeline_larger_than_all_buffers_does_not_lock_up() {
    let proxy = Proxy::start("pipelines", Options::default()).await;
    let raw = proxy.client().await;
    let one = [&extended("", "select repeat('x', 20000)")[..], SYNC].concat();
    let (mut read, mut write) = raw.stream.into_split();
    let writer = tokio::spawn(async move {
        // Only when all is written does this client begin to read; it sends more than the kernel's
        // buffers hold, as libpq's pipelines do, which read as soon as they cannot write.
        for _ in 0..2000 {
            write.write_all(&one).await.unwrap();
        }
        write
    });
    let mut total = 0;
    let mut buffer = vec![0; 1 << 16];
    while total < 2000 * 20_000 {
        total += tokio::io::AsyncReadExt::read(&mut read, &mut buffer).await.unwrap();
    }
    writer.await.unwrap();
}

/// This process's memory now, in kilobytes.
fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_row_of_a_gigabyte_passes_both_ways_with_bounded_memory() {
    // As much as a value can be: Postgres allocates less than 1 GiB at once.
    const MEGABYTES: usize = 1000;
    let proxy = Proxy::start("big_rows", Options::default()).await;
    let mut raw = proxy.client().await;
    raw.query("create table big (x bytea)").await;
    let before = resident_kb();
    let mut most = before;
    // Up: a Bind with one value.
    let mut head = Vec::new();
    frontend::put_parse(&mut head, b"", b"insert into big values ($1)", &[]);
    head.push(b'B');
    let values = MEGABYTES << 20;
    let length = 4 + 2 + 2 + 2 + 2 + 4 + values + 2;
    head.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    head.extend_from_slice(b"\0\0\0\x01\0\x01\0\x01");
    head.extend_from_slice(&u32::try_from(values).unwrap().to_be_bytes());
    raw.send(&head).await;
    let megabyte = vec![b'a'; 1 << 20];
    for _ in 0..MEGABYTES {
        raw.send(&megabyte).await;
        most = most.max(resident_kb());
    }
    let mut tail = vec![0, 0];
    frontend::put_execute(&mut tail, b"");
    tail.extend_from_slice(SYNC);
    raw.send(&tail).await;
    assert_eq!(raw.kinds().await, "12CZ");
    // Down, to a client that takes its time at first.
    raw.send(&query("set bytea_output = 'escape'; select x from big")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut buffer = vec![0; 1 << 16];
    let (mut total, mut looked) = (0, 0);
    while total < MEGABYTES << 20 {
        total += tokio::io::AsyncReadExt::read(&mut raw.stream, &mut buffer)
            .await
            .unwrap();
        if total >> 20 > looked {
            looked = total >> 20;
            most = most.max(resident_kb());
        }
    }
    let grown = most - before;
    // Other tests of this process have their share in it.
    assert!(grown < 128 * 1024, "{grown} kB more for a row of {MEGABYTES} MB");
}

#[tokio::test]
async fn what_is_not_a_message_ends_the_session() {
    let proxy = Proxy::start("violations", Options::default()).await;
    for bytes in [
        &b"Q\0\0\0\x03"[..],
        b"Q\x7f\xff\xff\xff",
        b"S\0\0\x27\x11",
        b"p\0\0\0\x04",
        b"\0\0\0\0\0",
        b"~~~~~~~~",
    ] {
        let mut raw = proxy.client().await;
        raw.send(bytes).await;
        assert_eq!(raw.fatal().await.sqlstate(), "08P01", "{bytes:?}");
    }
    // Many at once, and bytes at random.
    for seed in 0..50_u64 {
        let mut raw = proxy.client().await;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .take(300)
        .collect();
        raw.send(&bytes).await;
        raw.stream.shutdown().await.ok();
        while raw.next().await.is_some() {}
    }
    assert_eq!(proxy.client().await.value("select 1").await, "1");
}

#[tokio::test]
async fn a_session_ends_on_both_sides() {
    let proxy = Proxy::start("ends", Options::default()).await;
    let own = direct(Side::Legacy, "postgres", "postgres").await;
    let backends = async || {
        own.query_one(
            "select count(*) from pg_stat_activity where datname = $1 and usename = $2",
            &[&proxy.database, &APP],
        )
        .await
        .unwrap()
        .get::<_, i64>(0)
    };
    let until_none = async || {
        while backends().await > 0 || !proxy.context.registry.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // Terminate; just gone; gone in a transaction; gone in the middle of a frame.
    for last in [&b"X\0\0\0\x04"[..], b"", &query("begin"), b"Q\0\0\0\x20sel"] {
        let mut raw = proxy.client().await;
        assert_eq!(backends().await, 1);
        raw.send(last).await;
        drop(raw);
        until_none().await;
    }
    // A client that only closes its sending half still gets its answer.
    let mut raw = proxy.client().await;
    raw.send(&query("select 7")).await;
    raw.stream.shutdown().await.unwrap();
    assert_eq!(raw.kinds().await, "TDCZ");
    assert_eq!(raw.next().await, None);
    until_none().await;
    // The server's last words reach the client, and then the end.
    let mut raw = proxy.client().await;
    own.execute("select pg_terminate_backend($1)", &[&raw.pid])
        .await
        .unwrap();
    assert_eq!(raw.fatal().await.sqlstate(), "57P01");
    until_none().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_or_goes_is_named() {
    let mut server = Server::start(&Binaries::legacy().unwrap(), &[]).unwrap();
    let mut proxy = Proxy::start("goes", Options::default()).await;
    let mut settings = crate::common::settings("goes", &Options::default());
    let entry = pgtandem::config::DatabaseConfig {
        legacy: pgtandem::config::Target::parse(Side::Legacy, &server.url("postgres", "postgres")).unwrap(),
        new: pgtandem::config::Target::parse(Side::New, &server.url("postgres", "postgres")).unwrap(),
        transform: Default::default(),
    };
    settings.databases = pgtandem::routing::Databases::new(&[("goes".to_owned(), entry)].into());
    settings.users = pgtandem::session::Users::new(&pgtandem::config::Auth {
        method: pgtandem::config::AuthMethod::Scram,
        users: [(
            "postgres".to_owned(),
            pgtandem::config::Credential::Password(pgtandem::config::Secret::new(PASSWORD)),
        )]
        .into(),
    });
    proxy.context.reload(settings);
    let mut raw = proxy.client_as("postgres").await;
    let running = tokio::spawn(async move {
        raw.send(&query("select pg_sleep(60)")).await;
        raw.fatal().await
    });
    while server.pid().is_none() || proxy.context.registry.sessions()[0].state != pgtandem::session::State::Active {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::task::block_in_place(|| server.stop("immediate").unwrap());
    let error = running.await.unwrap();
    assert!(
        ["57P02", "08006"].contains(&error.sqlstate().as_str()),
        "{}",
        error.message()
    );
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(
        pgtandem::wire::startup::Version::V3_0,
        &[("user", "postgres"), ("database", "goes")],
    )
    .await;
    raw.scram(PASSWORD).await;
    let error = raw.fatal().await;
    assert_eq!(error.sqlstate(), "08006");
    let named = format!("legacy (127.0.0.1:{}/postgres)", server.port);
    assert!(error.message().contains(&named), "{}", error.message());
    proxy.database.clear();
}

#[tokio::test]
async fn a_drain_lets_transactions_finish() {
    let proxy = Proxy::start("drains", Options::default()).await;
    let mut idle = proxy.client().await;
    let mut busy = proxy.client().await;
    let mut endless = proxy.client().await;
    busy.query("begin").await;
    endless.query("begin").await;
    let drain = tokio::spawn(proxy.listener.drain(Instant::now() + Duration::from_secs(2)));
    assert_eq!(idle.fatal().await.sqlstate(), "57P01");
    assert_eq!(busy.value("select 1").await, "1");
    assert_eq!(busy.query("commit").await.len(), 2);
    assert_eq!(busy.fatal().await.sqlstate(), "57P01");
    assert_eq!(endless.fatal().await.sqlstate(), "57P01");
    assert_eq!(drain.await.unwrap(), 1);
    assert!(tokio::net::TcpStream::connect(proxy.address).await.is_err());
}
