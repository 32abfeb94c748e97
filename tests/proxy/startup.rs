//! How a session begins: encryption, versions, who is there, and what is refused.

use std::time::Duration;

use pgtandem::config::{AuthMethod, Credential, Secret};
use pgtandem::control::{Phase, Side};
use pgtandem::servers::PASSWORD;
use pgtandem::wire::startup::Version;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{APP, Options, Proxy, Raw, UNLISTED, cancel, direct};

#[tokio::test]
async fn the_client_sees_what_the_server_says_of_itself() {
    let proxy = Proxy::start("greets", Options::default()).await;
    let mut raw = Raw::connect(proxy.address).await;
    let more = [
        ("application_name", "me"),
        ("options", "-c work_mem=5MB"),
        ("datestyle", "German"),
    ];
    raw.login(APP, &proxy.database, PASSWORD, &more).await;
    assert_eq!(raw.parameters["application_name"], "me");
    assert_eq!(raw.parameters["DateStyle"], "German, DMY");
    assert!(raw.parameters["server_version"].starts_with(&proxy.servers.legacy.major.to_string()));
    assert_eq!(raw.value("select pg_backend_pid()").await, raw.pid.to_string());
    assert_eq!(raw.value("show work_mem").await, "5MB");
    assert_eq!(raw.value("select session_user").await, APP);
    let sessions = proxy.context.registry.sessions();
    assert_eq!(
        (sessions[0].user.as_str(), sessions[0].application.as_str()),
        (APP, "me")
    );
}

#[tokio::test]
async fn users_that_are_not_listed_are_looked_up() {
    let options = Options {
        users: [(
            "by_verifier".to_owned(),
            Credential::Verifier(Secret::new(postgres_protocol::password::scram_sha_256(b"other"))),
        )]
        .into(),
        ..Options::default()
    };
    let proxy = Proxy::start("looks_up", options).await;
    // The verifier of each server has a salt of its own until the roles are brought over.
    let legacy = direct(Side::Legacy, "postgres", "postgres").await;
    let verifier: String = legacy
        .query_one("select rolpassword from pg_authid where rolname = $1", &[&UNLISTED])
        .await
        .unwrap()
        .get(0);
    for _ in 0..2 {
        let mut raw = proxy.client_as(UNLISTED).await;
        assert_eq!(raw.value("select session_user").await, UNLISTED);
    }
    assert!(verifier.starts_with("SCRAM-SHA-256$"));
    // A listed verifier that is not the server's: the client is who it says, the server disagrees.
    legacy
        .batch_execute("create role by_verifier login password 'different'")
        .await
        .unwrap();
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_0, &[("user", "by_verifier"), ("database", &proxy.database)])
        .await;
    raw.scram("other").await;
    let error = raw.fatal().await;
    assert_eq!(error.sqlstate(), "28000", "{}", error.message());
}

#[tokio::test]
async fn wrong_passwords_and_unknown_users_look_alike() {
    let proxy = Proxy::start("refuses", Options::default()).await;
    for user in [APP, UNLISTED, "nobody_at_all"] {
        let mut raw = Raw::connect(proxy.address).await;
        raw.startup(Version::V3_0, &[("user", user), ("database", &proxy.database)])
            .await;
        let error = raw.scram("wrong").await;
        assert_eq!((error.kind, error.sqlstate().as_str()), (b'E', "28P01"));
        assert_eq!(
            error.message(),
            format!("password authentication failed for user \"{user}\"")
        );
        assert_eq!(raw.next().await, None);
    }
}

#[tokio::test]
async fn a_changed_password_counts_at_once_after_a_failure() {
    let proxy = Proxy::start("changes", Options::default()).await;
    let own = direct(Side::Legacy, "postgres", "postgres").await;
    own.batch_execute("create role changing login password 'one'")
        .await
        .unwrap();
    let login = async |password: &str| {
        let mut raw = Raw::connect(proxy.address).await;
        raw.startup(Version::V3_0, &[("user", "changing"), ("database", &proxy.database)])
            .await;
        raw.scram(password).await.kind
    };
    assert_eq!(login("one").await, b'R');
    own.batch_execute("alter role changing password 'two'").await.unwrap();
    assert_eq!(login("two").await, b'E', "the old verifier is still believed");
    assert_eq!(login("two").await, b'R');
}

#[tokio::test]
async fn trust_asks_nothing() {
    let options = Options {
        method: AuthMethod::Trust,
        ..Options::default()
    };
    let proxy = Proxy::start("trusts", options).await;
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_0, &[("user", APP), ("database", &proxy.database)])
        .await;
    assert_eq!(raw.frame().await.body, [0, 0, 0, 0]);
    raw.greeting().await;
    assert_eq!(raw.value("select 1").await, "1");
    // Not listed, and the server wants a password.
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_0, &[("user", UNLISTED), ("database", &proxy.database)])
        .await;
    let error = raw.fatal().await;
    assert_eq!(error.sqlstate(), "28000");
    assert!(error.message().contains("auth.users"), "{}", error.message());
}

#[tokio::test]
async fn databases_by_the_star_and_those_that_are_not_there() {
    let proxy = Proxy::start("starred", Options::default()).await;
    let mut raw = Raw::connect(proxy.address).await;
    raw.login(APP, "postgres", PASSWORD, &[]).await;
    assert_eq!(raw.value("select current_database()").await, "postgres");
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_0, &[("user", APP), ("database", "no_such")])
        .await;
    raw.scram(PASSWORD).await;
    let error = raw.fatal().await;
    assert_eq!(error.sqlstate(), "3D000");
    assert_eq!(error.message(), "database \"no_such\" does not exist");
    // What the server refuses is said in its own words.
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(
        Version::V3_0,
        &[("user", APP), ("database", "postgres"), ("no_such_setting", "1")],
    )
    .await;
    raw.scram(PASSWORD).await;
    assert_eq!(raw.fatal().await.sqlstate(), "42704");
}

#[tokio::test]
async fn versions_are_negotiated_to_what_the_primary_speaks() {
    let proxy = Proxy::start("negotiates", Options::default()).await;
    let ask = async |version: Version, more: &[(&str, &str)]| {
        let mut raw = Raw::connect(proxy.address).await;
        let mut pairs = vec![("user", APP), ("database", proxy.database.as_str())];
        pairs.extend_from_slice(more);
        raw.startup(version, &pairs).await;
        let mut first = raw.frame().await;
        let negotiated = (first.kind == b'v').then(|| first.body.clone());
        if negotiated.is_some() {
            first = raw.frame().await;
        }
        assert_eq!(first.kind, b'R');
        negotiated
    };
    let v3_0 = [&Version::V3_0.0.to_be_bytes()[..], &[0; 4]].concat();
    assert_eq!(ask(Version::V3_0, &[]).await, None);
    assert_eq!(ask(Version::V3_2, &[]).await, Some(v3_0));
    let named = [&Version::V3_0.0.to_be_bytes()[..], b"\0\0\0\x01_pq_.hello\0"].concat();
    assert_eq!(ask(Version::V3_0, &[("_pq_.hello", "1")]).await, Some(named));

    proxy.set(Phase::Complete, Side::New);
    assert_eq!(ask(Version::V3_2, &[]).await, None);
    let v3_2 = [&Version::V3_2.0.to_be_bytes()[..], &[0; 4]].concat();
    assert_eq!(ask(Version((3 << 16) + 9999), &[]).await, Some(v3_2));
    // Long keys, and cancelling by them.
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_2, &[("user", APP), ("database", &proxy.database)])
        .await;
    assert_eq!(raw.scram(PASSWORD).await.kind, b'R');
    raw.greeting().await;
    assert_eq!(raw.key.len(), 32);
    let (pid, key, address) = (raw.pid, raw.key.clone(), proxy.address);
    let query = tokio::spawn(async move { raw.error("select pg_sleep(60)").await });
    until_active(&proxy, 1).await;
    cancel(address, pid, &key).await;
    assert_eq!(query.await.unwrap(), "57014");
}

/// Waits until as many statements run on the servers under this database's name.
pub(crate) async fn until_active(proxy: &Proxy, count: i64) {
    let side = proxy.control.borrow().primary;
    let own = direct(side, "postgres", "postgres").await;
    loop {
        let active: i64 = own
            .query_one(
                "select count(*) from pg_stat_activity where datname = $1 and state = 'active'",
                &[&proxy.database],
            )
            .await
            .unwrap()
            .get(0);
        if active >= count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn cancel_requests_reach_the_statement_and_nothing_else() {
    let proxy = Proxy::start("cancels", Options::default()).await;
    let mut raw = proxy.client().await;
    let (pid, key, address) = (raw.pid, raw.key.clone(), proxy.address);
    let query = tokio::spawn(async move {
        let sqlstate = raw.error("select pg_sleep(60)").await;
        (sqlstate, raw)
    });
    until_active(&proxy, 1).await;
    // A wrong key does nothing, silently.
    cancel(address, pid, &[1, 2, 3, 4]).await;
    cancel(address, pid, &key).await;
    let (sqlstate, mut raw) = query.await.unwrap();
    assert_eq!(sqlstate, "57014");
    assert_eq!(raw.value("select 1").await, "1");
}

#[tokio::test]
async fn what_is_refused_before_a_session_begins() {
    let proxy = Proxy::start("hostile", Options::default()).await;
    let pairs = [("user", APP), ("database", "hostile")];
    for (version, pairs, sqlstate) in [
        (Version(2 << 16), &pairs[..], "0A000"),
        (Version(4 << 16), &pairs, "0A000"),
        (Version::V3_0, &[("user", APP), ("replication", "database")], "0A000"),
        (Version::V3_0, &[("user", APP), ("replication", "on")], "0A000"),
        (Version::V3_0, &[("database", "hostile")], "28000"),
    ] {
        let mut raw = Raw::connect(proxy.address).await;
        raw.startup(version, pairs).await;
        assert_eq!(raw.fatal().await.sqlstate(), sqlstate, "{version:?} {pairs:?}");
    }
    for bytes in [
        &b"\0\0\0\x04"[..],
        b"\x7f\xff\xff\xff\0\x03\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\x27\x11\0\x03\0\0",
        b"\0\0\0\x09\0\x03\0\0x",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut raw = Raw::connect(proxy.address).await;
        raw.send(bytes).await;
        assert_eq!(raw.fatal().await.sqlstate(), "08P01", "{bytes:?}");
    }
    // Not a SASL answer, and one that is too long.
    for bytes in [&b"Q\0\0\0\x05\0"[..], b"p\0\x10\0\0", b"p\0\0\0\x02", b"p\0\0\0\x05\0"] {
        let mut raw = Raw::connect(proxy.address).await;
        raw.startup(Version::V3_0, &pairs).await;
        raw.frame().await;
        raw.send(bytes).await;
        assert_eq!(raw.fatal().await.sqlstate(), "08P01", "{bytes:?}");
    }
}

#[tokio::test]
async fn half_open_connections_end_with_the_deadline() {
    let options = Options {
        handshake_timeout: Duration::from_millis(300),
        max_connections: 10,
        ..Options::default()
    };
    let proxy = Proxy::start("half_open", options).await;
    let mut silent = Vec::new();
    // More than there is room for: the last ones are turned away at once.
    for _ in 0..200 {
        silent.push(Raw::connect(proxy.address).await);
    }
    let (mut turned_away, mut timed_out) = (0, 0);
    for mut raw in silent {
        match raw.next().await {
            Some(frame) => {
                assert_eq!(frame.sqlstate(), "53300");
                turned_away += 1;
            }
            None => timed_out += 1,
        }
    }
    assert!(turned_away > 0 && timed_out >= 128, "{turned_away} {timed_out}");
    let mut raw = proxy.client().await;
    assert_eq!(raw.value("select 1").await, "1");
}

#[tokio::test]
async fn too_many_clients() {
    let options = Options {
        max_connections: 2,
        ..Options::default()
    };
    let proxy = Proxy::start("crowded", options).await;
    let (one, _two) = (proxy.client().await, proxy.client().await);
    let mut raw = Raw::connect(proxy.address).await;
    raw.startup(Version::V3_0, &[("user", APP), ("database", &proxy.database)])
        .await;
    raw.scram(PASSWORD).await;
    assert_eq!(raw.fatal().await.sqlstate(), "53300");
    drop(one);
    while proxy.context.registry.len() > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    proxy.client().await;
}

#[tokio::test]
async fn encryption_that_is_not_configured_is_declined() {
    let proxy = Proxy::start("plain", Options::default()).await;
    let mut raw = Raw::connect(proxy.address).await;
    for request in [80_877_103_u32, 80_877_104] {
        raw.send(&[&8_u32.to_be_bytes()[..], &request.to_be_bytes()].concat())
            .await;
        let mut answer = [0];
        raw.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, *b"N");
    }
    raw.login(APP, &proxy.database, PASSWORD, &[]).await;
    assert_eq!(raw.value("select 1").await, "1");
    // Asking again and again is no use.
    let mut raw = Raw::connect(proxy.address).await;
    let request = [&8_u32.to_be_bytes()[..], &80_877_103_u32.to_be_bytes()].concat();
    raw.send(&request).await;
    let mut answer = [0];
    raw.stream.read_exact(&mut answer).await.unwrap();
    raw.send(&request).await;
    assert_eq!(raw.fatal().await.sqlstate(), "08P01");
    let mut direct = Raw::connect(proxy.address).await;
    direct.stream.write_all(&[0x16, 3, 1]).await.unwrap();
    assert_eq!(direct.next().await, None);
}
