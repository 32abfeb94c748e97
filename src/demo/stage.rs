//! The demo's two servers, its proxy process and its configuration file, and how the demo looks
//! at them.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

use super::say;
use super::workload::Ledger;
use crate::admin::api::{BackfillAnswer, BackfillRequest, ReloadAnswer, ShadowReads, Status, WaitAnswer};
use crate::admin::client::{AdminClient, AdminError};
use crate::catalog::compare::rows_different;
use crate::config::Admin;
use crate::control::{Phase, Side};
use crate::reconcile::backfill::BackfillStatus;
use crate::servers::{Binaries, PASSWORD, SUPERUSER, Server, free_port};
use crate::shadow::{Filter, read_log};

/// The application's role, the tables' owner.
const APPLICATION: &str = "app";
/// The proxy's own role.
const OWN_ROLE: &str = "pgtandem";
const DATABASE: &str = "shop";
/// How long the demo waits for any one thing before it says that it did not come.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Stage {
    pub(super) legacy: Server,
    pub(super) new: Server,
    directory: TempDir,
    port: u16,
    admin_port: u16,
    proxy: Option<Child>,
}

impl Stage {
    /// Starts both servers, with the roles a DBA would create for a real migration.
    pub(super) async fn set() -> anyhow::Result<Self> {
        let servers = tokio::task::spawn_blocking(|| -> anyhow::Result<(Server, Server)> {
            let legacy = prepared(&Binaries::legacy()?).context("start the legacy server")?;
            let new = prepared(&Binaries::new_side()?).context("start the new server")?;
            Ok((legacy, new))
        });
        let (legacy, new) = servers.await??;
        Ok(Self {
            legacy,
            new,
            directory: tempfile::Builder::new().prefix("pgtandem-demo-").tempdir()?,
            port: free_port()?,
            admin_port: free_port()?,
            proxy: None,
        })
    }

    /// This same binary, as its user would start it. It ends when our end of its stdin closes,
    /// however we end.
    pub(super) async fn start_proxy(&mut self, phase: Phase) -> anyhow::Result<()> {
        self.write_config(phase)?;
        let log = fs::File::create(self.log_path())?;
        let proxy = Command::new(std::env::current_exe()?)
            .args(["serve", "--until-stdin-closes", "--config"])
            .arg(self.config_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("start the proxy")?;
        self.proxy = Some(proxy);
        let ready = async {
            loop {
                if let Ok(status) = self.status().await
                    && status.phase == phase
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, ready).await.is_err() {
            bail!("the proxy did not start:\n{}", fs::read_to_string(self.log_path())?);
        }
        Ok(())
    }

    /// The application's schema on both sides, its rows on legacy.
    pub(super) async fn fill(&self, schema: &str, rows: &str) -> anyhow::Result<()> {
        for side in [Side::Legacy, Side::New] {
            self.direct(side, APPLICATION).await?.batch_execute(schema).await?;
        }
        let legacy = self.direct(Side::Legacy, APPLICATION).await?;
        Ok(legacy.batch_execute(rows).await?)
    }

    /// `pgtandem backfill`, told now and then; how it ended.
    pub(super) async fn backfill(&self) -> anyhow::Result<BackfillStatus> {
        let admin = self.admin();
        let mut answer: BackfillAnswer = admin.post("/api/v1/backfill", &BackfillRequest::default()).await?;
        let mut tell_at = Instant::now();
        loop {
            let (_, status) = answer.databases.pop_first().context("no backfill has begun")?;
            if !status.is_running() || Instant::now() >= tell_at {
                let left = status
                    .remaining_seconds
                    .map_or_else(String::new, |seconds| format!(", about {seconds:.0} s left"));
                say(&format!(
                    "   {}: {} of about {} rows, {:.0} rows/s{left}",
                    status.state, status.counts.read, status.rows_expected, status.rows_per_second
                ));
                tell_at = Instant::now() + Duration::from_secs(3);
            }
            if !status.is_running() {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            answer = admin.get("/api/v1/backfill").await?;
        }
    }

    pub(super) fn client_url(&self) -> String {
        format!(
            "postgresql://{APPLICATION}:{PASSWORD}@127.0.0.1:{}/{DATABASE}",
            self.port
        )
    }

    /// A client's connection through the proxy.
    pub(super) async fn client(&self) -> anyhow::Result<Client> {
        connect(&self.client_url()).await
    }

    /// What an operator does: edit `phase:`, reload.
    pub(super) async fn set_phase(&self, phase: Phase) -> anyhow::Result<()> {
        self.write_config(phase)?;
        say(&format!(
            "   $ sed -i 's/^phase: .*/phase: {phase}/' proxy.yaml && pgtandem reload"
        ));
        let answer: ReloadAnswer = self.admin().post("/api/v1/reload", &()).await?;
        for change in answer.changed {
            say(&format!("   {change}"));
        }
        Ok(())
    }

    /// `pgtandem wait --caught-up`
    pub(super) async fn wait_caught_up(&self) -> anyhow::Result<()> {
        let path = format!("/api/v1/wait?timeout_ms={}", PATIENCE.as_millis());
        let answer: WaitAnswer = self.admin().get(&path).await?;
        if !answer.caught_up {
            bail!("the secondary did not catch up: {:?}", answer.behind);
        }
        Ok(())
    }

    pub(super) async fn count(&self, side: Side, table: &str) -> anyhow::Result<i64> {
        let row = self
            .direct(side, SUPERUSER)
            .await?
            .query_one(&format!("SELECT count(*) FROM {table}"), &[])
            .await?;
        Ok(row.get(0))
    }

    /// The shadow reads' figures once `compared` of them are in.
    pub(super) async fn shadow_reads_after(&self, compared: u64) -> anyhow::Result<ShadowReads> {
        self.shadow_reads_when(|reads| reads.matched + reads.mismatched >= compared)
            .await
    }

    /// The figures once there is a mismatch more than `known`.
    pub(super) async fn mismatch_after(&self, known: u64) -> anyhow::Result<ShadowReads> {
        self.shadow_reads_when(|reads| reads.mismatched > known).await
    }

    async fn shadow_reads_when(&self, enough: impl Fn(&ShadowReads) -> bool) -> anyhow::Result<ShadowReads> {
        let mut reads = ShadowReads::default();
        let seen = async {
            loop {
                reads = self.shadow_reads().await?;
                if enough(&reads) {
                    return Ok::<_, AdminError>(());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        // What was seen so far is told, and judged, even if it is not enough.
        if let Ok(outcome) = tokio::time::timeout(PATIENCE, seen).await {
            outcome?;
        }
        Ok(reads)
    }

    async fn shadow_reads(&self) -> Result<ShadowReads, AdminError> {
        let status = self.status().await?;
        Ok(status
            .databases
            .into_iter()
            .next()
            .map(|database| database.shadow_reads)
            .unwrap_or_default())
    }

    /// As the proxy's own role: any other would be refused on the secondary.
    pub(super) async fn plant_difference(&self) -> anyhow::Result<()> {
        self.reprice("price + 0.01").await
    }

    pub(super) async fn mend_difference(&self) -> anyhow::Result<()> {
        self.reprice("price - 0.01").await
    }

    async fn reprice(&self, price: &str) -> anyhow::Result<()> {
        let sql = format!("SET ROLE {APPLICATION}; UPDATE products SET price = {price} WHERE id = 1");
        self.direct(Side::New, OWN_ROLE).await?.batch_execute(&sql).await?;
        Ok(())
    }

    /// The newest line of the mismatch log.
    pub(super) fn last_mismatch(&self) -> anyhow::Result<String> {
        let log = self.directory.path().join("mismatches.jsonl");
        let newest = read_log(&log, &Filter::default())?.mismatches.pop();
        Ok(serde_json::to_string(&newest.context("the mismatch log is empty")?)?)
    }

    pub(super) async fn version_seen_by_clients(&self) -> anyhow::Result<String> {
        Ok(self.client().await?.query_one("SHOW server_version", &[]).await?.get(0))
    }

    /// Tries to write past the proxy; the refusal's text.
    pub(super) async fn write_directly(&self, side: Side) -> anyhow::Result<String> {
        let client = self.direct(side, APPLICATION).await?;
        match client.execute("UPDATE products SET price = 0", &[]).await {
            Ok(_) => bail!("a write past the fence of {side} was not refused"),
            Err(error) => Ok(crate::upstream::control::error_chain(&error)),
        }
    }

    pub(super) async fn tell_flip(&self, ledger: &Ledger, transactions_before: u64) -> anyhow::Result<()> {
        let status = self.status().await?;
        let flip = status.last_flip.context("no flip is recorded")?;
        say(&format!(
            "   primary is now {}, epoch {}; {} sessions carried over, new transactions held for {:.0} ms",
            status.primary, status.epoch, flip.sessions_carried, flip.held_ms
        ));
        say(&format!(
            "   {} transactions around the flip, the slowest of them took {:.0} ms",
            ledger.transactions.load(Relaxed) - transactions_before,
            ledger.take_longest().as_secs_f64() * 1000.0
        ));
        Ok(())
    }

    /// Every table of both databases, compared as multisets of rows.
    pub(super) async fn rows_different(&self) -> anyhow::Result<Vec<String>> {
        let legacy = self.direct(Side::Legacy, SUPERUSER).await?;
        let new = self.direct(Side::New, SUPERUSER).await?;
        let differences = rows_different(&legacy, &new).await?;
        Ok(differences.iter().map(ToString::to_string).collect())
    }

    pub(super) fn tell_how_to_try(&self) -> anyhow::Result<()> {
        let exe = std::env::current_exe()?;
        say("\nIt all keeps running. Try it by hand:");
        say(&format!("  psql {}", self.client_url()));
        say(&format!(
            "  legacy alone: psql {}",
            self.legacy.url(APPLICATION, DATABASE)
        ));
        say(&format!("  new alone:    psql {}", self.new.url(APPLICATION, DATABASE)));
        let config = self.config_path();
        say(&format!("  {} status --config {}", exe.display(), config.display()));
        say(&format!("  the proxy's log: {}", self.log_path().display()));
        say("Ctrl-C ends it.");
        Ok(())
    }

    /// Stops the proxy as SIGTERM would; the servers follow when `self` goes.
    pub(super) async fn strike(mut self) {
        if let Some(mut proxy) = self.proxy.take() {
            drop(proxy.stdin.take());
            if tokio::time::timeout(PATIENCE, proxy.wait()).await.is_err() {
                proxy.kill().await.ok();
            }
        }
    }

    async fn status(&self) -> Result<Status, AdminError> {
        self.admin().get("/api/v1/status").await
    }

    fn admin(&self) -> AdminClient {
        AdminClient::new(&Admin {
            address: ([127, 0, 0, 1], self.admin_port).into(),
            token: None,
        })
    }

    async fn direct(&self, side: Side, role: &str) -> anyhow::Result<Client> {
        connect(&self.server(side).url(role, DATABASE)).await
    }

    fn server(&self, side: Side) -> &Server {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }

    fn config_path(&self) -> PathBuf {
        self.directory.path().join("proxy.yaml")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("proxy.log")
    }

    fn write_config(&self, phase: Phase) -> anyhow::Result<()> {
        let text = format!(
            "listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin_port}
phase: {phase}
databases:
  {DATABASE}:
    legacy: {legacy}
    new: {new}
auth:
  method: scram
  users: {{ {APPLICATION}: {PASSWORD} }}
reads: {{ shadow_percent: 100 }}
mismatch_log: {{ path: mismatches.jsonl, values: hashed }}
",
            port = self.port,
            admin_port = self.admin_port,
            legacy = self.legacy.url(OWN_ROLE, DATABASE),
            new = self.new.url(OWN_ROLE, DATABASE),
        );
        Ok(fs::write(self.config_path(), text)?)
    }
}

/// A server with the application's role and database, and the proxy's role with the least it
/// needs.
fn prepared(binaries: &Binaries) -> std::io::Result<Server> {
    let server = Server::start(binaries, &[])?;
    server.create_role(APPLICATION, "LOGIN")?;
    server.create_role(OWN_ROLE, "LOGIN")?;
    server.create_database(DATABASE, APPLICATION)?;
    server.sql(
        DATABASE,
        &format!(
            "GRANT {APPLICATION} TO {OWN_ROLE};
             GRANT CREATE ON DATABASE {DATABASE} TO {OWN_ROLE};
             GRANT SET ON PARAMETER session_replication_role TO {OWN_ROLE}"
        ),
    )?;
    Ok(server)
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
