//! pg_dump and psql: where they are, and how they are run. Passwords go by the environment of the
//! child, never by its arguments, which everybody on the machine can read.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::catalog::quote::identifier;
use crate::config::{SslMode, Target};
use crate::control::Side;
use crate::transform::Transform;

/// One folder's pg_dump and psql: of one version, since a dump may hold commands for psql.
pub(super) struct Tools {
    folder: PathBuf,
    pub major: u32,
}

impl Tools {
    /// The oldest that can dump a server of this version.
    pub(super) fn find(server: u32) -> anyhow::Result<Self> {
        let mut found: Vec<Self> = crate::servers::client_folders()
            .into_iter()
            .filter_map(|folder| {
                let major = major_of(&folder.join("pg_dump"))?;
                folder.join("psql").is_file().then_some(Self { folder, major })
            })
            .collect();
        found.sort_by_key(|tools| tools.major);
        let newest = found.last().map(|tools| tools.major);
        match (found.into_iter().find(|tools| tools.major >= server), newest) {
            (Some(tools), _) => Ok(tools),
            (None, Some(newest)) => bail!(
                "pg_dump is version {newest}, legacy's server {server}: put pg_dump and psql of version {server} or later on PATH"
            ),
            (None, None) => {
                bail!("pg_dump and psql are not on PATH: install the client programs of version {server} or later")
            }
        }
    }

    /// Definitions without rows, without anything of ours.
    pub(super) async fn dump(&self, from: &Target, transform: &Transform) -> anyhow::Result<String> {
        let tables = transform.tables(Side::Legacy);
        let schemas = transform.schemas(Side::Legacy);
        let left_out = tables.iter().map(|name| format!("--exclude-table={}", name.quoted()));
        let left_out = left_out.chain(schemas.map(|name| format!("--exclude-schema={}", identifier(name))));
        let output = self
            .command("pg_dump", from)
            .args(["--schema-only", "--verbose", "--no-password", "--encoding=UTF8"])
            .args(["--exclude-schema=pgtandem", "--no-tablespaces"])
            .args(["--no-publications", "--no-subscriptions"])
            .args(left_out)
            .stdin(Stdio::null())
            .output()
            .await
            .context("run pg_dump")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "pg_dump of {}: {}",
            from.describe(),
            complaints(&said)
        );
        String::from_utf8(output.stdout).context("pg_dump's answer")
    }

    /// All of it, or nothing.
    pub(super) async fn run(&self, on: &Target, script: String) -> anyhow::Result<()> {
        let mut psql = self
            .command("psql", on)
            .args(["--no-psqlrc", "--quiet", "--no-password", "--single-transaction"])
            .args(["--set", "ON_ERROR_STOP=1", "--file", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("run psql")?;
        let mut stdin = psql.stdin.take().context("psql's input")?;
        // It stops reading at the first error: that is told by its end.
        let written = tokio::spawn(async move { stdin.write_all(script.as_bytes()).await });
        let output = psql.wait_with_output().await.context("run psql")?;
        written.await.ok();
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "psql on {}, nothing was changed: {}",
            on.describe(),
            complaints(&said)
        );
        Ok(())
    }

    fn command(&self, program: &str, target: &Target) -> Command {
        let mut command = Command::new(self.folder.join(program));
        let mode = match target.ssl_mode {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        };
        command
            .env("PGHOST", &target.host)
            .env("PGPORT", target.port.to_string())
            .env("PGUSER", &target.user)
            .env("PGDATABASE", target.dbname())
            .env("PGSSLMODE", mode)
            .env("PGAPPNAME", "pgtandem schema copy")
            .env("LC_MESSAGES", "C")
            .env_remove("PGOPTIONS")
            .env_remove("PGSERVICE")
            .kill_on_drop(true);
        if let Some(password) = &target.password {
            command.env("PGPASSWORD", password.expose());
        }
        if let Some(path) = &target.ssl_root_cert {
            command.env("PGSSLROOTCERT", path);
        }
        command
    }
}

fn major_of(program: &Path) -> Option<u32> {
    let output = std::process::Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .find_map(|word| word.split('.').next()?.parse().ok())
}

/// Of what a program said, what it complained of; on one line.
fn complaints(said: &str) -> String {
    let is_one = |line: &&str| {
        ["error", "ERROR", "FATAL", "fatal", "invalid"]
            .iter()
            .any(|word| line.contains(word))
    };
    let lines: Vec<&str> = said.lines().filter(is_one).collect();
    match lines.is_empty() {
        true => said.lines().last().unwrap_or("it failed without a word").to_owned(),
        false => lines.join("; "),
    }
}
