//! Databases that do not belong together: a side restored from an older copy, another pair's, one
//! that takes itself for the primary. Either what is missing is told, or nothing is done.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pgtandem::apply::{self, Applier, ApplierConfig, ApplierState, Seeding};
use pgtandem::config::{Journal, Target, WhenFull};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{self, SideRole};
use pgtandem::servers::Server;

use crate::bed::{Bed, Pair, caught_up, until};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

/// A copy of the server's files, as a backup or a snapshot of its volume makes it.
fn set_aside(server: &mut Server) -> PathBuf {
    server.stop("fast").unwrap();
    let copy = server.directory().join("copy");
    let data = server.data_directory();
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([&data, &copy])
            .status()
            .unwrap()
            .success()
    );
    server.start_again().unwrap();
    copy
}

fn bring_back(server: &mut Server, copy: &PathBuf) {
    server.stop("immediate").unwrap();
    fs::remove_dir_all(server.data_directory()).unwrap();
    fs::rename(copy, server.data_directory()).unwrap();
    server.start_again().unwrap();
}

/// Whose journal is rotated after a megabyte.
fn small_journal(config: ApplierConfig) -> ApplierConfig {
    ApplierConfig {
        journal: Journal {
            max_bytes: 4 << 20,
            when_full: WhenFull::Block,
        },
        ..config
    }
}

/// A pair of servers of its own, whose `side` is set aside by `with` in the middle of things.
struct Copied {
    pair: Arc<Pair>,
    dbname: String,
    applier: Applier,
}

impl Copied {
    async fn mirrored(name: &str) -> Self {
        let pair = Pair::start();
        let bed = Bed::on(pair.clone(), name, SCHEMA).await;
        bed.install().await;
        let applier = apply::spawn(small_journal(bed.config()));
        bed.app(Side::Legacy)
            .await
            .batch_execute("INSERT INTO t SELECT g, 'first' FROM generate_series(1, 100) g")
            .await
            .unwrap();
        caught_up(&applier).await;
        Self {
            pair,
            dbname: bed.dbname,
            applier,
        }
    }

    fn bed(&self) -> Bed {
        Bed {
            pair: self.pair.clone(),
            dbname: self.dbname.clone(),
        }
    }

    fn server(&mut self, side: Side) -> &mut Server {
        let servers = Arc::get_mut(&mut self.pair).unwrap();
        match side {
            Side::Legacy => &mut servers.legacy,
            Side::New => &mut servers.new,
        }
    }

    /// Rows of which each takes some kilobytes, from `first` on.
    async fn write(&self, first: i32) {
        self.bed()
            .app(Side::Legacy)
            .await
            .execute(
                "INSERT INTO t SELECT g, (SELECT string_agg(md5(random()::text || g || n), '') FROM generate_series(1, 200) n)
                   FROM generate_series($1::int, $1 + 299) g",
                &[&first],
            )
            .await
            .unwrap();
    }

    async fn journal_bytes(&self) -> u64 {
        let client = self.bed().admin(Side::Legacy).await;
        journal::rotation::measure(&client).await.unwrap()
    }

    async fn emptied(&self) -> i64 {
        let client = self.bed().admin(Side::Legacy).await;
        let row = client.query_one("SELECT truncations FROM pgtandem.side", &[]).await;
        row.unwrap().get(0)
    }
}

#[tokio::test]
async fn an_older_copy_of_the_secondary_catches_up_where_the_journal_has_it_all() {
    let mut copied = Copied::mirrored("older_whole").await;
    let copy = set_aside(copied.server(Side::New));
    let bed = copied.bed();
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("UPDATE t SET v = 'second' WHERE id < 50; DELETE FROM t WHERE id = 7")
        .await
        .unwrap();
    copied.applier.catch_up().await.unwrap();
    drop(bed);
    bring_back(copied.server(Side::New), &copy);
    client
        .batch_execute("INSERT INTO t VALUES (1000, 'third')")
        .await
        .unwrap();
    copied.applier.catch_up().await.unwrap();
    copied.bed().assert_same(&copied.applier).await;
}

#[tokio::test]
async fn an_older_copy_of_the_secondary_needs_seeding_where_the_journal_was_emptied_since() {
    let mut copied = Copied::mirrored("older_secondary").await;
    let copy = set_aside(copied.server(Side::New));
    copied.applier.catch_up().await.unwrap();
    let mut first = 1000;
    while copied.emptied().await == 0 {
        // Rotation takes its time; the bound shall not be reached meanwhile.
        if copied.journal_bytes().await > 2 << 20 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        copied.write(first).await;
        first += 1000;
        copied.applier.catch_up().await.unwrap();
    }
    bring_back(copied.server(Side::New), &copy);
    copied.applier.catch_up().await.unwrap();
    assert_ne!(copied.bed().differences().await, [], "the copy lacks nothing");
    let status = until(&copied.applier, |status| {
        status.tables.iter().any(|table| table.seeding != Seeding::Synced)
    })
    .await;
    let note = status.tables[0].note.clone().unwrap_or_default();
    assert!(note.contains("older copy"), "{status:#?}");
    // What comes now is applied, and it stays told.
    copied.write(first).await;
    copied.applier.catch_up().await.unwrap();
    let again = apply::spawn(small_journal(copied.bed().config()));
    copied.applier.stop().await;
    again.catch_up().await.unwrap();
    assert_eq!(again.status().borrow().tables[0].seeding, Seeding::Unseeded);
}

#[tokio::test]
async fn an_older_copy_of_the_primary_is_not_followed() {
    let mut copied = Copied::mirrored("older_primary").await;
    let copy = set_aside(copied.server(Side::Legacy));
    copied.write(1000).await;
    copied.applier.catch_up().await.unwrap();
    bring_back(copied.server(Side::Legacy), &copy);
    copied
        .bed()
        .app(Side::Legacy)
        .await
        .batch_execute("UPDATE t SET v = 'second' WHERE id = 1")
        .await
        .unwrap();
    refused(&copied.applier, "older copy").await;
    let rows = copied.bed().admin(Side::New).await;
    let touched: i64 = rows
        .query_one("SELECT count(*) FROM t WHERE v = 'second'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(touched, 0);
}

#[tokio::test]
async fn the_secondary_of_another_pair_is_refused() {
    let (ours, applier) = Bed::mirrored("pair_ours", SCHEMA).await;
    let (theirs, their_applier) = Bed::mirrored("pair_theirs", SCHEMA).await;
    applier.stop().await;
    their_applier.stop().await;
    let config = ApplierConfig {
        secondary: theirs.target(Side::New),
        ..ours.config()
    };
    let mistaken = apply::spawn(config);
    ours.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1, 'ours')")
        .await
        .unwrap();
    refused(&mistaken, "another pair").await;
    // Nor does one that waits there for its turn say that it has caught up.
    let rightful = apply::spawn(theirs.config());
    caught_up(&rightful).await;
    refused(&mistaken, "another pair").await;
    theirs.assert_same(&rightful).await;
}

#[tokio::test]
async fn a_second_secondary_takes_nothing_away_from_the_first() {
    let (bed, applier) = Bed::mirrored("first_of_two", SCHEMA).await;
    let second = Bed::new("second_of_two", SCHEMA).await;
    let config = ApplierConfig {
        secondary: second.target(Side::New),
        ..bed.config()
    };
    let mistaken = apply::spawn(config.clone());
    refused(&mistaken, "just now").await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 'a')").await.unwrap();
    bed.assert_same(&applier).await;
    // Once the first is gone, it may be replaced; and does not come back as if nothing had been.
    applier.stop().await;
    mistaken.catch_up().await.unwrap();
    mistaken.stop().await;
    let back = apply::spawn(bed.config());
    refused(&back, "another secondary").await;
}

#[tokio::test]
async fn a_copy_from_before_the_flip_is_not_followed_by_anybody() {
    let (bed, applier) = Bed::mirrored("before_flip", SCHEMA).await;
    applier.stop().await;
    let second = Epoch::FIRST.next();
    for (side, role, epoch) in [
        (Side::New, SideRole::Primary, second),
        // As the copy has it.
        (Side::Legacy, SideRole::Primary, Epoch::FIRST),
    ] {
        turn(&bed.target(side), role, epoch).await;
    }
    let applier = apply::spawn(bed.config_towards(Side::Legacy, second));
    refused(&applier, "takes itself for the primary").await;
}

async fn turn(target: &Target, role: SideRole, epoch: Epoch) {
    let mut client = pgtandem::upstream::control::connect(target, "test").await.unwrap();
    let fence = journal::fence(&mut client, Duration::from_secs(5)).await.unwrap();
    fence.turn(journal::SideState { epoch, role }).await.unwrap();
}

/// The applier stands still, and says why.
async fn refused(applier: &Applier, says: &str) {
    until(applier, |status| match &status.state {
        ApplierState::Failing { error } => error.contains(says),
        _ => false,
    })
    .await;
}
