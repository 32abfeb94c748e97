//! `pgtandem demo`: the whole migration on two throwaway servers, told step by step. Everything
//! in it is what a user runs: real servers, this binary as the proxy, a real driver, proxy.yaml
//! edited and reloaded.

mod stage;
mod workload;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context;
use tokio::time::Instant;

use self::stage::Stage;
use self::workload::{ROWS, SCHEMA, TABLES, Workload};
use crate::control::{Phase, Side};

/// Runs the demo; `Ok(false)` when something was not as it must be.
pub fn run(keep: bool) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::select! {
            outcome = tell(keep) => outcome,
            _ = tokio::signal::ctrl_c() => {
                say("\ninterrupted; the servers stop and their directories are removed");
                Ok(false)
            }
        }
    })
}

async fn tell(keep: bool) -> anyhow::Result<bool> {
    let began = Instant::now();
    let mut teller = Teller::default();

    teller.step("Two Postgres servers start");
    let mut stage = Stage::set().await?;
    say(&format!(
        "   legacy: Postgres {} on port {}",
        stage.legacy.major, stage.legacy.port
    ));
    say(&format!(
        "   new:    Postgres {} on port {}",
        stage.new.major, stage.new.port
    ));
    say("   The proxy's own role is no superuser: it may log in, create its schema, and act for the tables' owner.");

    teller.step("Legacy is a shop's database, years old; new has its schema and no rows");
    stage.fill(SCHEMA, ROWS).await?;
    say(&format!(
        "   history on legacy: {} rows",
        stage.count(Side::Legacy, "history").await?
    ));

    teller.step("The proxy stands in front of them, phase dual_write, and the application writes through it");
    stage.start_proxy(Phase::DualWrite).await?;
    say(&format!("   {}", stage.client_url()));
    let workload = Workload::start(&stage.client_url()).await?;
    let ledger = workload.ledger.clone();
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.wait_caught_up().await?;
    let transactions = ledger.transactions.load(Relaxed);
    say(&format!(
        "   {transactions} transactions so far: serial keys, the clock, random values, a SKIP LOCKED queue, cascades"
    ));

    teller.step("The existing rows are brought over, while it goes on writing: pgtandem backfill");
    ledger.take_longest();
    let before = ledger.transactions.load(Relaxed);
    let backfill = stage.backfill().await?;
    say(&format!(
        "   {} transactions meanwhile, the slowest of them took {:.0} ms",
        ledger.transactions.load(Relaxed) - before,
        ledger.take_longest().as_secs_f64() * 1000.0
    ));
    teller.check(
        backfill.state == "done" && backfill.counts.failed == 0,
        "every table is in step",
    );
    stage.wait_caught_up().await?;
    say("   rows on both sides, while it goes on writing:");
    for table in TABLES {
        let [legacy, new] = [
            stage.count(Side::Legacy, table).await?,
            stage.count(Side::New, table).await?,
        ];
        say(&format!("   {table:12} legacy {legacy:>7}   new {new:>7}"));
    }
    teller.check(ledger.failed.load(Relaxed) == 0, "no statement failed");

    teller.step("Reads are shadowed: phase dual_read in proxy.yaml, then reload");
    stage.set_phase(Phase::DualRead).await?;
    let reads = stage.shadow_reads_after(40).await?;
    say(&format!(
        "   {} reads repeated on new and equal, {} different, {} not comparable",
        reads.matched,
        reads.mismatched,
        reads.not_comparable.values().sum::<u64>()
    ));
    teller.check(
        reads.matched > 0 && reads.mismatched == 0,
        "the two databases give the same answers",
    );

    teller.step("Somebody changes a price on new behind everybody's back");
    stage.plant_difference().await?;
    let reads = stage.mismatch_after(reads.mismatched).await?;
    teller.check(
        reads.mismatched > 0,
        "the next read of it is a confirmed mismatch, in the mismatch log:",
    );
    say(&format!("   {}", stage.last_mismatch()?));
    stage.mend_difference().await?;
    say("   (the price is set right again)");

    teller.step("The primary is flipped to new, under load: phase switchover, then reload");
    ledger.take_longest();
    let before = ledger.transactions.load(Relaxed);
    stage.set_phase(Phase::Switchover).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.tell_flip(&ledger, before).await?;
    teller.check(
        ledger.failed.load(Relaxed) == 0,
        "no failed statement, no dropped connection",
    );
    let server = stage.version_seen_by_clients().await?;
    teller.check(
        server.starts_with(&stage.new.major.to_string()),
        "clients are now answered by new",
    );
    say(&format!("   (they see server version {server})"));

    teller.step("Writes are now mirrored backwards, so that a flip back loses nothing");
    stage.wait_caught_up().await?;
    let [legacy, new] = [
        stage.count(Side::Legacy, "orders").await?,
        stage.count(Side::New, "orders").await?,
    ];
    say(&format!("   orders: new {new}, legacy {legacy}"));
    let refused = stage.write_directly(Side::Legacy).await?;
    say(&format!("   a write on legacy, past the proxy, is refused: {refused}"));

    teller.step("And flipped back: phase dual_read, then reload");
    ledger.take_longest();
    let before = ledger.transactions.load(Relaxed);
    stage.set_phase(Phase::DualRead).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.tell_flip(&ledger, before).await?;
    teller.check(
        ledger.failed.load(Relaxed) == 0,
        "no failed statement, no dropped connection",
    );

    teller.step("The application rests; both databases are compared row by row");
    let ledger = workload.stop().await;
    stage.wait_caught_up().await?;
    let differences = stage.rows_different().await?;
    for difference in &differences {
        say(&format!("   {difference}"));
    }
    say(&format!(
        "   {} transactions and {} reads by the application, {} failed",
        ledger.transactions.load(Relaxed),
        ledger.reads.load(Relaxed),
        ledger.failed.load(Relaxed)
    ));
    teller.check(differences.is_empty(), "0 rows differ");
    if let Some(failure) = ledger.first_failure.lock().await.as_deref() {
        say(&format!("   the first failure: {failure}"));
    }

    say(&format!(
        "\n{} ({:.0} s)",
        teller.verdict(),
        began.elapsed().as_secs_f64()
    ));
    if keep {
        stage.tell_how_to_try()?;
        tokio::signal::ctrl_c().await.context("wait for Ctrl-C")?;
        say("\nstopping; the servers' directories are removed");
    }
    stage.strike().await;
    Ok(teller.wrong == 0)
}

/// Numbers the steps and counts what was not as it must be.
#[derive(Default)]
struct Teller {
    steps: u32,
    wrong: u32,
}

impl Teller {
    fn step(&mut self, title: &str) {
        self.steps += 1;
        say(&format!("\n{}. {title}", self.steps));
    }

    fn check(&mut self, holds: bool, claim: &str) {
        if holds {
            say(&format!("   ok: {claim}"));
        } else {
            self.wrong += 1;
            say(&format!("   NOT SO: {claim}"));
        }
    }

    fn verdict(&self) -> String {
        match self.wrong {
            0 => "All of it held.".to_owned(),
            wrong => format!("{wrong} of the claims did not hold."),
        }
    }
}

fn say(line: &str) {
    use std::io::Write;
    // Whoever pipes the demo elsewhere and goes away misses the rest, no more.
    writeln!(std::io::stdout(), "{line}").ok();
}
