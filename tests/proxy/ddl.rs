//! DDL in mirroring phases: the hook runs in the statement's own transaction, and the client
//! cannot tell.

use std::sync::Arc;

use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;
use pgtandem::session::hooks::{DdlHooks, Hooks};
use pgtandem::wire::{backend, frontend, put_frame};

use crate::common::{APP, Frame, Options, Proxy, Raw, direct, extended};

/// A stand-in for the journal's hook: it writes down the statement, and refuses some.
const STAND_IN: &str = "
create table recorded (id serial, statement text, in_transaction bool);
grant all on recorded, recorded_id_seq to public;
create function record(statement text, outside bool) returns void language plpgsql as $$
begin
  if statement like '%refused%' then
    raise exception 'this cannot be mirrored' using errcode = '0A000';
  end if;
  insert into recorded (statement, in_transaction) values (statement, not outside);
end $$";

async fn start(database: &str, phase: Phase) -> (Proxy, pgtandem::upstream::control::Control) {
    let hooks = Hooks {
        statements: Arc::default(),
        ddl: Some(DdlHooks {
            before: Some("select $1::jsonb".into()),
            in_transaction: "select public.record($1, false)".into(),
            outside: "select public.record($1, true)".into(),
        }),
        shadow: None,
        ..Hooks::default()
    };
    let options = Options {
        phase,
        hooks,
        ..Options::default()
    };
    let proxy = Proxy::start(database, options).await;
    let own = direct(Side::Legacy, APP, database).await;
    own.batch_execute(STAND_IN).await.unwrap();
    (proxy, own)
}

async fn recorded(own: &tokio_postgres::Client) -> Vec<(String, bool)> {
    let rows = own
        .query("select statement, in_transaction from recorded order by id", &[])
        .await
        .unwrap();
    own.batch_execute("truncate recorded").await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn kinds(frames: &[Frame]) -> String {
    frames.iter().map(|frame| char::from(frame.kind)).collect()
}

#[tokio::test]
async fn a_query_with_ddl_looks_like_any_other() {
    let (proxy, own) = start("ddl_query", Phase::DualWrite).await;
    let mut raw = proxy.client().await;
    for (text, answer, expected) in [
        ("create table a (x int)", "CZ", &["create table a (x int)"][..]),
        (
            "  /* hi */ create table b (x int) ; -- bye",
            "CZ",
            &["create table b (x int)"],
        ),
        (
            "insert into a values (1), (2); create table c as select * from a; select * from c; ; drop table b",
            "CCTDDCCZ",
            &["create table c as select * from a", "drop table b"],
        ),
        // Temporary tables stay where they are; what only looks like DDL is none.
        ("create temp table d (x int); drop table d", "CCZ", &["drop table d"]),
        ("select 'create table'; select 2", "TDCTDCZ", &[]),
        // Errors: the whole is one transaction.
        ("create table e (x int); select 1/0; create table f ()", "CEZ", &[]),
        ("create table e (x int); create table a (x int)", "CEZ", &[]),
        ("create table refused (x int); select 1", "EZ", &[]),
        ("create table e (x int) select", "EZ", &[]),
        // Explicit transactions.
        ("begin", "CZ", &[]),
        ("create table g (x int)", "CZ", &[]),
        (
            "savepoint s; drop table g; rollback to s; create table h ()",
            "CCCCZ",
            &[],
        ),
        ("commit", "CZ", &["create table g (x int)", "create table h ()"]),
        (
            "begin; create table i (); commit; create table j (); rollback",
            "CCCCCZ",
            &["create table i ()"],
        ),
        // COPY in the middle of it.
        (
            "create table k (x int); copy (select 1) to stdout; select 1",
            "CHdcCTDCZ",
            &["create table k (x int)"],
        ),
    ] {
        let frames = raw.query(text).await;
        assert_eq!(kinds(&frames), answer, "{text}: {}", frames[0].message());
        let found: Vec<String> = match frames.last().unwrap().body[0] {
            b'I' => recorded(&own).await.into_iter().map(|(text, _)| text).collect(),
            _ => Vec::new(),
        };
        assert_eq!(found, expected, "{text}");
    }
    // The session is as it was: no statement of the proxy's is left.
    assert_eq!(raw.value("select count(*) from pg_prepared_statements").await, "0");
    assert_eq!(raw.error("execute pgtandem_ddl").await, "26000");
}

#[tokio::test]
async fn answers_are_those_of_the_server_alone() {
    let (proxy, _own) = start("ddl_alike", Phase::DualWrite).await;
    let mut direct = Raw::connect(([127, 0, 0, 1], proxy.servers.legacy.port).into()).await;
    direct
        .login(APP, &proxy.database, pgtandem::servers::PASSWORD, &[])
        .await;
    let mut raw = proxy.client().await;
    direct.query("create schema alike; set search_path = alike").await;
    for text in [
        "create table a (x int); insert into a values (1); select * from a",
        "select 'é'; create table b (y no_such_type)",
        "create table c (x int);; drop table nothing; select 1",
        "create table if not exists a (x int); explain (costs off) select * from a; show work_mem",
        "create index on a (x); fetch 1 from nowhere",
        "comment on table a is 'x'; values (1), (2)",
        "begin; create table d (); declare c cursor for select 1; fetch all from c; rollback",
        "create table e (x int) wit",
        "drop table;",
        " /* é */ alter table rename ;; -- x",
        "drop index /* ; */ ; -- é",
        "create table g () /* never closed",
        " /* é */ create table h as select current_query() as q ; -- x",
        "select q from h",
    ] {
        let (proxied, alone) = (raw.query(text).await, direct.query(text).await);
        let comparable = |frames: Vec<Frame>| {
            let comparable = |frame: Frame| match frame.kind {
                // A table's own OID is in there, which differs between databases.
                b'T' => (frame.kind, b"columns".to_vec()),
                b'E' => {
                    let fields = backend::error_fields(&frame.body);
                    let fields = fields.filter(|(code, _)| b"SVCMDHP".contains(code));
                    (
                        frame.kind,
                        fields.flat_map(|(code, value)| [&[code], value].concat()).collect(),
                    )
                }
                _ => (frame.kind, frame.body),
            };
            frames.into_iter().map(comparable).collect::<Vec<_>>()
        };
        let text_of = |frames: Vec<(u8, Vec<u8>)>| {
            let line = |(kind, body): (u8, Vec<u8>)| format!("{} {}", char::from(kind), String::from_utf8_lossy(&body));
            frames.into_iter().map(line).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(text_of(comparable(proxied)), text_of(comparable(alone)), "{text}");
    }
    direct.query("drop schema alike cascade").await;
    // Where it differs: the server would find this before it ran anything. Nothing remains of it
    // either way, unless there is a COMMIT in between.
    assert_eq!(
        kinds(&raw.query("create table late (); create table e (x int) wit").await),
        "CEZ"
    );
    assert_eq!(raw.error("select * from late").await, "42P01");
}

#[tokio::test]
async fn copy_from_the_client_inside_a_query_with_ddl() {
    let (proxy, own) = start("ddl_copy", Phase::DualWrite).await;
    let mut raw = proxy.client().await;
    let mut out = Vec::new();
    let text =
        "create table a (x int); copy a from stdin; create table b (); copy a from stdin; select count(*) from a";
    frontend::put_query(&mut out, text.as_bytes());
    raw.send(&out).await;
    let mut seen = String::new();
    for round in 0..2 {
        loop {
            let frame = raw.frame().await;
            seen.push(char::from(frame.kind));
            if frame.kind == b'G' {
                break;
            }
        }
        let mut data = Vec::new();
        put_frame(&mut data, b'd', |out| {
            out.extend_from_slice(format!("{round}\n").as_bytes());
        });
        data.extend_from_slice(b"c\0\0\0\x04");
        if round == 1 {
            // The next request is on its way already.
            frontend::put_query(&mut data, b"select 5");
        }
        raw.send(&data).await;
    }
    seen.push_str(&raw.kinds().await);
    assert_eq!(seen, "CGCCGCTDCZ");
    assert_eq!(raw.kinds().await, "TDCZ");
    assert_eq!(recorded(&own).await.len(), 2);
}

#[tokio::test]
async fn ddl_by_the_extended_protocol() {
    let (proxy, own) = start("ddl_extended", Phase::DualWrite).await;
    let mut raw = proxy.client().await;
    let sync = frontend::SYNC;
    // Two of them and a read in one batch.
    let batch = [
        &extended("", "create table a (x int)")[..],
        &extended("", "select 1"),
        &extended("named", "create table b (x int)"),
        sync,
    ]
    .concat();
    raw.send(&batch).await;
    assert_eq!(raw.kinds().await, "12nC12TDC12nCZ");
    assert_eq!(recorded(&own).await.len(), 2);
    // The hook's refusal in place of the CommandComplete, and nothing remains.
    raw.send(&[&extended("", "create table refused (x int)")[..], sync].concat())
        .await;
    let frames = raw.answer().await;
    assert_eq!(kinds(&frames), "12nEZ");
    assert_eq!(frames[3].sqlstate(), "0A000");
    assert_eq!(raw.error("select * from refused").await, "42P01");
    // By Flush, with the Sync only after the answer.
    raw.send(&[&extended("", "create table c (x int)")[..], frontend::FLUSH].concat())
        .await;
    let mut seen = String::new();
    while !seen.ends_with('C') {
        seen.push(char::from(raw.frame().await.kind));
    }
    raw.send(sync).await;
    assert_eq!((seen + &raw.kinds().await).as_str(), "12nCZ");
    // An error in the statement itself, then the same prepared statement again and again.
    raw.query("drop table b").await;
    raw.query("begin").await;
    let again = {
        let mut out = Vec::new();
        frontend::put_bind(&mut out, b"p", b"named", &[]);
        frontend::put_execute(&mut out, b"p");
        out
    };
    raw.send(&[&again[..], sync].concat()).await;
    assert_eq!(raw.kinds().await, "2CZ");
    raw.query("rollback").await;
    raw.send(&[&again[..], sync, &again, sync].concat()).await;
    assert_eq!(raw.kinds().await, "2CZ");
    assert_eq!(raw.kinds().await, "2EZ");
    let statements: Vec<String> = recorded(&own).await.into_iter().map(|(text, _)| text).collect();
    assert_eq!(
        statements,
        ["create table c (x int)", "drop table b", "create table b (x int)"]
    );
    assert_eq!(raw.value("select count(*) from pg_prepared_statements").await, "1");
}

#[tokio::test]
async fn ddl_outside_transactions() {
    let (proxy, own) = start("ddl_outside", Phase::DualWrite).await;
    let mut raw = proxy.client().await;
    raw.query("create table a (x int)").await;
    recorded(&own).await;
    let create = |name: &str| format!("create index concurrently {name} on a (x)");
    assert_eq!(kinds(&raw.query(&create("i")).await), "CZ");
    assert_eq!(recorded(&own).await, [(create("i"), false)]);
    assert_eq!(raw.error(&create("i")).await, "42P07");
    // Refused by the hook: it has been done, but the client hears that it is not mirrored.
    assert_eq!(kinds(&raw.query(&create("refused")).await), "EZ");
    raw.query("begin").await;
    assert_eq!(raw.error(&create("k")).await, "25001");
    raw.query("rollback").await;
    // Extended, with the next batch on its way, and by Flush.
    let sync = frontend::SYNC;
    raw.send(&[&extended("", &create("l"))[..], sync, &extended("", "select 1"), sync].concat())
        .await;
    let frames = raw.answer().await;
    assert_eq!(kinds(&frames), "12nCZ", "{}", frames[3].message());
    assert_eq!(raw.kinds().await, "12TDCZ");
    raw.send(&[&extended("", &create("m"))[..], frontend::FLUSH].concat())
        .await;
    let mut seen = String::new();
    while !seen.ends_with('C') {
        seen.push(char::from(raw.frame().await.kind));
    }
    raw.send(sync).await;
    assert_eq!(raw.kinds().await, "Z");
    assert_eq!(recorded(&own).await, [(create("l"), false), (create("m"), false)]);
    // Behind other queries of a pipeline.
    let mut out = Vec::new();
    for text in ["select 1", &create("n"), "select 2"] {
        frontend::put_query(&mut out, text.as_bytes());
    }
    raw.send(&out).await;
    for expected in ["TDCZ", "CZ", "TDCZ"] {
        assert_eq!(raw.kinds().await, expected);
    }
    assert_eq!(recorded(&own).await.len(), 1);
}

#[tokio::test]
async fn nothing_is_added_where_nothing_is_mirrored() {
    let (proxy, own) = start("ddl_initial", Phase::Initial).await;
    let mut raw = proxy.client().await;
    raw.query("create table a (x int); drop table a").await;
    raw.send(&[&extended("early", "create table b (x int)")[..], frontend::SYNC].concat())
        .await;
    raw.answer().await;
    assert_eq!(recorded(&own).await, []);
    // A statement prepared before mirroring began is known when it has.
    raw.query("drop table b").await;
    proxy.set(Phase::DualWrite, Side::Legacy);
    let mut out = Vec::new();
    frontend::put_bind(&mut out, b"", b"early", &[]);
    frontend::put_execute(&mut out, b"");
    out.extend_from_slice(frontend::SYNC);
    raw.send(&out).await;
    assert_eq!(raw.kinds().await, "2CZ");
    assert_eq!(recorded(&own).await.len(), 1);
}

/// What is said around DDL of what the proxy does there is not for the client, however much it
/// wants to hear; a warning is.
#[tokio::test]
async fn notices_are_those_of_the_statement() {
    let (proxy, own) = start("ddl_notices", Phase::DualWrite).await;
    own.batch_execute(
        "create or replace function record(statement text, outside bool) returns void language plpgsql as $$
         begin
           raise debug 'a detail'; raise notice 'on the way';
           if statement like '%warned%' then raise warning 'not mirrored'; end if;
         end $$",
    )
    .await
    .unwrap();
    // As the journal's do where its role may.
    let superuser = direct(Side::Legacy, SUPERUSER, "ddl_notices").await;
    superuser
        .batch_execute(
            "create function watch() returns event_trigger language plpgsql as 'begin end';
             create event trigger watch on ddl_command_end execute function watch()",
        )
        .await
        .unwrap();
    let mut raw = proxy.client().await;
    raw.query("set client_min_messages = debug1").await;
    let mut sent = Vec::new();
    frontend::put_query(
        &mut sent,
        b"create table a (id serial); create table if not exists a (x int)",
    );
    assert_eq!(
        raw.notices(&sent).await,
        [
            "CREATE TABLE will create implicit sequence \"a_id_seq\" for serial column \"a.id\"",
            "relation \"a\" already exists, skipping",
        ]
    );
    let one_by_one = [&extended("", "create table warned (x int)")[..], frontend::SYNC].concat();
    assert_eq!(raw.notices(&one_by_one).await, ["not mirrored"]);
}

#[tokio::test]
async fn a_driver_notices_nothing() {
    let (proxy, own) = start("ddl_driver", Phase::DualWrite).await;
    let mut client = proxy.tokio_postgres().await;
    client
        .batch_execute("create table a (id int primary key); create index on a (id); insert into a values (1)")
        .await
        .unwrap();
    client.execute("alter table a add column b text", &[]).await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction.execute("create table c ()", &[]).await.unwrap();
    transaction.rollback().await.unwrap();
    let error = client.execute("create table refused ()", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "0A000");
    assert_eq!(recorded(&own).await.len(), 3);
}
