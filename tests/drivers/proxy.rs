//! `pgtandem serve` in front of two servers, as a process of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgtandem::servers::{PASSWORD, Server, ServerTls, free_port};
use tempfile::TempDir;

use crate::pair::{self, CLIENT, Endpoint, PROXY};

/// A running proxy. Dropping it kills the process.
pub(crate) struct Proxy {
    port: u16,
    admin_port: u16,
    process: Child,
    directory: TempDir,
}

impl Proxy {
    /// Starts a proxy whose clients are served by `legacy`, and waits until it is ready.
    pub(crate) fn start(
        legacy: &Server,
        new: &Server,
        database: &str,
        phase: &str,
        acknowledge: &str,
        certificate: &ServerTls,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (port, admin_port) = (free_port().expect("a port"), free_port().expect("a port"));
        let mut config =
            format!("listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:{admin_port}\nphase: {phase}\ndatabases:\n");
        for name in [database, &pair::other_database(database)] {
            config += &format!(
                "  {name}:\n    legacy: {}\n    new: {}\n",
                legacy.url(PROXY, name),
                new.url(PROXY, name)
            );
        }
        config += &format!("writes: {{ acknowledge: {acknowledge} }}\n");
        config += &format!("auth:\n  method: scram\n  users: {{ {CLIENT}: {PASSWORD} }}\n");
        let (certificate_path, key_path) = (directory.path().join("server.crt"), directory.path().join("server.key"));
        fs::write(&certificate_path, &certificate.certificate_pem).expect("write the certificate");
        fs::write(&key_path, &certificate.key_pem).expect("write the key");
        config += &format!(
            "tls:\n  certificate: {}\n  key: {}\n",
            certificate_path.display(),
            key_path.display()
        );
        let config_path = directory.path().join("proxy.yaml");
        fs::write(&config_path, config).expect("write proxy.yaml");
        let log = fs::File::create(directory.path().join("log")).expect("create the log");

        // It stops when its stdin closes, which it does when this process dies in any way.
        let process = Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(["serve", "--until-stdin-closes", "--config"])
            .arg(&config_path)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("start pgtandem");
        let mut proxy = Self {
            port,
            admin_port,
            process,
            directory,
        };
        proxy.wait_ready();
        proxy
    }

    pub(crate) fn endpoint(&self, database: &str) -> Endpoint {
        Endpoint {
            port: self.port,
            database: database.to_owned(),
            tls_root: None,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn wait_ready(&mut self) {
        // A minute bounds a proxy that never gets ready.
        for _ in 0..1200 {
            if let Some(status) = self.process.try_wait().expect("ask for the process") {
                panic!("pgtandem ended ({status}) before it was ready:\n{}", self.log());
            }
            if self.is_ready().unwrap_or(false) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("pgtandem never got ready:\n{}", self.log());
    }

    fn is_ready(&self) -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin_port))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        if std::thread::panicking() {
            eprintln!("pgtandem's log:\n{}", self.log());
        }
    }
}
