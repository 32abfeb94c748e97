//! Switchovers with two proxies: many in a row, rehearsed, and with whoever takes part killed or
//! cut off at each step.
//!
//! Steps are stopped at from outside: every transition is recorded before it takes effect, and a
//! trigger on that record waits for a lock that the test holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pgtandem::admin::api::{Flip, History, Status, SwitchoverAnswer, SwitchoverRequest};
use pgtandem::admin::client::{AdminClient, AdminError};
use pgtandem::config::Admin;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;
use pgtandem::switchover::{Kind, Step};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::Client;

use crate::another::Another;
use crate::processes;
use crate::rig::storm::Storm;
use crate::rig::{APP, DATABASE, connect};
use crate::stage::{Stage, seed, setting};

/// A pair with a relay before new, and two proxies.
pub(crate) struct Fleet {
    pub(crate) stage: Stage,
    pub(crate) other: Another,
}

impl Fleet {
    pub(crate) async fn set() -> Self {
        Self::with("").await
    }

    pub(crate) async fn with(extra: &str) -> Self {
        let stage = Stage::set_with(Phase::DualRead, extra).await;
        let other = Another::beside(&stage.rig, Phase::DualRead).await;
        let fleet = Self { stage, other };
        fleet.both_registered().await;
        fleet.stage.rig.wait_caught_up().await;
        fleet
    }

    async fn both_registered(&self) {
        let seen = |status: &Status| status.proxies.iter().filter(|proxy| proxy.silent_seconds < 4.0).count() == 2;
        self.stage.rig.until(seen).await;
        self.other.until(&self.stage.rig, seen).await;
    }

    /// Through both proxies.
    pub(crate) async fn storm(&mut self, reconnect: bool) -> Storm {
        let urls = vec![self.stage.rig.url(), self.other.url()];
        self.stage
            .storm(|weather| {
                weather.urls = urls;
                weather.workers = 4;
                weather.reconnect = reconnect;
            })
            .await
    }

    /// What was killed has recovered, as far as gates measure it; under a storm, at some moment.
    pub(crate) async fn gates_open(&self) {
        let open = |status: &Status| !status.gates.is_empty() && status.gates.iter().all(|gate| gate.open);
        self.stage.rig.until(open).await;
    }

    /// Both proxies serve clients on the same side, which one of the databases calls the primary.
    pub(crate) async fn agree(&self) -> (Side, u64) {
        let primary_of = async |status: Result<Status, AdminError>| status.ok().map(|s| (s.primary, s.epoch.0));
        for _ in 0..2400 {
            let one = primary_of(self.stage.rig.status().await).await;
            let two = primary_of(self.other.status().await).await;
            if let Some((side, epoch)) = one
                && one == two
            {
                let recorded = self.recorded().await;
                let expected = match side {
                    Side::Legacy => [Some((0, epoch)), None],
                    Side::New => [None, Some((0, epoch))],
                };
                let primaries = recorded.map(|role| role.filter(|(role, _)| *role == 0));
                if primaries == expected {
                    return (side, epoch);
                }
                assert!(
                    primaries.iter().flatten().count() <= 1,
                    "two sides are primary: {recorded:?}"
                );
            }
            sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "the proxies never agree: {:?} {:?}, recorded {:?}\n{}\n--- the other\n{}",
            self.stage.rig.status().await.map(|s| (s.primary, s.epoch)),
            self.other.status().await.map(|s| (s.primary, s.epoch)),
            self.recorded().await,
            self.stage.rig.log(),
            self.other.log()
        );
    }

    /// Role and epoch as each side's sequence holds them.
    async fn recorded(&self) -> [Option<(u64, u64)>; 2] {
        let mut recorded = [None, None];
        for side in [Side::Legacy, Side::New] {
            let Ok(client) = connect(&self.stage.rig.server(side).url(SUPERUSER, DATABASE)).await else {
                continue;
            };
            let sql = "SELECT pg_sequence_last_value('pgtandem.state'::regclass)";
            if let Ok(row) = client.query_one(sql, &[]).await {
                let state = u64::try_from(row.get::<_, i64>(0)).unwrap();
                recorded[side as usize] = Some(((state >> 2) & 7, state >> 8));
            }
        }
        recorded
    }

    /// Flips there by the ordinary way, where it is not so.
    async fn be_on(&self, side: Side) {
        let (primary, epoch) = self.agree().await;
        if primary != side {
            self.gates_open().await;
            let back = switchover(self.stage.rig.admin_port, side, false).await;
            back.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
            assert_eq!(self.agree().await, (side, epoch + 1));
        }
    }

    /// The flip has come as far as the fence, which waits for a writer.
    pub(crate) async fn waits_for_the_fence(&self, flip: &JoinHandle<Result<Flip, AdminError>>) {
        let sql = "SELECT EXISTS (SELECT FROM pgtandem.flip WHERE step = 'fencing')";
        while self.stage.rig.value(Side::Legacy, sql).await != "true" {
            assert!(!flip.is_finished(), "it ended before\n{}", self.logs());
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn logs(&self) -> String {
        format!("{}\n--- the other\n{}", self.stage.rig.log(), self.other.log())
    }

    /// Nothing is lost on either side, and both are alike.
    pub(crate) async fn assert_exact(&self) {
        self.both_registered().await;
        // Sequences are exact for whoever asks the one that applies.
        self.stage.rig.wait_caught_up().await;
        self.other.wait_caught_up().await;
        self.stage.rig.assert_equal().await;
        for side in [Side::Legacy, Side::New] {
            let client = self.stage.rig.direct(side, APP).await;
            self.stage.ledger.assert_kept(&client).await;
            self.stage.ledger.assert_no_phantoms(&client).await;
        }
        assert!(
            self.stage.ledger.failures.is_empty(),
            "{:?}\n{}",
            self.stage.ledger.failures,
            self.logs()
        );
    }
}

fn admin(port: u16) -> AdminClient {
    AdminClient::new(&Admin {
        address: ([127, 0, 0, 1], port).into(),
        token: None,
    })
}

pub(crate) async fn switchover(port: u16, to: Side, rehearse: bool) -> Result<Flip, AdminError> {
    let request = SwitchoverRequest {
        to: Some(to),
        dry_run: false,
        rehearse,
        force: None,
        by: None,
    };
    let answer: SwitchoverAnswer = admin(port).post("/api/v1/switchover", &request).await?;
    answer
        .flip
        .ok_or_else(|| AdminError::Refused(format!("a gate is closed: {:?}", answer.gates)))
}

pub(crate) async fn history(port: u16) -> Vec<Flip> {
    let history: History = admin(port).get("/api/v1/switchover").await.unwrap();
    history.flips
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_flips_there_and_back_under_a_storm() {
    let mut fleet = Fleet::set().await;
    let mut held = Vec::new();
    for round in 0..20 {
        let to = if round % 2 == 0 { Side::New } else { Side::Legacy };
        // Each of the two leads both ways.
        let port = match round / 2 % 2 {
            0 => fleet.stage.rig.admin_port,
            _ => fleet.other.admin_port(),
        };
        let storm = fleet.storm(false).await;
        storm.everybody_commits(3).await;
        let flip = switchover(port, to, false).await;
        let flip = flip.unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
        assert_eq!((flip.outcome.as_str(), flip.sessions_ended), ("done", 0), "{flip:?}");
        assert_eq!(flip.fenced_out, Vec::<String>::new());
        held.push(flip.held_ms);
        storm.everybody_commits(3).await;
        fleet.stage.end(storm).await;
        assert_eq!(fleet.agree().await, (to, round + 2));
        fleet.assert_exact().await;
    }
    held.sort_by(f64::total_cmp);
    eprintln!("held for {:.0} ms in the median, {:.0} at worst", held[10], held[19]);
    let told = history(fleet.other.admin_port()).await;
    assert_eq!(told.len(), 20);
    assert!(told.iter().all(|flip| flip.outcome == "done" && flip.held_ms > 0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rehearsal_changes_nothing_and_names_what_would_be_in_the_way() {
    let mut fleet = Fleet::with("switchover: { drain_timeout: 400ms }").await;
    let storm = fleet.storm(false).await;
    storm.everybody_commits(3).await;
    let temporary = connect(&fleet.other.url()).await.unwrap();
    temporary
        .batch_execute("SET application_name = 'reports'; CREATE TEMP TABLE t ()")
        .await
        .unwrap();
    let flip = switchover(fleet.stage.rig.admin_port, Side::New, true).await;
    let flip = flip.unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    assert_eq!((flip.kind, flip.outcome.as_str()), (Kind::Rehearsal, "rehearsed"));
    assert_eq!(
        flip.by.as_deref(),
        Some("admin API from 127.0.0.1"),
        "who asked did not say"
    );
    let steps: Vec<Step> = flip.steps.iter().map(|step| step.name).collect();
    assert_eq!(
        steps,
        [
            Step::Preparing,
            Step::Probing,
            Step::Holding,
            Step::Fencing,
            Step::Draining,
            Step::Aborted
        ]
    );
    assert!(flip.held_ms > 0.0);
    assert_eq!(flip.in_the_way.len(), 1, "{flip:?}");
    assert!(flip.in_the_way[0].reason.contains("temporary tables"), "{flip:?}");
    assert_eq!(fleet.agree().await, (Side::Legacy, 1));
    // The session in the way has noticed nothing.
    temporary.batch_execute("SELECT * FROM t").await.unwrap();
    storm.everybody_commits(3).await;
    fleet.stage.end(storm).await;

    // An open transaction: everything resumes, and it is named.
    let open = fleet.stage.rig.client().await;
    open.batch_execute("BEGIN; INSERT INTO jobs DEFAULT VALUES")
        .await
        .unwrap();
    let text = fleet
        .stage
        .rig
        .check(&["switchover", "--rehearse"], 1, "still had a transaction open");
    assert!(text.contains("not rehearsed"), "{text}");
    open.batch_execute("COMMIT").await.unwrap();
    let told = history(fleet.other.admin_port()).await;
    assert_eq!(told.len(), 2);
    assert!(told[0].outcome.starts_with("abandoned"), "{:?}", told[0]);
    // A real one is refused for the temporary table, and one that passes the gate by force before
    // anybody is held.
    fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 1, "temporary tables");
    let forced = ["switchover", "--to", "new", "--force", "--reason", "to see"];
    fleet.stage.rig.check(&forced, 1, "temporary tables");
    let told = history(fleet.stage.rig.admin_port).await;
    assert_eq!(told[0].held_ms, 0.0, "{:?}", told[0]);
    let text = fleet
        .stage
        .rig
        .check(&["switchover", "--history"], 0, "rehearsal of a switchover to new");
    assert!(text.contains("in the way: app"), "{text}");
    // The last attempt's failure is still told.
    fleet.stage.rig.check(&["status"], 1, "proxies");
    fleet.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stragglers_are_ended_where_the_operator_says_so() {
    let fleet = Fleet::with("switchover: { drain_timeout: 300ms, stragglers: end }").await;
    let open = connect(&fleet.other.url()).await.unwrap();
    open.batch_execute("BEGIN; INSERT INTO jobs DEFAULT VALUES")
        .await
        .unwrap();
    let temporary = fleet.stage.rig.client().await;
    temporary.batch_execute("CREATE TEMP TABLE t ()").await.unwrap();
    let idle = connect(&fleet.other.url()).await.unwrap();
    idle.batch_execute("SELECT 1").await.unwrap();
    let flip = switchover(fleet.stage.rig.admin_port, Side::New, false).await;
    let flip = flip.unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    assert_eq!((flip.outcome.as_str(), flip.sessions_ended), ("done", 2), "{flip:?}");
    for (client, says) in [(&open, "drain_timeout"), (&temporary, "temporary tables")] {
        let error = client.batch_execute("SELECT 1").await.unwrap_err();
        let error = error
            .as_db_error()
            .map(|error| (error.code().code().to_owned(), error.message().to_owned()));
        // The driver may have dropped the FATAL that came unasked.
        if let Some((sqlstate, message)) = error {
            assert_eq!(sqlstate, "57P01");
            assert!(message.contains(says), "{message}");
        }
        assert!(client.is_closed());
    }
    idle.batch_execute("INSERT INTO jobs DEFAULT VALUES").await.unwrap();
    fleet.agree().await;
    fleet.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_was_cut_off_cannot_write_under_the_old_epoch() {
    let fleet = Fleet::set().await;
    let client = connect(&fleet.other.url()).await.unwrap();
    client
        .batch_execute("INSERT INTO notes (note) VALUES ('late')")
        .await
        .unwrap();
    let paused = processes::pause(fleet.other.pid());
    let flip = switchover(fleet.stage.rig.admin_port, Side::New, false).await;
    let flip = flip.unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    assert_eq!(flip.outcome, "done");
    let cut_off = format!("pid {} on ", fleet.other.pid());
    assert!(
        flip.fenced_out.iter().any(|name| name.starts_with(&cut_off)),
        "{flip:?}"
    );
    // What it sends first on its return is of the old epoch.
    let notes = "SELECT count(*) FROM notes";
    let before = fleet.stage.rig.value(Side::Legacy, notes).await;
    let late = tokio::spawn(async move { client.batch_execute("INSERT INTO notes (note) VALUES ('late')").await });
    sleep(Duration::from_millis(200)).await;
    drop(paused);
    let answer = late.await.unwrap();
    if let Err(error) = &answer {
        let code = error.code().map(|code| code.code().to_owned());
        assert!(matches!(code.as_deref(), Some("25006" | "57P01") | None), "{error:?}");
    }
    assert_eq!(fleet.agree().await, (Side::New, 2));
    fleet.assert_exact().await;
    let expected: i64 = before.parse::<i64>().unwrap() + i64::from(answer.is_ok());
    assert_eq!(fleet.stage.rig.value(Side::New, notes).await, expected.to_string());
    // It serves again.
    let client = connect(&fleet.other.url()).await.unwrap();
    client
        .batch_execute("INSERT INTO notes (note) VALUES ('late')")
        .await
        .unwrap();
    fleet.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flip_where_the_reverse_direction_would_not_work() {
    let fleet = Fleet::set().await;
    let new = fleet.stage.rig.direct(Side::New, SUPERUSER).await;
    new.batch_execute("CREATE FUNCTION pgtandem.broken() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        .await
        .unwrap();
    for slot in 0..3 {
        new.batch_execute(&format!(
            "CREATE TRIGGER broken BEFORE INSERT ON pgtandem.change_{slot} FOR EACH ROW EXECUTE FUNCTION pgtandem.broken()"
        ))
        .await
        .unwrap();
    }
    let text = fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 1, "the reverse direction does not work");
    assert!(text.contains("0 times"), "{text}");
    assert_eq!(fleet.agree().await, (Side::Legacy, 1));
    new.batch_execute("DROP FUNCTION pgtandem.broken CASCADE")
        .await
        .unwrap();
    fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 0, "switchover to new");
    fleet.agree().await;
    fleet.assert_exact().await;
}

/// A writer past the proxies, in the middle of a transaction when the fence comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_at_the_fence_is_waited_for_and_named() {
    let fleet = Fleet::with("switchover: { drain_timeout: 400ms }").await;
    let direct = fleet.stage.rig.direct(Side::Legacy, APP).await;
    direct
        .batch_execute("SET application_name = 'nightly'; BEGIN; INSERT INTO notes (note) VALUES ('open')")
        .await
        .unwrap();
    let text = fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 1, "writers were still in flight");
    assert!(text.contains("app, nightly, idle in transaction"), "{text}");
    assert_eq!(fleet.agree().await, (Side::Legacy, 1));
    // Everybody goes on, through both proxies.
    for url in [fleet.stage.rig.url(), fleet.other.url()] {
        let client = connect(&url).await.unwrap();
        client
            .batch_execute("INSERT INTO notes (note) VALUES ('after')")
            .await
            .unwrap();
    }
    direct.batch_execute("COMMIT").await.unwrap();
    fleet.assert_exact().await;
    // One that commits at the last moment is on the other side, too.
    direct
        .batch_execute("BEGIN; INSERT INTO notes (note) VALUES ('late')")
        .await
        .unwrap();
    let port = fleet.stage.rig.admin_port;
    let flip = tokio::spawn(async move { switchover(port, Side::New, false).await });
    fleet.waits_for_the_fence(&flip).await;
    direct.batch_execute("COMMIT").await.unwrap();
    flip.await.unwrap().unwrap();
    let refused = direct
        .batch_execute("INSERT INTO notes (note) VALUES ('stray')")
        .await
        .unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "25006");
    assert_eq!(fleet.agree().await, (Side::New, 2));
    fleet.assert_exact().await;
    let notes = fleet.stage.rig.value(Side::New, "SELECT count(*) FROM notes").await;
    assert_eq!(notes, "4");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn complete_is_asked_for_twice_and_holds_for_every_proxy() {
    let fleet = Fleet::set().await;
    fleet.stage.rig.check(&["complete"], 1, "switch over first");
    fleet
        .stage
        .rig
        .check(&["switchover", "--to", "new"], 0, "switchover to new");
    fleet.agree().await;
    fleet.stage.rig.check(&["complete"], 1, "Repeat it with --yes");
    fleet.stage.rig.check(&["complete", "--yes"], 0, "switch it off");
    fleet
        .other
        .until(&fleet.stage.rig, |status| status.phase == Phase::Complete)
        .await;
    let installed = "SELECT to_regclass('pgtandem.state') IS NOT NULL";
    for side in [Side::Legacy, Side::New] {
        assert_eq!(fleet.stage.rig.value(side, installed).await, "false", "{side}");
    }
    for url in [fleet.stage.rig.url(), fleet.other.url()] {
        let client = connect(&url).await.unwrap();
        client
            .batch_execute("INSERT INTO notes (note) VALUES ('after')")
            .await
            .unwrap();
    }
    let notes = "SELECT count(*) FROM notes";
    assert_eq!(fleet.stage.rig.value(Side::New, notes).await, "2");
    assert_eq!(fleet.stage.rig.value(Side::Legacy, notes).await, "0");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Coordinator,
    /// Stands still, and goes on when the others have ended what it led.
    CoordinatorStopped,
    OtherProxy,
    Primary,
    Secondary,
    /// The network between both proxies and new, whichever of the two that is.
    NewCutOff,
}

const STEPS: [Step; 7] = [
    Step::Preparing,
    Step::Probing,
    Step::Holding,
    Step::Fencing,
    Step::Draining,
    Step::Decided,
    Step::Turned,
];

/// Stops a flip before a step takes effect.
pub(crate) struct Stop {
    holder: Client,
    /// Where the record is that decides: the side that is primary when the flip begins.
    from: Side,
}

impl Stop {
    pub(crate) async fn before(fleet: &Fleet, step: Step, from: Side) -> Self {
        let holder = fleet.stage.rig.direct(from, SUPERUSER).await;
        holder
            .batch_execute(&format!(
                "CREATE OR REPLACE FUNCTION pgtandem.stop_here() RETURNS trigger LANGUAGE plpgsql AS
                   'BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NEW; END';
                 DROP TRIGGER IF EXISTS stop_here ON pgtandem.flip_step;
                 CREATE TRIGGER stop_here BEFORE INSERT ON pgtandem.flip_step FOR EACH ROW
                   WHEN (NEW.step = '{step}') EXECUTE FUNCTION pgtandem.stop_here();
                 SELECT pg_advisory_lock(4711)"
            ))
            .await
            .unwrap();
        Self { holder, from }
    }

    /// Begins a flip and returns when it has come here. A gate may close for a moment, under a storm
    /// and after what was killed before.
    pub(crate) async fn reached_by_flip(&self, fleet: &Fleet) -> JoinHandle<Result<Flip, AdminError>> {
        let (port, to) = (fleet.stage.rig.admin_port, self.from.other());
        let mut flip = tokio::spawn(async move { switchover(port, to, false).await });
        let mut refused = Vec::new();
        while refused.len() < 20 {
            let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted";
            let waiting: i64 = self.holder.query_one(sql, &[]).await.unwrap().get(0);
            if waiting > 0 {
                return flip;
            }
            if flip.is_finished() {
                refused.push(flip.await.unwrap().unwrap_err().to_string());
                fleet.gates_open().await;
                flip = tokio::spawn(async move { switchover(port, to, false).await });
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("{refused:#?}\n{}", fleet.logs());
    }

    /// The server may be gone by now.
    pub(crate) async fn lift(&self) {
        self.holder.batch_execute("SELECT pg_advisory_unlock_all()").await.ok();
    }
}

pub(crate) async fn remove_stop(fleet: &Fleet, from: Side) {
    let client = fleet.stage.rig.direct(from, SUPERUSER).await;
    client
        .batch_execute(
            "DROP TRIGGER IF EXISTS stop_here ON pgtandem.flip_step; DROP FUNCTION IF EXISTS pgtandem.stop_here()",
        )
        .await
        .unwrap();
}

/// Each step of a flip to new, and of the way back. Of the latter two by the seed, unless
/// `PGTANDEM_FLIP_FAULTS=1` asks for all.
fn table(victim: Victim) -> Vec<(Side, Step)> {
    let forth = STEPS.map(|step| (Side::New, step));
    let mut back = STEPS.map(|step| (Side::Legacy, step)).to_vec();
    if setting("PGTANDEM_FLIP_FAULTS", 0) == 0 {
        let mut random = StdRng::seed_from_u64(seed() ^ victim as u64);
        while back.len() > 2 {
            back.remove(random.random_range(0..back.len()));
        }
    }
    forth.into_iter().chain(back).collect()
}

/// Writes on one side directly and, while that transaction is open, on the other: never may both be
/// let.
struct Witness {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Witness {
    fn begin(fleet: &Fleet) -> Self {
        let urls = [Side::Legacy, Side::New].map(|side| fleet.stage.rig.server(side).url(APP, DATABASE));
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, wrote) = (stop.clone(), writes.clone());
        let task = tokio::spawn(async move {
            let mut first = 0;
            while !stopped.load(Relaxed) {
                first = 1 - first;
                let (Ok(one), Ok(two)) = (connect(&urls[first]).await, connect(&urls[1 - first]).await) else {
                    sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let write = "SET statement_timeout = '300ms'; BEGIN; INSERT INTO notes (note) VALUES ('witness')";
                let on_one = one.batch_execute(write).await.is_ok();
                let on_two = on_one && two.batch_execute(write).await.is_ok();
                // The first one's transaction is open, if its server has lived until here.
                let still_open = on_two && one.batch_execute("SELECT 1").await.is_ok();
                assert!(!still_open, "both sides accept writes");
                one.batch_execute("ROLLBACK").await.ok();
                wrote.fetch_add(u64::from(on_one), Relaxed);
                sleep(Duration::from_millis(3)).await;
            }
        });
        Self { stop, writes, task }
    }

    async fn end(self) {
        self.stop.store(true, Relaxed);
        self.task.await.unwrap();
        assert!(self.writes.load(Relaxed) > 0, "it was never let to write");
    }
}

/// Kills the victim at each step of a flip, starts it again, and looks.
async fn killed_at_each_step(victim: Victim) {
    let mut fleet = Fleet::set().await;
    for (to, step) in table(victim) {
        let from = to.other();
        fleet.be_on(from).await;
        let began = tokio::time::Instant::now();
        let witness = Witness::begin(&fleet);
        let storm = fleet.storm(true).await;
        storm.everybody_commits(2).await;
        let (_, epoch) = fleet.agree().await;
        fleet.gates_open().await;
        let stop = Stop::before(&fleet, step, from).await;
        let flip = stop.reached_by_flip(&fleet).await;
        let mut stopped = None;
        match victim {
            Victim::Coordinator => fleet.stage.rig.kill_proxy(),
            Victim::CoordinatorStopped => stopped = Some(processes::pause(fleet.stage.rig.proxy_pid())),
            Victim::OtherProxy => fleet.other.kill(),
            Victim::Primary => processes::kill(fleet.stage.rig.server(from)),
            Victim::Secondary => processes::kill(fleet.stage.rig.server(to)),
            Victim::NewCutOff => fleet.stage.relay.cut(),
        }
        stop.lift().await;
        sleep(Duration::from_millis(100)).await;
        match victim {
            Victim::CoordinatorStopped => {
                // Clients of the other proxy go on without it.
                let client = connect(&fleet.other.url()).await.unwrap();
                client
                    .batch_execute("INSERT INTO notes (note) VALUES ('on')")
                    .await
                    .unwrap();
                drop(stopped);
            }
            Victim::NewCutOff => fleet.stage.relay.calm(),
            Victim::Coordinator => fleet.stage.rig.spawn_proxy(),
            Victim::OtherProxy => fleet.other.spawn(),
            Victim::Primary => fleet.stage.rig.server_mut(from).start_again().unwrap(),
            Victim::Secondary => fleet.stage.rig.server_mut(to).start_again().unwrap(),
        }
        let outcome = flip.await.unwrap();
        let (primary, now) = fleet.agree().await;
        // Old or new, everywhere.
        assert_eq!(
            now,
            if primary == to { epoch + 1 } else { epoch },
            "{victim:?} at {step} to {to}"
        );
        if let Ok(flip) = &outcome {
            assert_eq!(
                (flip.outcome.as_str(), primary),
                ("done", to),
                "{victim:?} at {step} to {to}"
            );
        }
        // Forward once it is decided. A primary that dies is the new one's business only then.
        if step == Step::Turned {
            assert_eq!(primary, to, "{victim:?} at {step} to {to}\n{}", fleet.logs());
        }
        storm.everybody_commits(2).await;
        fleet.stage.end(storm).await;
        witness.end().await;
        remove_stop(&fleet, from).await;
        fleet.assert_exact().await;
        eprintln!(
            "{victim:?} at {step} to {to}: {primary} is primary, after {:?}",
            began.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinator_is_killed_at_each_step() {
    killed_at_each_step(Victim::Coordinator).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinator_stands_still_at_each_step() {
    killed_at_each_step(Victim::CoordinatorStopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_is_cut_off_at_each_step() {
    killed_at_each_step(Victim::NewCutOff).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_proxy_is_killed_at_each_step() {
    killed_at_each_step(Victim::OtherProxy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_is_killed_at_each_step() {
    killed_at_each_step(Victim::Primary).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_secondary_is_killed_at_each_step() {
    killed_at_each_step(Victim::Secondary).await;
}
