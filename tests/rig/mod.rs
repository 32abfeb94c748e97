//! What the end-to-end tests stand on: two real servers (the machine's own and a newer one),
//! the built binary between them, and a look at each from outside.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod storm;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pgtandem::admin::api::{ReloadAnswer, Status, TableStatus, WaitAnswer};
use pgtandem::admin::client::{AdminClient, AdminError};
use pgtandem::catalog::compare::rows_different;
use pgtandem::catalog::definitions::definitions_different;
use pgtandem::config::Admin;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::{Binaries, PASSWORD, SUPERUSER, Server, free_port};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

pub(crate) const APP: &str = "app";
pub(crate) const OWN_ROLE: &str = "pgtandem";
pub(crate) const DATABASE: &str = "shop";
/// Where any table will do.
pub(crate) const ONE_ROW: &str = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)";

/// Two servers with the roles a DBA would make, and one proxy. Everything is gone when dropped.
pub(crate) struct Rig {
    pub(crate) legacy: Server,
    pub(crate) new: Server,
    pub(crate) directory: TempDir,
    pub(crate) port: u16,
    pub(crate) admin_port: u16,
    /// More lines for proxy.yaml.
    pub(crate) extra: String,
    /// More lines for the database's entry in it.
    pub(crate) entry: String,
    /// Where the proxy is told that new is, if not where it is: a relay.
    pub(crate) new_port: Option<u16>,
    proxy: Option<Child>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let rig = Self::between(&Binaries::legacy().unwrap(), &Binaries::new_side().unwrap());
        assert!(rig.legacy.major < rig.new.major, "the standing test is an upgrade");
        rig
    }

    pub(crate) fn between(legacy: &Binaries, new: &Binaries) -> Self {
        Self {
            legacy: prepared(legacy),
            new: prepared(new),
            directory: TempDir::new().unwrap(),
            port: free_port().unwrap(),
            admin_port: free_port().unwrap(),
            extra: String::new(),
            entry: String::new(),
            new_port: None,
            proxy: None,
        }
    }

    /// A rig whose proxy serves in `phase`.
    pub(crate) async fn serving(phase: Phase) -> Self {
        let mut rig = Self::new();
        rig.serve(phase).await;
        rig
    }

    /// Starts the proxy and waits until it stands in `phase`.
    pub(crate) async fn serve(&mut self, phase: Phase) {
        self.write_config(phase);
        self.spawn_proxy();
        self.until(|status| status.phase == phase && status.problem.is_none())
            .await;
    }

    /// Starts the proxy with `"*"` as its only database; its role is a superuser then, since it
    /// has to own what it cannot know.
    pub(crate) fn spawn_with_every_database(&mut self, phase: Phase) {
        self.on_both("postgres", &format!("ALTER ROLE {OWN_ROLE} SUPERUSER"));
        self.write_config(phase);
        let named = fs::read_to_string(self.config_path()).unwrap();
        let every = named
            .replace(&format!("  {DATABASE}:\n"), "  \"*\":\n")
            .replace(&format!("/{DATABASE}\n"), "\n");
        fs::write(self.config_path(), every).unwrap();
        self.spawn_proxy();
    }

    /// Starts the proxy with proxy.yaml as it is.
    pub(crate) fn spawn_proxy(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("proxy.log"))
            .unwrap();
        let proxy = Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(["serve", "--until-stdin-closes", "--config"])
            .arg(self.config_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.proxy = Some(proxy);
    }

    pub(crate) fn proxy_pid(&self) -> u32 {
        self.proxy.as_ref().unwrap().id()
    }

    /// `kill -9` of the proxy.
    pub(crate) fn kill_proxy(&mut self) {
        let mut proxy = self.proxy.take().unwrap();
        proxy.kill().unwrap();
        proxy.wait().unwrap();
    }

    /// The proxy's exit code, when it ends by itself. (`Child::wait` would close its stdin, and
    /// so end it.)
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let mut proxy = self.proxy.take().unwrap();
        loop {
            if let Some(status) = proxy.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("proxy.log")).unwrap_or_default()
    }

    pub(crate) fn write_config(&self, phase: Phase) {
        let text = format!(
            "listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin}
phase: {phase}
databases:
  {DATABASE}:
    legacy: {legacy}
    new: {new}
{entry}auth:
  users: {{ {APP}: {PASSWORD} }}
{extra}
",
            port = self.port,
            admin = self.admin_port,
            legacy = self.legacy.url(OWN_ROLE, DATABASE),
            new = self.new_url(),
            extra = self.extra,
            entry = self.entry,
        );
        fs::write(self.config_path(), text).unwrap();
    }

    fn new_url(&self) -> String {
        let port = self.new_port.unwrap_or(self.new.port);
        format!("postgresql://{OWN_ROLE}:{PASSWORD}@127.0.0.1:{port}/{DATABASE}")
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.directory.path().join("proxy.yaml")
    }

    /// What an operator does: edit `phase:`, reload.
    pub(crate) async fn set_phase(&self, phase: Phase) -> Result<ReloadAnswer, AdminError> {
        self.write_config(phase);
        self.admin().post("/api/v1/reload", &()).await
    }

    /// `pgtandem COMMAND … --config …`
    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(arguments)
            .arg("--config")
            .arg(self.config_path())
            .output()
            .unwrap()
    }

    /// A command that ends with `code` and says so: all that it printed, in which no password is.
    pub(crate) fn check(&self, arguments: &[&str], code: i32, says: &str) -> String {
        let output = self.command(arguments);
        let text = printed(&output);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {text}\n{}",
            self.log()
        );
        assert!(text.contains(says), "{arguments:?} does not say {says:?}: {text}");
        assert!(!text.contains(PASSWORD), "a password in {text}");
        text
    }

    pub(crate) fn admin(&self) -> AdminClient {
        AdminClient::new(&Admin {
            address: ([127, 0, 0, 1], self.admin_port).into(),
            token: None,
        })
    }

    pub(crate) async fn status(&self) -> Result<Status, AdminError> {
        self.admin().get("/api/v1/status").await
    }

    /// Waits until the status is as wanted. The bound is far beyond any healthy wait: it turns
    /// a hang into a failure that shows the log.
    pub(crate) async fn until(&self, wanted: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        for _ in 0..1200 {
            last = Some(self.status().await);
            if let Some(Ok(status)) = &last
                && wanted(status)
            {
                return status.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the status was never as wanted; last: {last:#?}\nlog:\n{}", self.log());
    }

    pub(crate) async fn wait_caught_up(&self) {
        let answer: WaitAnswer = self.admin().get("/api/v1/wait?timeout_ms=60000").await.unwrap();
        if !answer.caught_up {
            panic!(
                "not caught up: {answer:?}\nstatus: {:#?}\nlog:\n{}",
                self.status().await,
                self.log()
            );
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("postgresql://{APP}:{PASSWORD}@127.0.0.1:{}/{DATABASE}", self.port)
    }

    /// A client's connection through the proxy.
    pub(crate) async fn client(&self) -> Client {
        connect(&self.url()).await.unwrap()
    }

    /// A client runs this, and goes.
    pub(crate) async fn run(&self, sql: &str) {
        self.client_after(sql).await;
    }

    /// A client's connection that has run this.
    pub(crate) async fn client_after(&self, sql: &str) -> Client {
        let client = self.client().await;
        client.batch_execute(sql).await.unwrap();
        client
    }

    /// The application's database, which it owns.
    pub(crate) fn create_database(server: &Server) {
        server.create_database(DATABASE, APP).unwrap();
        let grant = format!("GRANT CREATE ON DATABASE {DATABASE} TO {OWN_ROLE}");
        server.sql(DATABASE, &grant).unwrap();
    }

    pub(crate) fn server(&self, side: Side) -> &Server {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }

    pub(crate) const fn server_mut(&mut self, side: Side) -> &mut Server {
        match side {
            Side::Legacy => &mut self.legacy,
            Side::New => &mut self.new,
        }
    }

    /// A DBA's statements on both servers.
    pub(crate) fn on_both(&self, database: &str, sql: &str) {
        for server in [&self.legacy, &self.new] {
            server.sql(database, sql).unwrap();
        }
    }

    /// A rig whose proxy may create event triggers.
    pub(crate) async fn serving_as_superuser(phase: Phase) -> Self {
        let mut rig = Self::new();
        rig.on_both("postgres", &format!("ALTER ROLE {OWN_ROLE} SUPERUSER"));
        rig.serve(phase).await;
        rig
    }

    pub(crate) async fn direct(&self, side: Side, role: &str) -> Client {
        connect(&self.server(side).url(role, DATABASE)).await.unwrap()
    }

    /// Both databases are equal, row by row; the differences otherwise.
    pub(crate) async fn assert_equal(&self) {
        let legacy = self.direct(Side::Legacy, SUPERUSER).await;
        let new = self.direct(Side::New, SUPERUSER).await;
        let differences = rows_different(&legacy, &new).await.unwrap();
        let texts: Vec<String> = differences.iter().map(ToString::to_string).collect();
        assert!(texts.is_empty(), "{}\nlog:\n{}", texts.join("\n"), self.log());
    }

    /// Rows and definitions are the same, and every table counts as synced; `after` says since when
    /// not.
    pub(crate) async fn assert_identical_after(&self, after: &str) {
        self.wait_caught_up().await;
        let legacy = self.direct(Side::Legacy, SUPERUSER).await;
        let new = self.direct(Side::New, SUPERUSER).await;
        let definitions = definitions_different(&legacy, &new).await.unwrap();
        let rows = rows_different(&legacy, &new).await.unwrap();
        let mut problems: Vec<String> = definitions.iter().map(ToString::to_string).collect();
        problems.extend(rows.iter().map(ToString::to_string));
        let status = self.status().await.unwrap();
        let mirroring = status.databases[0].mirroring.as_ref().unwrap();
        let odd = |table: &&TableStatus| table.seeding != "synced" || table.paused.is_some();
        problems.extend(mirroring.tables.iter().filter(odd).map(|table| format!("{table:?}")));
        if mirroring.divergences > 0 {
            problems.push(format!("divergences: {}", mirroring.divergences));
        }
        assert!(
            problems.is_empty(),
            "after {after}:\n{}\nlog:\n{}",
            problems.join("\n"),
            self.log()
        );
    }

    /// One value as text, asked past the proxy.
    pub(crate) async fn value(&self, side: Side, sql: &str) -> String {
        let client = self.direct(side, SUPERUSER).await;
        let sql = format!("SELECT ({sql})::text");
        client.query_one(&sql, &[]).await.unwrap().get(0)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mut proxy) = self.proxy.take() {
            proxy.kill().ok();
            proxy.wait().ok();
        }
    }
}

fn prepared(binaries: &Binaries) -> Server {
    let server = Server::start(binaries, &["deadlock_timeout=100ms"]).unwrap();
    server.create_role(APP, "LOGIN").unwrap();
    server.create_role(OWN_ROLE, "LOGIN").unwrap();
    let grants = format!("GRANT {APP} TO {OWN_ROLE}; GRANT SET ON PARAMETER session_replication_role TO {OWN_ROLE}");
    server.sql("postgres", &grants).unwrap();
    Rig::create_database(&server);
    server
}

pub(crate) async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

pub(crate) fn printed(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
