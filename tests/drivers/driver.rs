//! The drivers, and how each is run.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgtandem::servers::{Binaries, PASSWORD};

use crate::pair::{self, CLIENT, Endpoint};
use crate::report::{Observed, parse};
use crate::{sqlx_driver, tokio_postgres_driver};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Driver {
    Psql,
    Psycopg,
    Asyncpg,
    NodePostgres,
    Jdbc,
    TokioPostgres,
    Sqlx,
}

impl Driver {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Psql => "psql",
            Self::Psycopg => "psycopg",
            Self::Asyncpg => "asyncpg",
            Self::NodePostgres => "node-postgres",
            Self::Jdbc => "jdbc",
            Self::TokioPostgres => "tokio-postgres",
            Self::Sqlx => "sqlx",
        }
    }

    /// Whether the driver has a list for TLS as well; the Rust ones are built without TLS.
    pub(crate) fn has_tls_list(self) -> bool {
        !matches!(self, Self::TokioPostgres | Self::Sqlx)
    }

    /// Runs the driver's list of behaviours. `binaries` are those of the server behind the
    /// endpoint: psql should be of its version.
    pub(crate) fn run(self, endpoint: &Endpoint, binaries: &Binaries) -> Vec<Observed> {
        let script = |interpreter: &str, file: &str| run_script(interpreter, &[], file, endpoint, binaries);
        match self {
            Self::Psql => script("python", "psql_driver.py"),
            Self::Psycopg => script("python", "psycopg_driver.py"),
            Self::Asyncpg => script("python", "asyncpg_driver.py"),
            Self::NodePostgres => script("node", "node_driver.js"),
            Self::Jdbc => {
                let jar = installed("jdbc").display().to_string();
                // The JIT's second stage does not pay within these few seconds.
                let options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", &jar];
                run_script("java", &options, "JdbcDriver.java", endpoint, binaries)
            }
            Self::TokioPostgres => tokio_postgres_driver::run(endpoint),
            Self::Sqlx => sqlx_driver::run(endpoint),
        }
    }
}

fn run_script(
    interpreter: &str,
    options: &[&str],
    file: &str,
    endpoint: &Endpoint,
    binaries: &Binaries,
) -> Vec<Observed> {
    let mut command = Command::new(installed(interpreter));
    // No settings of whoever runs the tests: PGSSLMODE, PGOPTIONS, ~/.pgpass, …
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PG") {
            command.env_remove(name);
        }
    }
    command
        .args(options)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(file))
        .env("HOME", "/nonexistent")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("NODE_PATH", installed("node_modules"))
        .env("NODE_NO_WARNINGS", "1")
        .env("DRIVER_HOST", Endpoint::HOST)
        .env("DRIVER_PORT", endpoint.port.to_string())
        .env("DRIVER_USER", CLIENT)
        .env("DRIVER_PASSWORD", PASSWORD)
        .env("DRIVER_DBNAME", &endpoint.database)
        .env("DRIVER_OTHER_DBNAME", pair::other_database(&endpoint.database))
        .env("DRIVER_PSQL", binaries.program("psql"))
        .env(
            "DRIVER_PSQL_NEWEST",
            Binaries::new_side().expect("the new binaries").program("psql"),
        );
    if let Some(root) = &endpoint.tls_root {
        command.env("DRIVER_TLS_ROOT", root);
    }
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{file}: {}\n{errors}", output.status);
    parse(&String::from_utf8(output.stdout).expect("JSON is UTF-8"))
}

/// What scripts/install-drivers wrote down: `name=path` lines.
fn installed(name: &str) -> PathBuf {
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join(".servers/drivers/paths");
    let text = std::fs::read_to_string(&list).unwrap_or_default();
    let paths: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    match paths.get(name) {
        Some(path) => PathBuf::from(path),
        None => panic!("{name} is not installed for the driver tests; run scripts/install-drivers (`make test` does)"),
    }
}
