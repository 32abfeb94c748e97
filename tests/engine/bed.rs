//! A pair of real servers (the oldest and the newest there are), and for each test a database
//! on both, with capture installed and a role for the proxy that is no superuser.

#![allow(unreachable_pub, reason = "a test binary has no outside")]

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use pgtandem::apply::{self, Applier, ApplierConfig, ApplierState, ApplierStatus, Cut, ReadBy, Seeding};
use pgtandem::catalog::compare::{TableDifference, rows_different};
use pgtandem::config::{Journal, StrayWriters, Target, WhenFull, Writes};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{self, SideRole};
use pgtandem::reconcile::Sides;
use pgtandem::servers::{Binaries, PASSWORD, SUPERUSER, Server};
use pgtandem::upstream::control::{Control, connect};
use tokio::sync::OnceCell;

/// Both servers; stopped when the last test that uses them ends.
pub struct Pair {
    pub legacy: Server,
    pub new: Server,
    roles: OnceCell<()>,
}

impl Pair {
    pub fn start() -> Arc<Self> {
        Self::between(Binaries::legacy().unwrap(), Binaries::new_side().unwrap())
    }

    pub fn between(legacy: Binaries, new: Binaries) -> Arc<Self> {
        tracing_subscriber::fmt()
            .with_test_writer()
            .with_max_level(tracing::Level::INFO)
            .try_init()
            .ok();
        let start = |binaries: Binaries| Server::start(&binaries, &["deadlock_timeout=200ms"]).unwrap();
        Arc::new(Self {
            legacy: start(legacy),
            new: start(new),
            roles: OnceCell::new(),
        })
    }

    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Pair>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(pair) = shared.upgrade() {
            return pair;
        }
        let pair = Self::start();
        *shared = Arc::downgrade(&pair);
        pair
    }

    pub fn server(&self, side: Side) -> &Server {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }

    async fn create_roles(&self) {
        self.roles
            .get_or_init(|| async {
                for side in [Side::Legacy, Side::New] {
                    let client = connect(&self.target(side, SUPERUSER, "postgres"), "test")
                        .await
                        .unwrap();
                    client
                        .batch_execute(&format!(
                            "CREATE ROLE app LOGIN PASSWORD '{PASSWORD}';
                             CREATE ROLE other LOGIN PASSWORD '{PASSWORD}';
                             CREATE ROLE pgtandem LOGIN PASSWORD '{PASSWORD}';
                             GRANT app TO pgtandem; GRANT other TO pgtandem;
                             GRANT SET ON PARAMETER session_replication_role TO pgtandem;"
                        ))
                        .await
                        .unwrap();
                }
            })
            .await;
    }

    pub fn target(&self, side: Side, role: &str, dbname: &str) -> Target {
        Target::parse(side, &self.server(side).url(role, dbname)).unwrap()
    }
}

/// One test's two databases.
pub struct Bed {
    pub pair: Arc<Pair>,
    pub dbname: String,
}

/// A connection with the search path that clients have, not the proxy's own.
pub async fn as_a_client(target: &Target) -> Control {
    let client = connect(target, "test").await.unwrap();
    client.batch_execute("RESET search_path").await.unwrap();
    client
}

impl Bed {
    /// Databases called `name` on both shared servers; `schema` is run by role app on both.
    pub async fn new(name: &str, schema: &str) -> Self {
        Self::on(Pair::shared(), name, schema).await
    }

    pub async fn on(pair: Arc<Pair>, name: &str, schema: &str) -> Self {
        Self::created(pair, name, "", schema).await
    }

    /// `options`: CREATE DATABASE's.
    pub async fn created(pair: Arc<Pair>, name: &str, options: &str, schema: &str) -> Self {
        pair.create_roles().await;
        let bed = Self {
            pair,
            dbname: name.to_owned(),
        };
        for side in [Side::Legacy, Side::New] {
            let admin = connect(&bed.pair.target(side, SUPERUSER, "postgres"), "test")
                .await
                .unwrap();
            admin
                .batch_execute(&format!("CREATE DATABASE \"{name}\" OWNER pgtandem {options}"))
                .await
                .unwrap();
            bed.admin(side)
                .await
                .batch_execute(&format!(
                    "GRANT ALL ON SCHEMA public TO PUBLIC; GRANT CREATE, TEMPORARY ON DATABASE \"{name}\" TO app, other"
                ))
                .await
                .unwrap();
            bed.app(side).await.batch_execute(schema).await.unwrap();
        }
        bed
    }

    pub fn target(&self, side: Side) -> Target {
        self.pair.target(side, "pgtandem", &self.dbname)
    }

    async fn client(&self, side: Side, role: &str) -> Control {
        as_a_client(&self.pair.target(side, role, &self.dbname)).await
    }

    /// As the superuser.
    pub async fn admin(&self, side: Side) -> Control {
        self.client(side, SUPERUSER).await
    }

    /// As the application.
    pub async fn app(&self, side: Side) -> Control {
        self.client(side, "app").await
    }

    /// As another of the application's roles.
    pub async fn other(&self, side: Side) -> Control {
        self.client(side, "other").await
    }

    /// As the proxy itself.
    pub async fn proxy(&self, side: Side) -> Control {
        self.client(side, "pgtandem").await
    }

    pub async fn install(&self) {
        for (side, role) in [
            (Side::Legacy, SideRole::Primary),
            (Side::New, SideRole::from(StrayWriters::Refuse)),
        ] {
            let mut client = self.proxy(side).await;
            journal::install(&mut client, side, role, Epoch::FIRST).await.unwrap();
            let report = journal::capture_tables(&client).await.unwrap();
            assert_eq!(report.failed, []);
            assert_eq!(report.busy, [] as [String; 0]);
        }
    }

    pub fn config(&self) -> ApplierConfig {
        self.config_towards(Side::New, Epoch::FIRST)
    }

    pub fn config_towards(&self, secondary: Side, epoch: Epoch) -> ApplierConfig {
        ApplierConfig {
            primary: self.target(secondary.other()),
            secondary: self.target(secondary),
            epoch,
            rest: ApplierConfig::REST,
            poll_min: Duration::from_millis(5),
            poll_max: Duration::from_millis(20),
            piece_bytes: ApplierConfig::PIECE_BYTES,
            read_by: ReadBy::Snapshot,
            stray_writers: StrayWriters::Refuse,
            journal: Journal {
                max_bytes: 10 << 30,
                when_full: WhenFull::Block,
            },
            writes: Writes::default(),
            transform: Arc::default(),
            awaited: Default::default(),
        }
    }

    /// For what works on existing rows.
    pub fn sides(&self, primary: Side, epoch: Epoch, applier: &Arc<Applier>) -> Sides {
        Sides {
            database: self.dbname.clone(),
            primary: self.target(primary),
            secondary: self.target(primary.other()),
            epoch,
            applier: applier.clone(),
        }
    }

    /// Installed on both sides, mirroring from legacy to new.
    pub async fn mirrored(name: &str, schema: &str) -> (Self, Applier) {
        let bed = Self::new(name, schema).await;
        bed.install().await;
        let applier = apply::spawn(bed.config());
        caught_up(&applier).await;
        (bed, applier)
    }

    pub async fn differences(&self) -> Vec<TableDifference> {
        rows_different(&*self.admin(Side::Legacy).await, &*self.admin(Side::New).await)
            .await
            .unwrap()
    }

    /// Catches up and compares everything, row by row.
    pub async fn assert_same(&self, applier: &Applier) {
        caught_up(applier).await;
        let status = applier.status().borrow().clone();
        assert_eq!(self.differences().await, [], "{status:#?}");
        assert_eq!(status.diverged, 0, "{status:#?}");
        for table in &status.tables {
            assert_eq!(table.seeding, Seeding::Synced, "{table:?}");
            assert_eq!(table.paused, None, "{table:?}");
        }
    }
}

/// Waits for a round after now; an applier that fails or stands still fails the test.
pub async fn caught_up(applier: &Applier) -> Cut {
    let stands = |state: &ApplierState| matches!(state, ApplierState::Failing { .. } | ApplierState::Halted { .. });
    tokio::select! {
        cut = applier.catch_up() => cut.unwrap(),
        status = until(applier, |status| stands(&status.state)) => panic!("{status:#?}"),
    }
}

/// Waits until the status is as wanted; a failure to get there ends with the test runner's own
/// limit, and the status is in the log.
pub async fn until(applier: &Applier, wanted: impl FnMut(&ApplierStatus) -> bool) -> ApplierStatus {
    applier.status().wait_for(wanted).await.unwrap().clone()
}
