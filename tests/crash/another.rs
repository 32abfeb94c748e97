//! One more proxy on the pair of a rig.

use std::fs;
use std::process::{Child, Command, Stdio};

use pgtandem::admin::api::{
    BackfillAnswer, BackfillRequest, Mirroring, QuarantineAnswer, ReloadAnswer, RetryRequest, Status, WaitAnswer,
};
use pgtandem::admin::client::{AdminClient, AdminError};
use pgtandem::config::Admin;
use pgtandem::control::Phase;
use pgtandem::servers::{PASSWORD, free_port};
use tempfile::TempDir;

use crate::rig::{APP, DATABASE, Rig};

pub(crate) struct Another {
    directory: TempDir,
    port: u16,
    admin_port: u16,
    /// Goes to the secondary itself, past the relay.
    direct: bool,
    process: Option<Child>,
}

impl Another {
    /// Starts one with the rig's own configuration, on other ports, and waits until it serves.
    pub(crate) async fn beside(rig: &Rig, phase: Phase) -> Self {
        Self::begin(rig, phase, false).await
    }

    /// The same with a way of its own to the secondary.
    pub(crate) async fn past_the_relay(rig: &Rig, phase: Phase) -> Self {
        Self::begin(rig, phase, true).await
    }

    async fn begin(rig: &Rig, phase: Phase, direct: bool) -> Self {
        let mut another = Self {
            direct,
            directory: TempDir::new().unwrap(),
            port: free_port().unwrap(),
            admin_port: free_port().unwrap(),
            process: None,
        };
        another.take_config(rig);
        another.spawn();
        another
            .until(rig, |status| status.phase == phase && status.problem.is_none())
            .await;
        another
    }

    fn take_config(&self, rig: &Rig) {
        let config = fs::read_to_string(rig.config_path()).unwrap();
        let relayed = rig.new_port.unwrap_or(rig.new.port);
        let new_port = if self.direct { rig.new.port } else { relayed };
        let config = config
            .replace(&format!("127.0.0.1:{relayed}/"), &format!("127.0.0.1:{new_port}/"))
            .replace(
                &format!("listen: 127.0.0.1:{}", rig.port),
                &format!("listen: 127.0.0.1:{}", self.port),
            )
            .replace(
                &format!("admin: 127.0.0.1:{}", rig.admin_port),
                &format!("admin: 127.0.0.1:{}", self.admin_port),
            );
        fs::write(self.directory.path().join("proxy.yaml"), config).unwrap();
    }

    pub(crate) fn spawn(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("proxy.log"))
            .unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(["serve", "--until-stdin-closes", "--config"])
            .arg(self.directory.path().join("proxy.yaml"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(process);
    }

    pub(crate) const fn admin_port(&self) -> u16 {
        self.admin_port
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("postgresql://{APP}:{PASSWORD}@127.0.0.1:{}/{DATABASE}", self.port)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("proxy.log")).unwrap_or_default()
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

    /// Takes over the rig's configuration and reloads it.
    pub(crate) async fn reload(&self, rig: &Rig) -> Result<ReloadAnswer, AdminError> {
        self.take_config(rig);
        self.admin().post("/api/v1/reload", &()).await
    }

    pub(crate) async fn start_backfill(&self) -> Result<BackfillAnswer, AdminError> {
        let request = BackfillRequest::default();
        self.admin().post("/api/v1/backfill", &request).await
    }

    pub(crate) async fn wait_caught_up(&self) {
        let answer: WaitAnswer = self.admin().get("/api/v1/wait?timeout_ms=60000").await.unwrap();
        assert!(
            answer.caught_up,
            "{answer:?}\n{:#?}\n{}",
            self.status().await,
            self.log()
        );
    }

    /// As [`Rig::until`].
    pub(crate) async fn until(&self, rig: &Rig, wanted: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        for _ in 0..1200 {
            last = Some(self.status().await);
            if let Some(Ok(status)) = &last
                && wanted(status)
            {
                return status.clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!(
            "the status was never as wanted; last: {last:#?}\nlog:\n{}\nthe other's log:\n{}",
            self.log(),
            rig.log()
        );
    }
}

impl Drop for Another {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// `quarantine retry`, of all that is held, asked of one proxy.
pub(crate) async fn retry_quarantine(admin: AdminClient) -> Result<QuarantineAnswer, AdminError> {
    let request = RetryRequest {
        database: None,
        id: None,
        actor: "a test".into(),
    };
    admin.post("/api/v1/quarantine/retry", &request).await
}

/// The only database's mirroring.
pub(crate) fn mirroring(status: &Status) -> &Mirroring {
    status.databases[0].mirroring.as_ref().unwrap()
}
