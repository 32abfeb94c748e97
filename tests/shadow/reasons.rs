//! Every reason for which a read is not compared, or only in part, that needs no client's session;
//! `tests/mirror/reads.rs` has the others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgtandem::config::{ColumnRule, How, Ignore, Reads, Which};
use pgtandem::control::{Control, Epoch, Phase, Side};
use pgtandem::servers::SUPERUSER;
use pgtandem::shadow::{Analysis, Asked, Call, Candidate, DigestBuilder};
use pgtandem::sql::analyze;
use pgtandem::transform::Transform;
use time::macros::date;
use tokio_postgres::NoTls;

use super::places::{Place, produced_in};
use super::{Pair, Shadows, parameters};

/// What was produced so far.
#[derive(Default)]
struct Produced(BTreeSet<String>);

impl Produced {
    /// An outcome as the counters name it, `partly.sample`.
    fn one(&mut self, outcomes: &[String], expected: &str) {
        assert!(
            outcomes.iter().any(|outcome| outcome == expected),
            "{expected}: {outcomes:?}"
        );
        let reason = expected.split_once('.').map_or(expected, |(_, reason)| reason);
        self.0.insert(reason.to_owned());
    }

    async fn read(&mut self, shadows: &mut Shadows, sql: &str, call: Call, expected: &str) {
        let read = shadows.ask(sql, call).await;
        let (outcomes, _) = shadows.judge(read).await;
        self.one(&outcomes, expected);
    }
}

fn about_table(table: &str) -> Which {
    Which {
        fingerprint: None,
        table: Some(table.into()),
    }
}

const SCHEMA: &str = "
    create table one (a int, b text); insert into one values (1, 'x'), (1, 'y');
    create table many (id int, doc json);
    insert into many select i, json_build_object('a', repeat('x', 1000)) from generate_series(1, 10000) i;
    create table known (a int);
    create schema shaped; create table shaped.t (a int); grant usage on schema shaped to app;
    grant select on shaped.t to app;
    create function noisy() returns text stable language sql as 'select clock_timestamp()::text'";
/// The same rows, otherwise on disk; other rows; other values.
const ON_NEW: &str = "
    truncate one; insert into one values (1, 'y'), (1, 'x');
    update many set doc = json_build_object('a', repeat('x', 1000), 'b', 1);
    insert into known values (1)";

async fn start() -> (Pair, Shadows) {
    let mut pair = Pair::start().await;
    let mut transform = Transform::default();
    transform.schemas.insert("shaped".into(), "formed".into());
    pair.targets.transform = Arc::new(transform);
    pair.both(SCHEMA).await;
    pair.primary
        .batch_execute("create type lonely as enum ('x')")
        .await
        .unwrap();
    pair.secondary.batch_execute(ON_NEW).await.unwrap();
    let reads = Reads {
        shadow_timeout: Duration::from_secs(8),
        shadow_queue: 1,
        shadow_max_concurrency: 1,
        columns: vec![ColumnRule {
            column: "doc".into(),
            which: about_table("many"),
            how: How::Json,
        }],
        ignores: vec![Ignore {
            which: about_table("known"),
            column: None,
            owner: "ann".into(),
            reason: "known".into(),
            expires: date!(9999 - 12 - 31),
        }],
        ..Reads::default()
    };
    let shadows = Shadows::start(&pair, &pair.log_path(), reads).await;
    (pair, shadows)
}

#[tokio::test]
async fn each_has_a_read_that_produces_it() {
    let (mut pair, mut shadows) = start().await;
    let mut produced = Produced::default();

    // The statement leaves its answer open.
    for (sql, expected) in [
        ("select b from one limit 1", "partly.limit_without_order"),
        ("select array_agg(b) from one", "partly.order_dependent_function"),
        ("select distinct on (a) a, b from one", "partly.distinct_on"),
        (
            "select id from many tablesample bernoulli (50) repeatable (1)",
            "partly.sample",
        ),
        ("select * from known", "not_comparable.ignored"),
        ("select id, doc from many", "not_comparable.too_many_rows"),
        ("select noisy()", "not_comparable.non_deterministic"),
    ] {
        produced.read(&mut shadows, sql, Call::Simple, expected).await;
    }

    // Found before anything is asked.
    for (text, expected) in [
        (&b"select a from shaped.t"[..], "not_comparable.transformed"),
        // In Latin-1.
        (b"select stra\xdfe from one", "not_comparable.encoding"),
    ] {
        let before = shadows.settled().await;
        let script = analyze(text);
        assert!(!shadows.sink.wants(&Candidate {
            script: Some(&script),
            text,
            arguments: None,
            after_write: false,
            temporary: &[],
            settings_known: true,
        }));
        produced.one(&super::moved(&before, &shadows.settled().await), expected);
    }

    // A kind of statement that is known is taken without a look at each text; one of its texts may be
    // another matter, and is found out later.
    let unread = |text: &'static str| Candidate {
        script: None,
        text: text.as_bytes(),
        arguments: None,
        after_write: false,
        temporary: &[],
        settings_known: true,
    };
    assert!(!shadows.sink.wants(&unread("select nobody_knows(1)")));
    assert!(shadows.wants("select timestamptz '2024-01-01'"));
    assert!(shadows.sink.wants(&unread("select timestamptz 'now'")));
    let mut read = shadows.ask("select timestamptz 'now'", Call::Simple).await;
    read.analysis = Analysis::default();
    assert_eq!(shadows.judge(read).await.0, ["not_comparable.clock"]);

    // Parameters and answers that cannot be repeated.
    let row = pair
        .primary
        .query_one("select oid from pg_type where typname = 'lonely'", &[])
        .await
        .unwrap();
    let lonely = Call::Extended {
        parameter_types: Bytes::copy_from_slice(&row.get::<_, u32>(0).to_be_bytes()),
        bind: parameters(&["x"], 0),
    };
    produced
        .read(&mut shadows, "select $1", lonely, "not_comparable.parameter_type")
        .await;
    let mut read = shadows.ask("select a from one", Call::Simple).await;
    // CopyInResponse: no answer of Postgres' own to a read, and told if it comes all the same.
    let mut builder = DigestBuilder::default();
    builder.frame(b'G', b"");
    read.digest = builder.finish();
    produced.one(&shadows.judge(read).await.0, "not_comparable.partial_answer");

    // Not in the sample.
    let sampled = |percent| Reads {
        shadow_percent: percent,
        ..Reads::default()
    };
    shadows.sink.configure(&sampled(1e-9));
    let before = shadows.settled().await;
    assert!(!shadows.sink.samples(&Asked {
        database: "shop",
        user: "app",
        application: &std::sync::Mutex::default(),
        text: b"select a from one",
        values: &[],
    }));
    produced.one(&super::moved(&before, &shadows.settled().await), "skipped.not_sampled");
    shadows.sink.configure(&sampled(100.0));

    // The primary's own answer was a cancellation.
    shadows.ask("set statement_timeout = 10", Call::Simple).await;
    let slow = "select count(*) from generate_series(1, 1000000000) a";
    produced
        .read(&mut shadows, slow, Call::Simple, "skipped.primary_error")
        .await;
    shadows.ask("reset statement_timeout", Call::Simple).await;

    // No room, or too large for it.
    let read = shadows.ask("select a from one", Call::Simple).await;
    let mut large = read.clone();
    large.text = Bytes::from(vec![b' '; 2 * 1024 * 1024]);
    produced.one(&shadows.judge(large).await.0, "dropped.too_large");
    let before = shadows.settled().await;
    let cuts = shadows.cuts.clone();
    let permit = cuts.gate.acquire().await.unwrap();
    // One that is taken from the queue, at most, one that waits in it, one too many.
    for _ in 0..200 {
        shadows.sink.offer(read.clone());
    }
    drop(permit);
    produced.one(&super::moved(&before, &shadows.settled().await), "dropped.queue_full");

    // Slower than the deadline; no cut; another primary; nobody there.
    let mut read = shadows
        .ask("select count(*) from generate_series(1, 20) a", Call::Simple)
        .await;
    read.text = Bytes::from_static(b"select count(*) from generate_series(1, 1000000000) a");
    produced.one(&shadows.judge(read).await.0, "failed.timeout");
    terminate(&pair, Side::New).await;
    pair.new.stop("fast").unwrap();
    produced
        .read(&mut shadows, "select a from one", Call::Simple, "failed.connection")
        .await;
    shadows.cuts.gate.close();
    produced
        .read(&mut shadows, "select a from one", Call::Simple, "failed.no_cut")
        .await;
    let read = shadows.ask("select a from one", Call::Simple).await;
    shadows.control.send_replace(Control {
        phase: Phase::Switchover,
        primary: Side::New,
        epoch: Epoch::FIRST.next(),
    });
    produced.one(&shadows.judge(read).await.0, "skipped.flip");

    let wanted: BTreeSet<String> = produced_in(Place::Shadows).into_iter().map(str::to_owned).collect();
    assert_eq!(produced.0, wanted);
}

/// Sessions that nobody uses any more would be asked in vain first.
async fn terminate(pair: &Pair, side: Side) {
    let url = match side {
        Side::New => pair.new.url(SUPERUSER, "postgres"),
        Side::Legacy => pair.legacy.url(SUPERUSER, "postgres"),
    };
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")
        .await
        .unwrap();
}
