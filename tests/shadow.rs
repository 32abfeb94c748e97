//! Shadow reads on real servers 15 and 18: what is equal matches, every planted difference is
//! found under its kind, and nothing else is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "shadow/kinds.rs"]
mod kinds;
#[path = "shadow/places.rs"]
mod places;
#[path = "shadow/reasons.rs"]
mod reasons;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use pgtandem::config::{DatabaseConfig, LoggedValues, Reads, Secret, Target};
use pgtandem::control::{Control, Epoch, Phase, Side};
use pgtandem::servers::{Binaries, PASSWORD, SUPERUSER, Server};
use pgtandem::shadow::{
    Asked, Call, Candidate, Cuts, CutsFuture, DigestBuilder, Filter, HeldCut, Mismatch, MismatchLog, NoCut, Shadow,
    ShadowRead, ShadowSink, ShadowStats, ShadowTasks, Timing, ValueWriter, read_log,
};
use pgtandem::sql::{Script, analyze};
use pgtandem::upstream::control::{Control as Connection, connect};
use pgtandem::upstream::{Backend, Login, Proof, frames, login};
use pgtandem::wire::frontend;
use pgtandem::wire::startup::{Parameters, Version};
use tokio::sync::{Mutex, Semaphore, watch};

const DUAL_READ: Control = Control {
    phase: Phase::DualRead,
    primary: Side::Legacy,
    epoch: Epoch::FIRST,
};

/// Two databases that nothing writes to but the test: every moment is a cut.
struct StaticCuts {
    primary: Target,
    rounds: AtomicU64,
    /// A round takes a permit; a test may withhold them.
    gate: Semaphore,
    /// What happens on the primary right after the snapshot of each of the next cuts was taken.
    after_cut: Mutex<VecDeque<&'static str>>,
}

impl Cuts for StaticCuts {
    fn round_after_now(&self) -> CutsFuture<'_, u64> {
        Box::pin(async {
            let permit = self.gate.acquire().await.map_err(|_| NoCut("closed".into()))?;
            drop(permit);
            Ok(self.rounds.fetch_add(1, Ordering::Relaxed))
        })
    }

    fn hold_cut(&self) -> CutsFuture<'_, HeldCut> {
        Box::pin(async {
            let client = connect(&self.primary, "test")
                .await
                .map_err(|error| NoCut(error.to_string()))?;
            client
                .batch_execute("begin isolation level repeatable read")
                .await
                .map_err(|error| NoCut(error.to_string()))?;
            let row = client
                .query_one("select pg_export_snapshot()", &[])
                .await
                .map_err(|error| NoCut(error.to_string()))?;
            let next = self.after_cut.lock().await.pop_front();
            if let Some(sql) = next {
                let other = connect(&self.primary, "test").await.unwrap();
                other.batch_execute("reset search_path").await.unwrap();
                other.batch_execute(sql).await.unwrap();
            }
            Ok(HeldCut::new(self.rounds.load(Ordering::Relaxed), row.get(0), client))
        })
    }
}

struct Pair {
    // Dropped last: the servers.
    primary: Connection,
    secondary: Connection,
    targets: DatabaseConfig,
    directory: tempfile::TempDir,
    legacy: Server,
    new: Server,
}

impl Pair {
    async fn start() -> Self {
        let (legacy, new) = tokio::task::spawn_blocking(|| {
            let start = |binaries: Binaries| Server::start(&binaries, &[]).unwrap();
            (start(Binaries::legacy().unwrap()), start(Binaries::new_side().unwrap()))
        })
        .await
        .unwrap();
        let target = |side, server: &Server| Target::parse(side, &server.url(SUPERUSER, "postgres")).unwrap();
        let targets = DatabaseConfig {
            legacy: target(Side::Legacy, &legacy),
            new: target(Side::New, &new),
            transform: Default::default(),
        };
        let primary = connect(&targets.legacy, "test").await.unwrap();
        let secondary = connect(&targets.new, "test").await.unwrap();
        for client in [&primary, &secondary] {
            // That of clients, not the proxy's own.
            client.batch_execute("RESET search_path").await.unwrap();
        }
        let pair = Self {
            primary,
            secondary,
            targets,
            directory: tempfile::tempdir().unwrap(),
            legacy,
            new,
        };
        pair.both(&format!(
            "create role app login password '{PASSWORD}'; grant create, usage on schema public to app;
             alter default privileges grant all on tables to app; alter default privileges grant all on sequences to app"
        ))
        .await;
        pair
    }

    async fn both(&self, sql: &str) {
        self.primary.batch_execute(sql).await.unwrap();
        self.secondary.batch_execute(sql).await.unwrap();
    }

    fn log_path(&self) -> std::path::PathBuf {
        self.directory.path().join("mismatches.jsonl")
    }
}

struct Shadows {
    sink: ShadowSink,
    tasks: ShadowTasks,
    log: MismatchLog,
    cuts: Arc<StaticCuts>,
    login: Arc<Login>,
    session: Backend,
    control: watch::Sender<Control>,
    log_path: std::path::PathBuf,
}

impl Shadows {
    async fn start(pair: &Pair, log_path: &Path, reads: Reads) -> Self {
        let (control, watching) = watch::channel(DUAL_READ);
        let cuts = Arc::new(StaticCuts {
            primary: pair.targets.legacy.clone(),
            rounds: AtomicU64::new(1),
            gate: Semaphore::new(1),
            after_cut: Mutex::default(),
        });
        let (log, _writer) = MismatchLog::open(log_path.to_owned(), ValueWriter::new(LoggedValues::Hashed));
        let (sink, tasks) = pgtandem::shadow::spawn(Shadow {
            database: "shop".into(),
            targets: pair.targets.clone(),
            reads: Reads {
                shadow_percent: 100.0,
                ..reads
            },
            control: watching,
            cuts: cuts.clone(),
            log: log.clone(),
        });
        let login = Arc::new(Login {
            user: "app".into(),
            proof: Proof::Password(Secret::new(PASSWORD)),
            parameters: Parameters::default(),
            version: Version::V3_0,
        });
        let session = login_to(&pair.targets.legacy, &login).await;
        let shadows = Self {
            sink,
            tasks,
            log,
            cuts,
            login,
            session,
            control,
            log_path: log_path.to_owned(),
        };
        shadows.catalog_read().await;
        shadows
    }

    /// After DDL: until the catalog has been read again.
    async fn catalog_read(&self) {
        let before = self.sink.catalog();
        self.sink.schema_changed();
        while Arc::ptr_eq(&before, &self.sink.catalog()) || self.sink.catalog().primary.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Asks the primary as a session would, with a digest of the answer.
    async fn ask(&mut self, sql: &str, call: Call) -> ShadowRead {
        let mut request = Vec::new();
        match &call {
            Call::Simple => frontend::put_query(&mut request, sql.as_bytes()),
            Call::Extended { parameter_types, bind } => {
                frontend::put_parse(&mut request, b"", sql.as_bytes(), parameter_types);
                pgtandem::wire::put_frame(&mut request, b'B', |out| {
                    out.extend_from_slice(&[0, 0]);
                    out.extend_from_slice(bind);
                });
                frontend::put_describe_portal(&mut request, b"");
                frontend::put_execute(&mut request, b"");
                request.extend_from_slice(frontend::SYNC);
            }
            Call::Prepared { prepare, execute, .. } => {
                frontend::put_query(&mut request, prepare);
                frontend::put_query(&mut request, execute);
                frontend::put_query(&mut request, b"deallocate p");
            }
        }
        self.session.stream.write_all(&request).await.unwrap();
        let prepared = matches!(call, Call::Prepared { .. });
        let answers = if prepared { 3 } else { 1 };
        let mut answer = Vec::new();
        while frames(&answer).filter(|(kind, _)| *kind == b'Z').count() < answers {
            assert_ne!(self.session.stream.read_some(&mut answer).await.unwrap(), 0);
        }
        let mut builder = DigestBuilder::default();
        let ours = frames(&answer).scan(0, |answered, (kind, body)| {
            *answered += usize::from(kind == b'Z');
            Some((*answered, kind, body))
        });
        // Of PREPARE, EXECUTE, DEALLOCATE the one in the middle.
        ours.filter(|&(answered, kind, _)| kind != b'Z' && answered == usize::from(prepared))
            .for_each(|(_, kind, body)| builder.frame(kind, body));
        ShadowRead {
            control: DUAL_READ,
            login: self.login.clone(),
            settings: Arc::new([]),
            text: Bytes::copy_from_slice(sql.as_bytes()),
            analysis: Arc::new(analyze(sql.as_bytes())).into(),
            call,
            digest: builder.finish(),
            timing: Timing {
                first_row: None,
                total: Duration::from_millis(1),
            },
            canary: false,
        }
    }

    fn wants(&self, sql: &str) -> bool {
        let asked = Asked {
            database: "shop",
            user: "app",
            application: &std::sync::Mutex::default(),
            text: sql.as_bytes(),
            values: &[],
        };
        let script: Script = analyze(sql.as_bytes());
        self.sink.is_on(DUAL_READ)
            && self.sink.samples(&asked)
            && self.sink.wants(&Candidate {
                script: Some(&script),
                text: sql.as_bytes(),
                arguments: None,
                after_write: false,
                temporary: &[],
                settings_known: true,
            })
    }

    async fn settled(&self) -> ShadowStats {
        while self.sink.stats().waiting > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.log.flushed().await;
        self.sink.stats()
    }

    /// What becomes of one read: the counters it moved, and its lines in the log.
    async fn judge(&mut self, read: ShadowRead) -> (Vec<String>, Vec<Mismatch>) {
        let before = self.settled().await;
        let logged = self.log_lines().len();
        self.sink.offer(read);
        let after = self.settled().await;
        (moved(&before, &after), self.log_lines().split_off(logged))
    }

    fn log_lines(&self) -> Vec<Mismatch> {
        let contents = read_log(&self.log_path, &Filter::default()).unwrap();
        assert_eq!(contents.unreadable_lines, 0);
        contents.mismatches
    }

    async fn check(&mut self, sql: &str, expected: &str) -> Vec<Mismatch> {
        assert!(self.wants(sql), "{sql} is wanted: {:?}", self.sink.stats());
        let read = self.ask(sql, Call::Simple).await;
        let (outcome, lines) = self.judge(read).await;
        let shown = match lines.first() {
            Some(line) => format!("{}: {}", outcome.join(" "), line.kind.as_str()),
            None => outcome.join(" "),
        };
        assert_eq!(shown, expected, "{sql}");
        lines
    }
}

fn moved(before: &ShadowStats, after: &ShadowStats) -> Vec<String> {
    let value = |stats: &ShadowStats| serde_json::to_value(stats).unwrap();
    let (before, after) = (value(before), value(after));
    let mut moved = Vec::new();
    for (name, now) in after.as_object().unwrap() {
        let then = &before[name];
        if now == then || name == "executions" || name == "compared" {
            continue;
        }
        match now.as_object() {
            None => moved.push(name.clone()),
            Some(reasons) => moved.extend(
                reasons
                    .iter()
                    .filter(|(reason, count)| then.get(reason.as_str()) != Some(count))
                    .map(|(reason, _)| format!("{name}.{reason}")),
            ),
        }
    }
    moved
}

async fn login_to(target: &Target, as_whom: &Login) -> Backend {
    login(target, as_whom).await.unwrap()
}

fn parameters(values: &[&str], result_format: u16) -> Bytes {
    let mut bind = vec![0, 0];
    bind.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
    for value in values {
        bind.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
        bind.extend_from_slice(value.as_bytes());
    }
    bind.extend_from_slice(&[0, 1]);
    bind.extend_from_slice(&result_format.to_be_bytes());
    bind.into()
}

#[tokio::test]
async fn every_planted_difference_is_found_and_nothing_else() {
    let pair = Pair::start().await;
    assert!(pair.legacy.major < pair.new.major);
    pair.both(
        "create table item (id int primary key, name text, price numeric);
         insert into item select n, 'item ' || n, n * 1.5 from generate_series(1, 100) n;
         create view cheap as select * from item where price < 10;
         create view recent as select *, now() as seen from item;
         create sequence s;
         create schema other; create table other.only_by_path (a int); insert into other.only_by_path values (1);
         grant usage on schema other to app; grant select on other.only_by_path to app;
         create function noisy() returns text stable language sql as 'select clock_timestamp()::text'",
    )
    .await;
    // Types of one name get other OIDs, the labels another order.
    pair.secondary
        .batch_execute("create type filler as enum ('x'); create type filler2 as enum ('x')")
        .await
        .unwrap();
    pair.primary
        .batch_execute("create type mood as enum ('sad', 'glad'); create type lonely as enum ('x')")
        .await
        .unwrap();
    pair.secondary
        .batch_execute("create type mood as enum ('glad', 'sad')")
        .await
        .unwrap();
    pair.both("create table person (name text, mood mood); insert into person values ('a', 'sad'), ('b', 'glad')")
        .await;
    let path = pair.log_path();
    let mut shadows = Shadows::start(&pair, &path, Reads::default()).await;

    // Equal.
    for sql in [
        "select * from item",
        "select * from item order by id",
        "select count(*), sum(price) from cheap",
        "select 1 / (id - 1) from item",
        "select nothing from item",
        "select * from item where id = 1 limit 1",
    ] {
        shadows.check(sql, "matched").await;
    }

    // Planted differences.
    pair.secondary
        .batch_execute("update item set name = 'top secret' where id = 7")
        .await
        .unwrap();
    let lines = shadows
        .check("select * from item where id < 10", "mismatched: value")
        .await;
    let line = &lines[0];
    assert_eq!((line.rows.primary, line.rows.secondary), (9, 9));
    assert_eq!(
        (line.database.as_str(), line.user.as_str(), line.primary),
        ("shop", "app", Side::Legacy)
    );
    assert_eq!(line.statement, "select * from item where id < ?");
    assert_eq!((line.first_rows.primary.len(), line.first_rows.secondary.len()), (1, 1));
    // The key column is equal on both sides, and recognisably so; the name is not.
    assert_eq!(line.first_rows.primary[0][0], line.first_rows.secondary[0][0]);
    assert_ne!(line.first_rows.primary[0][1], line.first_rows.secondary[0][1]);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("top secret") && !text.contains("item 7"), "{text}");
    shadows
        .check("select name from item where id = 7", "mismatched: value")
        .await;
    // LIMIT leaves open which rows come, but not which there are.
    shadows
        .check("select name from item where id = 7 limit 1", "mismatched: value")
        .await;
    shadows
        .check(
            "select name from item where id = 7 order by id limit 1",
            "mismatched: value",
        )
        .await;
    shadows.check("select * from item where id > 10", "matched").await;
    pair.secondary
        .batch_execute("update item set name = 'item 7' where id = 7")
        .await
        .unwrap();

    pair.secondary
        .batch_execute("delete from item where id = 8")
        .await
        .unwrap();
    let lines = shadows.check("select * from item", "mismatched: missing_row").await;
    assert_eq!((lines[0].rows.primary, lines[0].rows.secondary), (100, 99));
    shadows
        .check("select id from item order by id limit 9", "mismatched: missing_row")
        .await;
    pair.secondary
        .batch_execute("insert into item values (8, 'item 8', 12.0), (0, 'zero', 0)")
        .await
        .unwrap();
    shadows
        .check("select * from item order by id", "mismatched: extra_row")
        .await;
    let lines = shadows.check("select 1 / id from item", "mismatched: error").await;
    assert_eq!(lines[0].error.secondary.as_deref(), Some("22012"));
    assert_eq!(lines[0].error.primary, None);
    pair.secondary
        .batch_execute("delete from item where id = 0")
        .await
        .unwrap();

    shadows.check("select name, mood from person", "matched").await;
    shadows
        .check("select name, mood from person order by mood", "mismatched: order")
        .await;
    shadows.check("select mood from person order by name", "matched").await;

    pair.secondary
        .batch_execute("alter table other.only_by_path alter a type bigint")
        .await
        .unwrap();
    shadows
        .check("select a from other.only_by_path", "mismatched: type")
        .await;
    shadows.check("select from other.only_by_path", "matched").await;
    pair.secondary
        .batch_execute("alter table other.only_by_path alter a type int")
        .await
        .unwrap();
    shadows.check("select a from other.only_by_path", "matched").await;

    // Rows that lie in another order on disk are equal, and ties may come in any order.
    pair.secondary
        .batch_execute(
            "begin; update item set price = price where id % 3 = 0; delete from item where id = 50;
                        insert into item values (50, 'item 50', 75.0); commit",
        )
        .await
        .unwrap();
    shadows.check("select * from item", "matched").await;
    let before = shadows.sink.stats().counts.order_ties;
    shadows
        .check(
            "select id, id % 3 as third from item order by third",
            "matched order_ties",
        )
        .await;
    assert_eq!(shadows.sink.stats().counts.order_ties, before + 1);
    shadows
        .check("select id from item limit 5", "matched partly.limit_without_order")
        .await;
    shadows
        .check(
            "select array_agg(id) from item",
            "matched partly.order_dependent_function",
        )
        .await;

    // A primary that disagrees with itself.
    shadows.catalog_read().await;
    shadows
        .check("select noisy()", "not_comparable.non_deterministic")
        .await;
    let report = shadows.sink.report(2.0);
    let noisy: Vec<_> = report.fingerprints.iter().filter(|one| one.noise.rate > 0.0).collect();
    assert_eq!((noisy.len(), noisy[0].text.as_str()), (1, "select noisy()"));
    assert_eq!((noisy[0].noise.asked_twice, noisy[0].noise.disagreed), (1, 1));

    // Different only for a moment.
    let read = shadows.ask("select price from item where id = 1", Call::Simple).await;
    pair.both("update item set price = 99 where id = 1").await;
    assert_eq!(shadows.judge(read).await.0, ["transient"]);

    // Never asked at all.
    for sql in [
        "select * from recent",
        "select now()",
        "select nextval('s')",
        "select * from pg_class",
        "select * from item for update",
        "insert into item values (1000)",
        "select 1; select 2",
        "select a from t where b between symmetric 1 and 2",
    ] {
        assert!(!shadows.wants(sql), "{sql}");
    }
    let reasons = shadows.sink.stats().counts.not_comparable;
    for reason in [
        "clock",
        "volatile_function",
        "server_specific",
        "locking",
        "several_statements",
        "not_understood",
    ] {
        assert!(reasons.contains_key(reason), "{reason}: {reasons:?}");
    }

    // Asked all the same, a shadow cannot write, and runs as the client's user.
    let read = shadows.ask("select nextval('s')", Call::Simple).await;
    assert_eq!(shadows.judge(read).await.0, ["not_comparable.volatile_function"]);
    let read = shadows.ask("select current_user, session_user", Call::Simple).await;
    assert_eq!(shadows.judge(read).await.0, ["matched"]);
    let read = shadows
        .ask("select current_setting('transaction_read_only')", Call::Simple)
        .await;
    assert_eq!(shadows.judge(read).await.0, ["transient"]);

    // With the session's settings.
    let mut read = shadows.ask("select 1 as a", Call::Simple).await;
    read.text = Bytes::from_static(b"select a from only_by_path");
    read.settings = Arc::new([Bytes::from_static(b"set search_path = other")]);
    assert_eq!(shadows.judge(read).await.0, ["matched"]);

    // The extended protocol: parameters, binary results, types of other OIDs.
    for (value, result_format) in [("7", 0), ("7", 1)] {
        let call = Call::Extended {
            parameter_types: Bytes::new(),
            bind: parameters(&[value], result_format),
        };
        let read = shadows.ask("select id, name from item where id = $1", call).await;
        assert_eq!(shadows.judge(read).await.0, ["matched"]);
    }
    let oid = |name: &'static str| {
        let primary = &pair.primary;
        async move {
            let row = primary
                .query_one("select oid from pg_type where typname = $1", &[&name])
                .await
                .unwrap();
            Bytes::copy_from_slice(&row.get::<_, u32>(0).to_be_bytes())
        }
    };
    let call = |parameter_types, value| Call::Extended {
        parameter_types,
        bind: parameters(&[value], 0),
    };
    let read = shadows
        .ask(
            "select name from person where mood = $1",
            call(oid("mood").await, "sad"),
        )
        .await;
    assert_eq!(shadows.judge(read).await.0, ["matched"]);
    let read = shadows.ask("select $1", call(oid("lonely").await, "x")).await;
    assert_eq!(shadows.judge(read).await.0, ["not_comparable.parameter_type"]);
    pair.secondary
        .batch_execute("update item set name = 'other' where id = 7")
        .await
        .unwrap();
    let read = shadows
        .ask("select id, name from item where id = $1", call(Bytes::new(), "7"))
        .await;
    let (outcome, lines) = shadows.judge(read).await;
    assert_eq!(
        (outcome, lines[0].kind.as_str()),
        (vec!["mismatched".to_owned()], "value")
    );

    // After a flip, reads of before are not compared.
    let read = shadows.ask("select 1", Call::Simple).await;
    shadows.control.send_replace(Control {
        phase: Phase::Switchover,
        primary: Side::New,
        epoch: Epoch::FIRST.next(),
    });
    assert_eq!(shadows.judge(read).await.0, ["skipped.flip"]);

    let Shadows { sink, tasks, .. } = shadows;
    drop(sink);
    tasks.worker.await.unwrap();
}

/// A rewritten table is empty in a snapshot taken before.
#[tokio::test]
async fn a_schema_migration_after_the_cut_makes_no_mismatch() {
    let pair = Pair::start().await;
    pair.both("create table t (a int); insert into t values (1)").await;
    let mut shadows = Shadows::start(&pair, &pair.log_path(), Reads::default()).await;
    let read = shadows.ask("select * from t", Call::Simple).await;
    pair.both("update t set a = 2").await;
    let rewrites = ["alter table t set unlogged", "alter table t set logged"];

    shadows.cuts.after_cut.lock().await.push_back(rewrites[0]);
    assert_eq!(shadows.judge(read.clone()).await.0, ["transient"]);
    // What is different at the next cut is told all the same.
    pair.secondary.batch_execute("update t set a = 3").await.unwrap();
    shadows.cuts.after_cut.lock().await.push_back(rewrites[1]);
    assert_eq!(shadows.judge(read.clone()).await.0, ["mismatched"]);
    // No cut without a migration right after it.
    shadows
        .cuts
        .after_cut
        .lock()
        .await
        .extend(rewrites.iter().cycle().take(5).copied());
    assert_eq!(shadows.judge(read).await.0, ["failed.no_cut"]);
}

#[tokio::test]
async fn nobody_waits_for_a_shadow() {
    let mut pair = Pair::start().await;
    pair.both("create table t (a int); insert into t values (1)").await;
    {
        let limits = Reads {
            shadow_queue: 2,
            shadow_max_concurrency: 1,
            shadow_timeout: Duration::from_secs(1),
            ..Reads::default()
        };
        let nowhere = pair.directory.path().join("no such directory/mismatches.jsonl");
        let mut shadows = Shadows::start(&pair, &nowhere, limits).await;

        // The applier hangs: the queue fills up, what does not fit is dropped and counted.
        let held = shadows.cuts.clone();
        let permit = held.gate.acquire().await.unwrap();
        let read = shadows.ask("select * from t", Call::Simple).await;
        for _ in 0..100 {
            shadows.sink.offer(read.clone());
        }
        let dropped = shadows.sink.stats().counts.dropped["queue_full"];
        assert!((96..=98).contains(&dropped), "{dropped}");
        drop(permit);
        let stats = shadows.settled().await;
        assert_eq!(stats.counts.matched + stats.counts.dropped["queue_full"], 100);

        // Too large for the queue.
        let mut large = read.clone();
        large.text = Bytes::from(vec![b' '; 2 * 1024 * 1024]);
        shadows.sink.offer(large);
        assert_eq!(shadows.sink.stats().counts.dropped["too_large"], 1);

        // No sampling, no work.
        let percent = |shadow_percent| Reads {
            shadow_percent,
            ..Reads::default()
        };
        shadows.sink.configure(&percent(0.0));
        assert!(!shadows.wants("select * from t") && !shadows.sink.is_on(DUAL_READ));
        shadows.sink.configure(&percent(100.0));
        assert!(shadows.sink.is_on(DUAL_READ));

        // A log that cannot be written: counted, and reads go on.
        pair.secondary.batch_execute("update t set a = 2").await.unwrap();
        shadows.sink.offer(read.clone());
        let stats = shadows.settled().await;
        assert_eq!((stats.counts.mismatched, stats.log_lost), (1, 1));

        // Too slow on the secondary.
        let slow = "select count(*) from generate_series(1, 20) a";
        let mut read = shadows.ask(slow, Call::Simple).await;
        read.text = Bytes::from_static(b"select count(*) from generate_series(1, 1000000000) a");
        assert_eq!(shadows.judge(read).await.0, ["failed.timeout"]);
    }
    // The secondary is away.
    pair.new.stop("fast").unwrap();
    let nowhere = pair.log_path();
    let (control, watching) = watch::channel(DUAL_READ);
    let (log, _writer) = MismatchLog::open(nowhere, ValueWriter::new(LoggedValues::Hashed));
    let (sink, _tasks) = pgtandem::shadow::spawn(Shadow {
        database: "shop".into(),
        targets: pair.targets.clone(),
        reads: Reads {
            shadow_percent: 100.0,
            ..Reads::default()
        },
        control: watching,
        cuts: Arc::new(StaticCuts {
            primary: pair.targets.legacy.clone(),
            rounds: AtomicU64::new(1),
            gate: Semaphore::new(1),
            after_cut: Mutex::default(),
        }),
        log,
    });
    sink.offer(ShadowRead {
        control: DUAL_READ,
        login: Arc::new(Login {
            user: "app".into(),
            proof: Proof::Password(Secret::new(PASSWORD)),
            parameters: Parameters::default(),
            version: Version::V3_0,
        }),
        settings: Arc::new([]),
        text: Bytes::from_static(b"select 1"),
        analysis: Arc::new(analyze(b"select 1")).into(),
        call: Call::Simple,
        digest: DigestBuilder::default().finish(),
        timing: Timing::default(),
        canary: false,
    });
    while sink.stats().waiting > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(sink.stats().counts.failed["connection"], 1);
    drop(control);
}
