//! What the integration tests stand on: two throwaway servers with a proxy in this process in
//! front of them, and a client that speaks raw frames.

// Each test binary uses its own part of this.
#![allow(dead_code, unreachable_pub)]
// A test that cannot go on says where it stands.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use pgtandem::config::{Auth, AuthMethod, Credential, DatabaseConfig, EVERY_OTHER_DATABASE, Limits, Secret, Target};
use pgtandem::control::{Control, Epoch, Phase, Side};
use pgtandem::listener::Listener;
use pgtandem::routing::Databases;
use pgtandem::servers::{Binaries, PASSWORD, SUPERUSER, Server};
use pgtandem::session::hooks::Hooks;
use pgtandem::session::{Context, Settings, Users};
use pgtandem::wire::frame::{HEADER_LEN, Header};
use pgtandem::wire::scram::{ExpectChallenge, Proof, nonce};
use pgtandem::wire::startup::{self, Parameters, Version};
use pgtandem::wire::{backend, frontend, put_cstr, put_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Servers 15 and 18, shared by all tests of a binary; each test has databases of its own.
pub struct Servers {
    pub legacy: Server,
    pub new: Server,
}

/// The servers that are running, or new ones. They are gone, with their directories, when the
/// last test that holds them is over.
pub fn servers() -> Arc<Servers> {
    static RUNNING: Mutex<Weak<Servers>> = Mutex::new(Weak::new());
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(servers) = running.upgrade() {
        return servers;
    }
    let servers = Arc::new(Servers {
        legacy: Server::start(&Binaries::legacy().unwrap(), &[]).unwrap(),
        new: Server::start(&Binaries::new_side().unwrap(), &[]).unwrap(),
    });
    *running = Arc::downgrade(&servers);
    servers
}

pub fn target(side: Side, role: &str, database: &str) -> Target {
    let servers = servers();
    let server = match side {
        Side::Legacy => &servers.legacy,
        Side::New => &servers.new,
    };
    Target::parse(side, &server.url(role, database)).unwrap()
}

/// A connection to one of the servers, not through the proxy.
pub async fn direct(side: Side, role: &str, database: &str) -> pgtandem::upstream::control::Control {
    let client = pgtandem::upstream::control::connect(&target(side, role, database), "test")
        .await
        .unwrap();
    // That of clients, not the proxy's own.
    client.batch_execute("RESET search_path").await.unwrap();
    client
}

pub const APP: &str = "app";
pub const UNLISTED: &str = "unlisted";

/// What a test wants its proxy to be.
pub struct Options {
    pub phase: Phase,
    pub max_connections: usize,
    pub handshake_timeout: Duration,
    pub method: AuthMethod,
    pub tls: Option<pgtandem::config::ClientTls>,
    pub hooks: Hooks,
    pub users: BTreeMap<String, Credential>,
    pub worker_threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            phase: Phase::Initial,
            max_connections: 100,
            handshake_timeout: Duration::from_secs(20),
            method: AuthMethod::Scram,
            tls: None,
            hooks: Hooks::default(),
            users: [(APP.to_owned(), Credential::Password(Secret::new(PASSWORD)))].into(),
            worker_threads: 2,
        }
    }
}

/// A proxy in this process, before a database `name` on both servers.
pub struct Proxy {
    pub database: String,
    pub address: SocketAddr,
    pub listener: Listener,
    pub context: Arc<Context>,
    pub control: watch::Sender<Control>,
    pub servers: Arc<Servers>,
}

impl Proxy {
    pub async fn start(database: &str, options: Options) -> Self {
        let servers = servers();
        for side in [Side::Legacy, Side::New] {
            let own = direct(side, SUPERUSER, "postgres").await;
            for role in [APP, UNLISTED] {
                let create = format!(
                    "do $$ begin create role {role} login password '{PASSWORD}'; \
                     exception when duplicate_object or unique_violation then null; end $$"
                );
                own.batch_execute(&create).await.unwrap();
            }
            own.batch_execute(&format!("create database {database} owner {APP}"))
                .await
                .unwrap();
        }
        let (control, receiver) = watch::channel(Control {
            phase: options.phase,
            primary: options.phase.primary(),
            epoch: Epoch::FIRST,
        });
        let context = Context::new(settings(database, &options), receiver, options.hooks.clone());
        let listener = Listener::start(context.clone(), &["127.0.0.1:0".parse().unwrap()]).unwrap();
        Self {
            database: database.to_owned(),
            address: listener.addresses()[0],
            listener,
            context,
            control,
            servers,
        }
    }

    pub async fn client(&self) -> Raw {
        self.client_as(APP).await
    }

    pub async fn client_as(&self, user: &str) -> Raw {
        let mut raw = Raw::connect(self.address).await;
        raw.login(user, &self.database, PASSWORD, &[]).await;
        raw
    }

    pub fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(self.address.port())
            .user(APP)
            .password(PASSWORD)
            .dbname(&self.database);
        config
    }

    /// A tokio-postgres client through the proxy.
    pub async fn tokio_postgres(&self) -> tokio_postgres::Client {
        let (client, connection) = self.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub fn set(&self, phase: Phase, primary: Side) {
        self.control.send_modify(|control| {
            control.phase = phase;
            control.epoch = control.epoch.next();
            control.primary = primary;
        });
    }
}

pub fn settings(database: &str, options: &Options) -> Settings {
    let pair = |database: &str| DatabaseConfig {
        legacy: target(Side::Legacy, SUPERUSER, database),
        new: target(Side::New, SUPERUSER, database),
        transform: Default::default(),
    };
    let mut star = pair("");
    (star.legacy.dbname, star.new.dbname) = (None, None);
    let entries = [
        (database.to_owned(), pair(database)),
        (EVERY_OTHER_DATABASE.to_owned(), star),
    ];
    let limits = Limits {
        max_connections: options.max_connections,
        handshake_timeout: options.handshake_timeout,
        connect_timeout: Duration::from_secs(20),
        worker_threads: options.worker_threads,
    };
    Settings::new(
        Databases::new(&entries.into()),
        Users::new(&Auth {
            method: options.method,
            users: options.users.clone(),
        }),
        limits,
        options.tls.as_ref(),
    )
    .unwrap()
}

/// A frame as a test sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub body: Vec<u8>,
}

impl Frame {
    pub fn sqlstate(&self) -> String {
        String::from_utf8(backend::error_field(&self.body, b'C').unwrap_or_default().to_vec()).unwrap()
    }

    pub fn message(&self) -> String {
        String::from_utf8_lossy(backend::error_field(&self.body, b'M').unwrap_or_default()).into_owned()
    }

    pub fn columns(&self) -> Vec<String> {
        backend::columns(&self.body)
            .map(|column| String::from_utf8_lossy(column.unwrap_or(b"NULL")).into_owned())
            .collect()
    }
}

/// A client of raw frames.
pub struct Raw {
    pub stream: TcpStream,
    pub pid: i32,
    pub key: Vec<u8>,
    pub parameters: BTreeMap<String, String>,
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            pid: 0,
            key: Vec::new(),
            parameters: BTreeMap::new(),
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next frame, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Frame> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).await.ok()?;
        let total = Header::backend(&header).unwrap().unwrap().total;
        let mut body = vec![0; total - HEADER_LEN];
        self.stream.read_exact(&mut body).await.ok()?;
        Some(Frame { kind: header[0], body })
    }

    /// The next frame, with a limit that turns a hang into a failure that says where.
    pub async fn frame(&mut self) -> Frame {
        tokio::time::timeout(Duration::from_secs(60), self.next())
            .await
            .expect("no frame came")
            .expect("the connection ended")
    }

    /// All frames up to ReadyForQuery, that one included; notices and parameters left out.
    pub async fn answer(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            let frame = self.frame().await;
            match frame.kind {
                b'S' => self.parameter(&frame),
                b'N' => {}
                b'Z' => {
                    frames.push(frame);
                    return frames;
                }
                _ => frames.push(frame),
            }
        }
    }

    /// Sends frames; the notices that come before ReadyForQuery.
    pub async fn notices(&mut self, frames: &[u8]) -> Vec<String> {
        self.send(frames).await;
        let mut notices = Vec::new();
        loop {
            let frame = self.frame().await;
            match frame.kind {
                b'N' => notices.push(frame.message()),
                b'Z' => return notices,
                _ => {}
            }
        }
    }

    fn parameter(&mut self, frame: &Frame) {
        let (name, value) = backend::parameter(&frame.body).unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        self.parameters.insert(text(name), text(value));
    }

    /// The kinds of an answer's frames, as text.
    pub async fn kinds(&mut self) -> String {
        self.answer().await.iter().map(|frame| char::from(frame.kind)).collect()
    }

    pub async fn query(&mut self, text: &str) -> Vec<Frame> {
        let mut out = Vec::new();
        frontend::put_query(&mut out, text.as_bytes());
        self.send(&out).await;
        self.answer().await
    }

    /// The first column of the only row.
    pub async fn value(&mut self, text: &str) -> String {
        let frames = self.query(text).await;
        let row = frames.iter().find(|frame| frame.kind == b'D');
        row.unwrap_or_else(|| panic!("{text}: {frames:?}")).columns().remove(0)
    }

    /// The SQLSTATE of a query that fails.
    pub async fn error(&mut self, text: &str) -> String {
        let frames = self.query(text).await;
        let error = frames.iter().find(|frame| frame.kind == b'E');
        error.unwrap_or_else(|| panic!("{text}: {frames:?}")).sqlstate()
    }

    /// Sends a startup packet.
    pub async fn startup(&mut self, version: Version, pairs: &[(&str, &str)]) {
        let mut out = vec![0; 4];
        out.extend_from_slice(&version.0.to_be_bytes());
        for (name, value) in pairs {
            put_cstr(&mut out, name.as_bytes());
            put_cstr(&mut out, value.as_bytes());
        }
        out.push(0);
        let length = u32::try_from(out.len()).unwrap();
        out[..4].copy_from_slice(&length.to_be_bytes());
        self.send(&out).await;
    }

    /// Proves a password when asked; returns the frame after it (AuthenticationOk or an error).
    pub async fn scram(&mut self, password: &str) -> Frame {
        let frame = self.frame().await;
        if frame.kind != b'R' || frame.body[..4] != [0, 0, 0, 10] {
            return frame;
        }
        let client = ExpectChallenge::new(nonce());
        let first = client.message();
        let mut out = Vec::new();
        put_frame(&mut out, b'p', |out| {
            put_cstr(out, b"SCRAM-SHA-256");
            out.extend_from_slice(&u32::try_from(first.len()).unwrap().to_be_bytes());
            out.extend_from_slice(first.as_bytes());
        });
        self.send(&out).await;
        let challenge = self.frame().await;
        if challenge.kind != b'R' {
            return challenge;
        }
        let (answer, client) = client.answer(&challenge.body[4..], Proof::Password(password)).unwrap();
        let mut out = Vec::new();
        put_frame(&mut out, b'p', |out| out.extend_from_slice(answer.as_bytes()));
        self.send(&out).await;
        let last = self.frame().await;
        if last.kind != b'R' {
            return last;
        }
        client.finish(&last.body[4..]).unwrap();
        self.frame().await
    }

    pub async fn login(&mut self, user: &str, database: &str, password: &str, more: &[(&str, &str)]) {
        let mut pairs = vec![("user", user), ("database", database)];
        pairs.extend_from_slice(more);
        self.startup(Version::V3_0, &pairs).await;
        let ok = self.scram(password).await;
        assert_eq!((ok.kind, &ok.body[..]), (b'R', &[0, 0, 0, 0][..]), "{ok:?}");
        self.greeting().await;
    }

    /// Reads up to the first ReadyForQuery.
    pub async fn greeting(&mut self) {
        for frame in self.answer().await {
            match frame.kind {
                b'K' => {
                    let (pid, key) = backend::key_data(&frame.body).unwrap();
                    self.pid = pid;
                    self.key = key.to_vec();
                }
                b'Z' => {}
                _ => panic!("{frame:?}: {}", frame.message()),
            }
        }
    }

    /// The error that ends the connection, and that it ends.
    pub async fn fatal(&mut self) -> Frame {
        loop {
            let frame = self.frame().await;
            if frame.kind == b'E' {
                assert!(backend::is_fatal(&frame.body), "{}", frame.message());
                let end = tokio::time::timeout(Duration::from_secs(60), self.next()).await;
                assert_eq!(end.expect("the connection did not end"), None);
                return frame;
            }
        }
    }
}

/// Sends a cancel request and waits until it was taken.
pub async fn cancel(address: SocketAddr, pid: i32, key: &[u8]) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&startup::cancel_packet(pid, key)).await.unwrap();
    let mut end = Vec::new();
    stream.read_to_end(&mut end).await.unwrap();
    assert_eq!(end, b"");
}

/// Extended frames for one statement.
pub fn extended(name: &str, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    frontend::put_parse(&mut out, name.as_bytes(), text.as_bytes(), &[]);
    frontend::put_bind(&mut out, b"", name.as_bytes(), &[]);
    frontend::put_describe_portal(&mut out, b"");
    frontend::put_execute(&mut out, b"");
    out
}

pub fn no_parameters() -> Parameters {
    Parameters::default()
}
