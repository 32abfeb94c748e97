//! Holding, draining, and moving sessions from 15 to 18 and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pgtandem::control::{Phase, Side};
use pgtandem::servers::PASSWORD;
use pgtandem::session::State;
use pgtandem::wire::frontend;
use tokio::time::Instant;

use crate::common::{APP, Options, Proxy, Raw, UNLISTED, cancel, direct, extended};
use crate::startup::until_active;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Prepare, hold, drain, tell, release: what a switchover does, without its databases.
async fn flip(proxy: &Proxy, to: Side) -> Vec<String> {
    prepare(proxy, to).await;
    turn(proxy, to).await
}

async fn prepare(proxy: &Proxy, to: Side) {
    let prepared = proxy.context.registry.prepare(to).await;
    assert!(prepared.failed.is_empty(), "{prepared:?}");
}

async fn turn(proxy: &Proxy, to: Side) -> Vec<String> {
    let registry = &proxy.context.registry;
    let hold = registry.hold();
    let stay = registry.make_ready(&hold, to);
    registry.drained(&hold, soon()).await.unwrap();
    let stay = stay.await;
    proxy.set(
        match to {
            Side::Legacy => Phase::DualWrite,
            Side::New => Phase::Switchover,
        },
        to,
    );
    drop(hold);
    registry.settle().await;
    stay.into_iter().map(|session| session.reason).collect()
}

#[tokio::test]
async fn a_session_takes_everything_along() {
    let proxy = Proxy::start("takes_along", Options::default()).await;
    for side in [Side::Legacy, Side::New] {
        let own = direct(side, APP, "takes_along").await;
        // The enum's OID differs between the sides.
        let filler = if side == Side::New {
            "create type filler as enum ();"
        } else {
            ""
        };
        own.batch_execute(&format!(
            "{filler} create schema other; create type other.mood as enum ('glad', 'sad'); \
             create table other.moods (m other.mood, n int); insert into other.moods values ('glad', 1), ('sad', 2)"
        ))
        .await
        .unwrap();
        let own = direct(side, "postgres", "postgres").await;
        own.batch_execute(&format!(
            "grant {UNLISTED} to {APP}; grant pg_read_all_data to {UNLISTED}"
        ))
        .await
        .unwrap();
    }
    let mut raw = Raw::connect(proxy.address).await;
    raw.login(APP, &proxy.database, PASSWORD, &[("options", "-c work_mem=7MB")])
        .await;
    for text in [
        "set search_path = other, public",
        "set statement_timeout = '37s'",
        "set app.tenant = 'a''b,\"c\"'",
        "select set_config('app.other', 'x', false)",
        "set datestyle = 'SQL, DMY'",
        "set client_encoding = 'LATIN1'",
        "prepare by_sql (mood) as select n from moods where m = $1",
        "listen \"Some Channel\"",
        "begin; set local app.gone = '1'; commit",
        &format!("set role {UNLISTED}"),
    ] {
        raw.query(text).await;
    }
    let mut out = Vec::new();
    frontend::put_parse(
        &mut out,
        b"named",
        b"select n, 'caf\xe9' from moods where m = $1 and n > $2",
        &[],
    );
    frontend::put_parse(&mut out, b"", b"select $1 || '!'", &25_u32.to_be_bytes());
    out.extend_from_slice(frontend::SYNC);
    raw.send(&out).await;
    assert_eq!(raw.kinds().await, "11Z");
    let old_pid = raw.pid;

    assert_eq!(flip(&proxy, Side::New).await, [""; 0]);

    // The unnamed statement first: a Query would drop it.
    let mut out = Vec::new();
    frontend::put_bind(&mut out, b"", b"", &[Some(b"moved")]);
    frontend::put_execute(&mut out, b"");
    frontend::put_bind(&mut out, b"", b"named", &[Some(b"sad"), Some(b"0")]);
    frontend::put_execute(&mut out, b"");
    out.extend_from_slice(frontend::SYNC);
    raw.send(&out).await;
    let frames = raw.answer().await;
    assert_eq!(frames[1].columns(), ["moved!"]);
    assert!(frames[4].body.ends_with(b"caf\xe9"), "{frames:?}");
    // What changed was told before.
    assert!(raw.parameters["server_version"].starts_with("18"));
    assert_eq!(raw.value("show server_version_num").await[..2], *"18");
    for (text, expected) in [
        ("show search_path", "other, public"),
        ("show statement_timeout", "37s"),
        ("show work_mem", "7MB"),
        ("show app.tenant", "a'b,\"c\""),
        ("show app.other", "x"),
        ("show datestyle", "SQL, DMY"),
        ("show client_encoding", "LATIN1"),
        (
            "select current_setting('app.gone', true) is null or current_setting('app.gone', true) = ''",
            "t",
        ),
        ("select current_user", UNLISTED),
        ("select session_user", APP),
        ("execute by_sql('sad')", "2"),
        ("select pg_listening_channels()", "Some Channel"),
        ("select count(*) from pg_prepared_statements", "2"),
    ] {
        assert_eq!(raw.value(text).await, expected, "{text}");
    }
    // RESET goes back to what the client began with.
    raw.query("reset role; reset all; deallocate all").await;
    assert_eq!(raw.value("show work_mem").await, "7MB");
    // Cancelling by the first key reaches the new server.
    let (pid, key, address) = (raw.pid, raw.key.clone(), proxy.address);
    assert_eq!(pid, old_pid);
    let query = tokio::spawn(async move { (raw.error("select pg_sleep(60)").await, raw) });
    until_active(&proxy, 1).await;
    cancel(address, pid, &key).await;
    let (sqlstate, mut raw) = query.await.unwrap();
    assert_eq!(sqlstate, "57014");
    // And back.
    assert_eq!(flip(&proxy, Side::Legacy).await, [""; 0]);
    assert_eq!(raw.value("show server_version_num").await[..2], *"15");
    assert!(raw.parameters["server_version"].starts_with("15"));
    // Nothing is left open on the side that was left.
    let own = direct(Side::New, "postgres", "postgres").await;
    loop {
        let left: i64 = own
            .query_one(
                "select count(*) from pg_stat_activity where datname = $1 and usename = $2",
                &[&proxy.database, &APP],
            )
            .await
            .unwrap()
            .get(0);
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a session does between preparing and the hold is found by its footprint, also where no text
/// that passes tells of it.
#[tokio::test]
async fn what_is_changed_after_preparing_goes_along() {
    let proxy = Proxy::start("footprints", Options::default()).await;
    for side in [Side::Legacy, Side::New] {
        let own = direct(side, APP, "footprints").await;
        own.batch_execute(
            "create function hidden(text) returns void language plpgsql as 'begin execute reverse($1); end'",
        )
        .await
        .unwrap();
    }
    let hidden = |text: &str| {
        let text: String = text.replace('\'', "''").chars().rev().collect();
        format!("select hidden('{text}')")
    };
    let mut sessions = Vec::new();
    for (text, question, answer) in [
        (hidden("set work_mem = '9MB'"), "show work_mem", "9MB"),
        (hidden("reset statement_timeout"), "show statement_timeout", "0"),
        // To the value that it has on this side by itself.
        (
            "set lock_timeout = 0".into(),
            "select source from pg_settings where name = 'lock_timeout'",
            "session",
        ),
        (
            hidden("listen hidden"),
            "select string_agg(c, ',') from pg_listening_channels() c",
            "hidden",
        ),
        (hidden("prepare hidden as select 5"), "execute hidden", "5"),
        (
            hidden("deallocate known"),
            "select count(*) from pg_prepared_statements",
            "0",
        ),
        ("discard all".into(), "show statement_timeout", "0"),
        (
            "insert into pg_temp.nowhere values (1)".into(),
            "show statement_timeout",
            "77s",
        ),
        ("select 1".into(), "execute known", "4"),
    ] {
        let mut raw = proxy.client().await;
        raw.query("set statement_timeout = '77s'").await;
        raw.query("prepare known as select 4").await;
        sessions.push((raw, text, question, answer));
    }
    let mut uncarriable = Vec::new();
    for text in [hidden("create temp table t ()"), hidden("select pg_advisory_lock(1)")] {
        let mut raw = proxy.client().await;
        raw.query("select 1").await;
        uncarriable.push((raw, text));
    }
    let mut unnamed = proxy.client().await;
    let parse = |text: &[u8]| {
        let mut out = Vec::new();
        frontend::put_parse(&mut out, b"", text, &[]);
        out.extend_from_slice(frontend::SYNC);
        out
    };
    unnamed.send(&parse(b"select 'before'")).await;
    assert_eq!(unnamed.kinds().await, "1Z");

    prepare(&proxy, Side::New).await;
    for (raw, text, _, _) in &mut sessions {
        raw.query(text).await;
    }
    for (raw, text) in &mut uncarriable {
        raw.query(text).await;
    }
    unnamed.send(&parse(b"select 'after'")).await;
    assert_eq!(unnamed.kinds().await, "1Z");
    assert_eq!(
        turn(&proxy, Side::New).await,
        ["it has temporary tables", "it holds session advisory locks"]
    );

    for (raw, text, question, answer) in &mut sessions {
        assert_eq!(raw.value("show server_version_num").await[..2], *"18");
        assert_eq!(raw.value(question).await, *answer, "{text}");
        assert_eq!(
            raw.value("select count(*) from pg_prepared_statements where name like 'pgtandem%'")
                .await,
            "0"
        );
    }
    let mut out = Vec::new();
    frontend::put_bind(&mut out, b"", b"", &[]);
    frontend::put_execute(&mut out, b"");
    out.extend_from_slice(frontend::SYNC);
    unnamed.send(&out).await;
    assert_eq!(unnamed.answer().await[1].columns(), ["after"]);
}

/// A rehearsal leaves nothing behind on the side where everybody stays.
#[tokio::test]
async fn what_was_prepared_and_given_up_is_not_seen_by_clients() {
    let proxy = Proxy::start("given_up", Options::default()).await;
    let mut raw = proxy.client().await;
    raw.query("select 1").await;
    prepare(&proxy, Side::New).await;
    let registry = &proxy.context.registry;
    let hold = registry.hold();
    assert_eq!(registry.make_ready(&hold, Side::New).await.len(), 0);
    drop(hold);
    registry.settle().await;
    assert_eq!(raw.value("select count(*) from pg_prepared_statements").await, "0");
    assert_eq!(raw.value("show server_version_num").await[..2], *"15");
}

#[tokio::test]
async fn what_cannot_be_carried_is_named_and_may_be_ended() {
    let proxy = Proxy::start("cannot", Options::default()).await;
    let mut sessions = Vec::new();
    for (text, reason) in [
        ("create temp table t ()", "temporary tables"),
        ("select pg_advisory_lock(1)", "advisory locks"),
        ("begin; declare c cursor with hold for select 1; commit", "WITH HOLD: c"),
        (
            "create table only_here (); prepare p as select * from only_here",
            "prepared statement \"p\"",
        ),
        ("select 1", ""),
    ] {
        let mut raw = proxy.client().await;
        raw.query(text).await;
        sessions.push((raw, reason));
    }
    let registry = &proxy.context.registry;
    let prepared = registry.prepare(Side::New).await;
    assert_eq!((prepared.opened, prepared.failed.len()), (5, 0));
    assert_eq!(prepared.uncarriable.len(), 4, "{prepared:?}");
    let hold = registry.hold();
    registry.drained(&hold, soon()).await.unwrap();
    let stay = registry.make_ready(&hold, Side::New).await;
    assert_eq!(stay.len(), 4);
    for ((_, reason), session) in sessions.iter().zip(&stay) {
        assert!(session.reason.contains(reason), "{reason}: {}", session.reason);
    }
    // Given up: nobody has moved.
    drop(hold);
    registry.settle().await;
    for (raw, _) in &mut sessions {
        assert_eq!(raw.value("show server_version_num").await[..2], *"15");
    }
    // Ended instead.
    let ids: Vec<_> = stay.iter().map(|session| session.id).collect();
    registry.end(&ids, "terminating connection: it cannot be moved to the new primary");
    for (raw, reason) in &mut sessions {
        if !reason.is_empty() {
            assert_eq!(raw.fatal().await.sqlstate(), "57P01");
        }
    }
    // Those that were overlooked must not write to the wrong side: they move late, or are ended.
    let mut stays = proxy.client().await;
    stays.query("create temp table t ()").await;
    proxy.set(Phase::Switchover, Side::New);
    let (raw, _) = sessions.last_mut().unwrap();
    assert_eq!(raw.value("show server_version_num").await[..2], *"18");
    let raw = &mut stays;
    let mut out = Vec::new();
    frontend::put_query(&mut out, b"select 1");
    raw.send(&out).await;
    assert_eq!(raw.fatal().await.sqlstate(), "57P01");
}

#[tokio::test]
async fn a_hold_waits_for_open_transactions_and_names_them() {
    let proxy = Proxy::start("waits", Options::default()).await;
    let registry = proxy.context.registry.clone();
    let mut open = proxy.client().await;
    let mut idle = proxy.client().await;
    open.query("begin").await;
    let hold = registry.hold();
    let stragglers = registry.drained(&hold, Instant::now()).await.unwrap_err();
    assert_eq!(stragglers.len(), 1);
    assert_eq!(
        (stragglers[0].pid, stragglers[0].state),
        (open.pid, State::InTransaction)
    );
    // What arrives now waits, and is not lost; the open one may go on.
    let mut out = Vec::new();
    frontend::put_query(&mut out, b"select 1");
    frontend::put_query(&mut out, b"select 2");
    idle.send(&out).await;
    let late = tokio::spawn({
        let (address, database) = (proxy.address, proxy.database.clone());
        async move {
            let mut late = Raw::connect(address).await;
            late.login(APP, &database, PASSWORD, &[]).await;
            late.value("select 3").await
        }
    });
    assert_eq!(open.value("select 1").await, "1");
    // The end of the transaction and the beginning of the next one at once.
    let mut out = Vec::new();
    for text in [&b"commit"[..], b"select 4"] {
        frontend::put_query(&mut out, text);
    }
    open.send(&out).await;
    assert_eq!(open.kinds().await, "CZ");
    while registry.sessions().len() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    registry.drained(&hold, soon()).await.unwrap();
    let states: Vec<State> = registry.sessions().iter().map(|session| session.state).collect();
    assert_eq!(states, [State::Idle, State::Idle, State::Waiting]);
    drop(hold);
    assert_eq!(idle.kinds().await, "TDCZ");
    assert_eq!(idle.kinds().await, "TDCZ");
    assert_eq!(open.answer().await[1].columns(), ["4"]);
    assert_eq!(late.await.unwrap(), "3");
}

#[tokio::test]
async fn preparing_waits_for_nobody_and_an_ended_session_runs_nothing_more() {
    let proxy = Proxy::start("prepares", Options::default()).await;
    let registry = proxy.context.registry.clone();
    let mut busy = proxy.client().await;
    let mut out = Vec::new();
    frontend::put_query(&mut out, b"set application_name = 'later named'; select pg_sleep(600)");
    busy.send(&out).await;
    until_active(&proxy, 1).await;
    let prepared = registry.prepare(Side::New).await;
    assert_eq!((prepared.opened, prepared.failed.len()), (1, 0));
    let hold = registry.hold();
    let stragglers = registry.drained(&hold, Instant::now()).await.unwrap_err();
    assert_eq!(stragglers[0].state, State::Active);
    registry.end(&[stragglers[0].id], "ended by a test");
    registry.drained(&hold, soon()).await.unwrap();
    let error = busy.fatal().await;
    assert_eq!(
        (error.sqlstate().as_str(), error.message().as_str()),
        ("57P01", "ended by a test")
    );
    // Cancelled, not left to its ten minutes.
    let own = direct(Side::Legacy, "postgres", "postgres").await;
    while own
        .query_opt("select from pg_stat_activity where pid = $1", &[&busy.pid])
        .await
        .unwrap()
        .is_some()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What was opened for it on the other side is gone as well.
    let own = direct(Side::New, "postgres", "postgres").await;
    while own
        .query_opt(
            "select from pg_stat_activity where datname = $1 and usename = $2",
            &[&proxy.database, &APP],
        )
        .await
        .unwrap()
        .is_some()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_standby_that_cannot_be_opened_is_told() {
    let proxy = Proxy::start("no_standby", Options::default()).await;
    let _raw = proxy.client().await;
    let own = direct(Side::New, "postgres", "postgres").await;
    own.batch_execute("alter database no_standby rename to elsewhere")
        .await
        .unwrap();
    let prepared = proxy.context.registry.prepare(Side::New).await;
    assert_eq!((prepared.opened, prepared.failed.len()), (0, 1));
    assert!(prepared.failed[0].reason.contains("3D000"), "{:?}", prepared.failed);
}

/// Clients that write on the side that is the primary, while it flips to and fro: no statement
/// fails, and none runs on the wrong side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flips_under_load_lose_nothing() {
    let proxy = Proxy::start("loaded", Options::default()).await;
    for side in [Side::Legacy, Side::New] {
        let own = direct(side, APP, "loaded").await;
        own.batch_execute("create table t (client int, n int, epoch int)")
            .await
            .unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    for client in 0..8 {
        let (stop, done) = (stop.clone(), done.clone());
        let mut connected = proxy.tokio_postgres().await;
        clients.push(tokio::spawn(async move {
            connected
                .batch_execute(&format!("set app.client = '{client}'"))
                .await
                .unwrap();
            let insert = "insert into t values (current_setting('app.client')::int, $1, $2)";
            let insert = connected.prepare(insert).await.unwrap();
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                if n % 3 == 0 {
                    let transaction = connected.transaction().await.unwrap();
                    transaction.execute(&insert, &[&n, &0]).await.unwrap();
                    transaction.query("select count(*) from t", &[]).await.unwrap();
                    transaction.commit().await.unwrap();
                } else {
                    connected.execute(&insert, &[&n, &0]).await.unwrap();
                }
                n += 1;
                done.fetch_add(1, Ordering::Relaxed);
            }
            n
        }));
    }
    for round in 0..10 {
        let before = done.load(Ordering::Relaxed);
        while done.load(Ordering::Relaxed) < before + 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let to = if round % 2 == 0 { Side::New } else { Side::Legacy };
        assert_eq!(flip(&proxy, to).await, [""; 0]);
    }
    stop.store(true, Ordering::Relaxed);
    let mut expected = 0;
    for client in clients {
        expected += i64::from(client.await.unwrap());
    }
    let mut found = 0;
    for side in [Side::Legacy, Side::New] {
        let own = direct(side, APP, "loaded").await;
        let here: i64 = own.query_one("select count(*) from t", &[]).await.unwrap().get(0);
        assert!(here > 0);
        found += here;
    }
    assert_eq!(found, expected);
}

#[tokio::test]
async fn notifications_before_and_after_a_flip() {
    let proxy = Proxy::start("flip_notifies", Options::default()).await;
    let mut listener = proxy.client().await;
    let mut sender = proxy.client().await;
    listener.query("listen news").await;
    sender.query("notify news, 'old'").await;
    flip(&proxy, Side::New).await;
    sender.query("notify news, 'new'").await;
    let mut heard = Vec::new();
    while heard.len() < 2 {
        let frame = listener.frame().await;
        if frame.kind == b'A' {
            heard.push(String::from_utf8_lossy(&frame.body[4..]).into_owned());
        }
    }
    assert_eq!(heard, ["news\0old\0", "news\0new\0"]);
    // A batch after a flip, on a session that only listened.
    listener
        .send(&[&extended("", "select 1")[..], frontend::SYNC].concat())
        .await;
    assert_eq!(listener.kinds().await, "12TDCZ");
}
