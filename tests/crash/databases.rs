//! One proxy, several databases: a flip is all of them or none, whoever dies where. The record that
//! decides is in one of them, the first by name; between it and the others there is room to die in.

use std::time::Duration;

use pgtandem::admin::api::{SwitchoverAnswer, SwitchoverRequest};
use pgtandem::admin::client::{AdminClient, AdminError};
use pgtandem::config::Admin;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::{SUPERUSER, Server};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::Client;

use crate::another::Another;
use crate::processes;
use crate::rig::{APP, DATABASE, OWN_ROLE, Rig, connect};

/// Behind the first by name, whose record decides.
const OTHER: &str = "warehouse";

/// Two databases, two proxies; the rig's own leads.
struct Two {
    rig: Rig,
    other: Another,
}

impl Two {
    async fn set() -> Self {
        let mut rig = Rig::new();
        for server in [&rig.legacy, &rig.new] {
            server.create_database(OTHER, APP).unwrap();
            let grant = format!("GRANT CREATE ON DATABASE {OTHER} TO {OWN_ROLE}");
            server.sql(OTHER, &grant).unwrap();
        }
        rig.entry = format!(
            "  {OTHER}:\n    legacy: {}\n    new: {}\n",
            rig.legacy.url(OWN_ROLE, OTHER),
            rig.new.url(OWN_ROLE, OTHER)
        );
        rig.serve(Phase::DualRead).await;
        let other = Another::beside(&rig, Phase::DualRead).await;
        let two = Self { rig, other };
        for database in [DATABASE, OTHER] {
            let schema = "CREATE TABLE t (id serial PRIMARY KEY, v text)";
            two.client(&two.rig.url(), database)
                .await
                .batch_execute(schema)
                .await
                .unwrap();
        }
        two.rig.wait_caught_up().await;
        two.both_registered().await;
        two
    }

    async fn both_registered(&self) {
        let alive = |status: &pgtandem::admin::api::Status| {
            status.proxies.iter().filter(|proxy| proxy.silent_seconds < 4.0).count() == 2
        };
        self.rig.until(alive).await;
        self.other.until(&self.rig, alive).await;
    }

    /// Through a proxy that may just have been started, and knows where clients belong before it lets
    /// them in.
    async fn client(&self, url: &str, database: &str) -> Client {
        let url = url.replace(&format!("/{DATABASE}"), &format!("/{database}"));
        for _ in 0..1200 {
            if let Ok(client) = connect(&url).await {
                return client;
            }
            sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "{url} never answers\n{}\n--- the other\n{}",
            self.rig.log(),
            self.other.log()
        );
    }

    fn server(&self, side: Side) -> &Server {
        self.rig.server(side)
    }

    async fn direct(&self, side: Side, database: &str) -> Client {
        connect(&self.server(side).url(SUPERUSER, database)).await.unwrap()
    }

    /// Role (0: primary) and epoch as that side's sequence holds them.
    async fn role(&self, side: Side, database: &str) -> (u64, u64) {
        let sql = "SELECT pg_sequence_last_value('pgtandem.state'::regclass)";
        let row = self.direct(side, database).await.query_one(sql, &[]).await.unwrap();
        let state = u64::try_from(row.get::<_, i64>(0)).unwrap();
        ((state >> 2) & 7, state >> 8)
    }

    async fn until_role(&self, side: Side, database: &str, wanted: (u64, u64)) {
        for _ in 0..1200 {
            if self.role(side, database).await == wanted {
                return;
            }
            sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "{database} on {side} is never {wanted:?} but {:?}\n{}\n--- the other\n{}",
            self.role(side, database).await,
            self.rig.log(),
            self.other.log()
        );
    }

    fn flip(&self, port: u16, to: Side) -> JoinHandle<Result<SwitchoverAnswer, AdminError>> {
        let admin = AdminClient::new(&Admin {
            address: ([127, 0, 0, 1], port).into(),
            token: None,
        });
        tokio::spawn(async move {
            let request = SwitchoverRequest {
                to: Some(to),
                dry_run: false,
                rehearse: false,
                force: None,
                by: None,
            };
            admin.post("/api/v1/switchover", &request).await
        })
    }

    /// Both databases have `side` as their only primary, in that epoch, and every proxy serves there.
    async fn all_on(&self, side: Side, epoch: u64) {
        for database in [DATABASE, OTHER] {
            self.until_role(side, database, (0, epoch)).await;
            let (role, _) = self.role(side.other(), database).await;
            assert_ne!(role, 0, "{database} has two primaries\n{}", self.rig.log());
        }
        let there = |status: &pgtandem::admin::api::Status| status.primary == side && status.epoch.0 == epoch;
        self.rig.until(there).await;
        self.other.until(&self.rig, there).await;
        // Which the clients of both find so.
        for url in [self.rig.url(), self.other.url()] {
            for database in [DATABASE, OTHER] {
                let client = self.client(&url, database).await;
                client.batch_execute("INSERT INTO t (v) VALUES ('on')").await.unwrap();
            }
        }
        self.rig.wait_caught_up().await;
        self.other.wait_caught_up().await;
        for database in [DATABASE, OTHER] {
            let mut found = Vec::new();
            for side in [Side::Legacy, Side::New] {
                let sql = "SELECT string_agg(id || v, ',' ORDER BY id) FROM t";
                let row = self.direct(side, database).await.query_one(sql, &[]).await.unwrap();
                found.push(row.get::<_, Option<String>>(0));
            }
            assert_eq!(found[0], found[1], "{database}");
        }
    }
}

/// Stops a flip from legacy where it is recorded as decided: the other database has been turned by
/// then, the one that decides has not.
struct BeforeTheDecision {
    holder: Client,
}

impl BeforeTheDecision {
    async fn set(two: &Two) -> Self {
        let holder = two.direct(Side::Legacy, DATABASE).await;
        holder
            .batch_execute(
                "CREATE FUNCTION pgtandem.stop_here() RETURNS trigger LANGUAGE plpgsql AS
                   'BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NEW; END';
                 CREATE TRIGGER stop_here BEFORE INSERT ON pgtandem.flip_step FOR EACH ROW
                   WHEN (NEW.step = 'decided') EXECUTE FUNCTION pgtandem.stop_here();
                 SELECT pg_advisory_lock(4711)",
            )
            .await
            .unwrap();
        Self { holder }
    }

    async fn reached(&self, two: &Two) {
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted";
        while self.holder.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(two.role(Side::Legacy, OTHER).await, (1, 2), "turned");
        assert_eq!(two.role(Side::Legacy, DATABASE).await, (0, 1), "not turned");
    }

    async fn lift(self) {
        self.holder
            .batch_execute("SELECT pg_advisory_unlock_all(); DROP TRIGGER stop_here ON pgtandem.flip_step")
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_before_the_decision_takes_all_databases_back() {
    let mut two = Two::set().await;
    let stop = BeforeTheDecision::set(&two).await;
    let flip = two.flip(two.rig.admin_port, Side::New);
    stop.reached(&two).await;
    two.rig.kill_proxy();
    flip.await.unwrap().unwrap_err();
    stop.lift().await;
    // The other proxy does it, while no leader comes back.
    two.until_role(Side::Legacy, OTHER, (0, 1)).await;
    two.rig.spawn_proxy();
    two.all_on(Side::Legacy, 1).await;
    two.rig.check(&["switchover", "--to", "new"], 0, "switchover to new");
    two.all_on(Side::New, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_proxies_killed_before_the_decision_find_all_databases_back() {
    let mut two = Two::set().await;
    let stop = BeforeTheDecision::set(&two).await;
    let flip = two.flip(two.rig.admin_port, Side::New);
    stop.reached(&two).await;
    two.other.kill();
    two.rig.kill_proxy();
    flip.await.unwrap().unwrap_err();
    stop.lift().await;
    two.rig.spawn_proxy();
    two.other.spawn();
    two.all_on(Side::Legacy, 1).await;
}

/// Whoever took the flip over recorded that it was given up, and died before it had turned the other
/// database back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_flip_that_was_given_up_left_in_another_database_is_found_by_proxies_that_run() {
    let two = Two::set().await;
    // With the sequence, the flip's record and its note as they are then.
    let id = "0123456789abcdef";
    let deciding = two.direct(Side::Legacy, DATABASE).await;
    two.direct(Side::Legacy, OTHER)
        .await
        .batch_execute(&format!(
            "INSERT INTO pgtandem.crossing (flip) VALUES ('{id}') ON CONFLICT (one) DO UPDATE SET flip = EXCLUDED.flip;
             SELECT setval('pgtandem.state', (2 << 8) | (1 << 2) | (last_value & 3)) FROM pgtandem.state"
        ))
        .await
        .unwrap();
    assert_eq!(two.role(Side::Legacy, OTHER).await, (1, 2));
    deciding
        .batch_execute(&format!(
            "INSERT INTO pgtandem.flip (id, kind, from_side, to_side, epoch, phase, coordinator, step, deadline, outcome)
             VALUES ('{id}', 'flip', 'legacy', 'new', 2, 'switchover', 'gone', 'aborted', now(), 'lost')"
        ))
        .await
        .unwrap();
    two.until_role(Side::Legacy, OTHER, (0, 1)).await;
    two.all_on(Side::Legacy, 1).await;
}

/// After the decision: the other database's new side is primary, the deciding one's is not yet.
async fn decided(two: &Two) -> Client {
    let holder = two.direct(Side::New, DATABASE).await;
    // What every change of a side's state takes.
    holder
        .batch_execute("SELECT pg_advisory_lock(1885828196, 2)")
        .await
        .unwrap();
    holder
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_between_the_turns_of_two_databases_leaves_it_to_go_forward() {
    let mut two = Two::set().await;
    let holder = decided(&two).await;
    let flip = two.flip(two.rig.admin_port, Side::New);
    two.until_role(Side::New, OTHER, (0, 2)).await;
    assert_eq!(two.role(Side::New, DATABASE).await, (1, 1), "not turned yet");
    assert_eq!(two.role(Side::Legacy, DATABASE).await, (1, 2), "decided");
    two.rig.kill_proxy();
    flip.await.unwrap().unwrap_err();
    holder.batch_execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    two.until_role(Side::New, DATABASE, (0, 2)).await;
    two.rig.spawn_proxy();
    two.all_on(Side::New, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_proxies_killed_between_the_turns_of_two_databases_go_forward() {
    let mut two = Two::set().await;
    let holder = decided(&two).await;
    let flip = two.flip(two.rig.admin_port, Side::New);
    two.until_role(Side::New, OTHER, (0, 2)).await;
    two.other.kill();
    two.rig.kill_proxy();
    flip.await.unwrap().unwrap_err();
    assert_eq!(two.role(Side::New, DATABASE).await, (1, 1), "not turned yet");
    holder.batch_execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    two.rig.spawn_proxy();
    two.other.spawn();
    two.all_on(Side::New, 2).await;
}

/// It stood still before the decision; the others gave its flip up, and led one of their own, to the
/// same epoch, before it went on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_wakes_after_the_next_flip_turns_nothing_back() {
    let two = Two::set().await;
    let stop = BeforeTheDecision::set(&two).await;
    let flip = two.flip(two.rig.admin_port, Side::New);
    stop.reached(&two).await;
    let paused = processes::pause(two.rig.proxy_pid());
    stop.lift().await;
    two.until_role(Side::Legacy, OTHER, (0, 1)).await;
    // Its connections are lost, which it does not know yet; and with them its right to lead.
    let lost = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1885828196 AND objid = 4 AND granted";
    two.direct(Side::Legacy, DATABASE)
        .await
        .batch_execute(lost)
        .await
        .unwrap();
    let next = two.flip(two.other.admin_port(), Side::New).await.unwrap();
    next.unwrap_or_else(|error| panic!("{error}\n{}", two.other.log()));
    for database in [DATABASE, OTHER] {
        assert_eq!(two.role(Side::New, database).await, (0, 2));
    }
    drop(paused);
    flip.await.unwrap().ok();
    two.all_on(Side::New, 2).await;
}
