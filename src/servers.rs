//! Throwaway Postgres servers on free loopback ports, for the demo and the tests: real
//! binaries, a directory of their own, gone when dropped. Nothing that serves clients may use
//! this module; it blocks, and knows nothing of the proxy.
//!
//! Postgres refuses to run as root, so as root the server runs as an unprivileged user. Each
//! server has a [`Watcher`], a shell that waits for our end of a pipe to close: so server and
//! directory go away even if this process is killed with SIGKILL.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// The password of every role that [`Server::start`] creates.
pub const PASSWORD: &str = "secret";

/// Where server binaries were found, by the environment or the places `scripts/install-postgres`
/// uses.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub dir: PathBuf,
    pub major: u32,
}

impl Binaries {
    /// The machine's own server, at least 13: `PGTANDEM_LEGACY_BIN`, else the oldest of Debian's.
    pub fn legacy() -> io::Result<Self> {
        Self::find("PGTANDEM_LEGACY_BIN", |found| found.first().cloned())
    }

    /// The newest server there is: `PGTANDEM_NEW_BIN`, else what `scripts/install-postgres` left.
    pub fn new_side() -> io::Result<Self> {
        Self::find("PGTANDEM_NEW_BIN", |found| found.last().cloned())
    }

    fn find(variable: &str, choose: impl Fn(&[Self]) -> Option<Self>) -> io::Result<Self> {
        if let Some(dir) = std::env::var_os(variable) {
            return Self::at(Path::new(&dir));
        }
        let mut found: Vec<Self> = candidate_dirs()
            .iter()
            .filter_map(|dir| Self::at(dir).ok())
            .filter(|binaries| binaries.major >= 13)
            .collect();
        found.sort_by_key(|binaries| binaries.major);
        choose(&found).ok_or_else(|| {
            io::Error::other(format!(
                "no Postgres server binaries found; run scripts/install-postgres or set {variable} to their folder"
            ))
        })
    }

    fn at(dir: &Path) -> io::Result<Self> {
        let output = Command::new(dir.join("postgres")).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let major = text
            .split_whitespace()
            .filter_map(|word| word.split('.').next()?.parse().ok())
            .next()
            .ok_or_else(|| io::Error::other(format!("{}: unreadable version {text:?}", dir.display())))?;
        Ok(Self {
            dir: dir.to_owned(),
            major,
        })
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Folders that hold pg_dump, wherever server binaries are looked for, and on PATH.
pub fn client_folders() -> Vec<PathBuf> {
    let mut folders = folders();
    folders.retain(|folder| folder.join("pg_dump").is_file());
    folders
}

fn candidate_dirs() -> Vec<PathBuf> {
    let mut dirs = folders();
    dirs.retain(|dir| dir.join("postgres").is_file() && dir.join("initdb").is_file());
    dirs
}

fn folders() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        dirs.push(entry.path().join("bin"));
    }
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        dirs.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    if let Some(path) = std::env::var_os("PATH") {
        dirs.extend(std::env::split_paths(&path));
    }
    let checkout = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for root in [checkout.join(".servers"), PathBuf::from("/var/cache/pgtandem")] {
        for list in ["new.path", "legacy.path"] {
            if let Ok(listed) = fs::read_to_string(root.join(list)) {
                dirs.push(PathBuf::from(listed.trim()));
            }
        }
    }
    dirs
}

/// How a throwaway server is set up; the default asks for SCRAM passwords, without TLS.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `name=value` pairs for postgresql.conf.
    pub settings: Vec<String>,
    pub authentication: Authentication,
    pub tls: Option<ServerTls>,
}

/// What pg_hba.conf asks of every connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Authentication {
    #[default]
    Scram,
    /// Passwords are stored as MD5 hashes, too: Postgres answers `md5` with SCRAM otherwise.
    Md5,
    Password,
    Trust,
}

impl Authentication {
    fn hba_method(self) -> &'static str {
        match self {
            Self::Scram => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Password => "password",
            Self::Trust => "trust",
        }
    }
}

/// The certificate chain and key that a server shows, as PEM. Its binaries must have been built
/// with OpenSSL, which those from PyPI are not.
#[derive(Clone)]
pub struct ServerTls {
    pub certificate_pem: String,
    pub key_pem: String,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

/// A running server. Dropping it stops the server and removes its directory.
pub struct Server {
    pub port: u16,
    pub major: u32,
    binaries: Binaries,
    settings: Vec<String>,
    directory: PathBuf,
    owner: Owner,
    running: Option<Child>,
    /// Last, for its drop removes the directory.
    watcher: Watcher,
}

/// The superuser of a throwaway server.
pub const SUPERUSER: &str = "postgres";

impl Server {
    /// [`Self::start_with`] the default options and these `name=value` settings.
    pub fn start(binaries: &Binaries, settings: &[&str]) -> io::Result<Self> {
        Self::start_with(
            binaries,
            &Options {
                settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
                ..Options::default()
            },
        )
    }

    /// Initialises a server and starts it on a free port of 127.0.0.1.
    pub fn start_with(binaries: &Binaries, options: &Options) -> io::Result<Self> {
        let owner = Owner::of_servers()?;
        // From here on the watcher removes it, in whatever way this function or process ends.
        let directory = tempfile::Builder::new()
            .prefix("pgtandem-server-")
            .tempdir_in(owner.temporary_root())?
            .keep();
        let watcher = Watcher::spawn(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
        owner.give(&directory)?;
        let mut server = Self {
            port: 0,
            major: binaries.major,
            binaries: binaries.clone(),
            settings: options.settings.clone(),
            directory,
            owner,
            running: None,
            watcher,
        };
        server.initdb(options.authentication)?;
        if let Some(tls) = &options.tls {
            server.install_certificate(tls)?;
        }
        // Another process may take the port before the server does; five in a row will not.
        for attempts_left in (0..5).rev() {
            server.port = free_port()?;
            match server.start_again() {
                Err(error) if attempts_left > 0 && is_port_taken(&error) => {}
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        Ok(server)
    }

    pub fn data_directory(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Where the data directory, the log and the Unix socket are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// `postgresql://role:secret@127.0.0.1:port/dbname`
    pub fn url(&self, role: &str, dbname: &str) -> String {
        format!("postgresql://{role}:{PASSWORD}@127.0.0.1:{}/{dbname}", self.port)
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.data_directory().join("postmaster.pid")).ok()?;
        text.lines().next()?.parse().ok()
    }

    /// Runs SQL as the superuser by psql, each statement a transaction of its own; the answers
    /// come unaligned, a row a line. The first error ends it.
    pub fn sql(&self, dbname: &str, sql: &str) -> io::Result<String> {
        let mut psql = self
            .owner
            .command(&self.binaries.program("psql"))
            .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align"])
            .args(["--set", "ON_ERROR_STOP=1", "--file", "-"])
            .arg("--dbname")
            .arg(format!(
                "host=127.0.0.1 port={} user={SUPERUSER} password={PASSWORD} dbname={dbname}",
                self.port
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        // psql reads all of its input only if it keeps up with its output: write from beside.
        let stdin = psql.stdin.take();
        let text = sql.to_owned();
        let writer = std::thread::spawn(move || {
            if let Some(mut stdin) = stdin {
                stdin.write_all(text.as_bytes()).ok();
            }
        });
        let output = psql.wait_with_output()?;
        writer.join().ok();
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
        } else {
            Err(io::Error::other(format!(
                "psql on {dbname}: {}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            )))
        }
    }

    /// Creates a role with [`PASSWORD`]; `attributes` are CREATE ROLE's (`LOGIN SUPERUSER`).
    pub fn create_role(&self, name: &str, attributes: &str) -> io::Result<()> {
        self.sql(
            "postgres",
            &format!(
                "CREATE ROLE {} {attributes} PASSWORD '{PASSWORD}'",
                quote_identifier(name)
            ),
        )?;
        Ok(())
    }

    /// Creates a database that belongs to `owner`.
    pub fn create_database(&self, name: &str, owner: &str) -> io::Result<()> {
        self.sql(
            "postgres",
            &format!(
                "CREATE DATABASE {} OWNER {}",
                quote_identifier(name),
                quote_identifier(owner)
            ),
        )?;
        Ok(())
    }

    /// Starts a stopped or killed server on its old port and directory, and waits until it
    /// accepts connections.
    pub fn start_again(&mut self) -> io::Result<()> {
        if let Some(mut killed) = self.running.take() {
            killed.wait()?;
        }
        // A killed postmaster's children take a moment to notice, and hold its shared memory.
        for _ in 0..100 {
            match self.start_once() {
                Err(error) if error.to_string().contains("shared memory block") => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                result => return result,
            }
        }
        self.start_once()
    }

    fn start_once(&mut self) -> io::Result<()> {
        let mut command = self.owner.command(&self.binaries.program("postgres"));
        command
            .arg("-D")
            .arg(self.data_directory())
            .args(["-p", &self.port.to_string(), "-h", "127.0.0.1"])
            .arg("-k")
            .arg(&self.directory);
        for setting in DEFAULT_SETTINGS
            .iter()
            .copied()
            .chain(self.settings.iter().map(String::as_str))
        {
            command.arg("-c").arg(setting);
        }
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.join("log"))?;
        let logged_before = log.metadata()?.len();
        // A group of its own: Ctrl-C at the terminal must reach it through us, in order.
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        self.watcher.watch(Some(child.id()))?;
        self.running = Some(child);
        self.wait_ready(logged_before)
    }

    /// `pg_ctl stop -m MODE` (smart, fast, immediate).
    pub fn stop(&mut self, mode: &str) -> io::Result<()> {
        let status = self
            .owner
            .command(&self.binaries.program("pg_ctl"))
            .arg("-D")
            .arg(self.data_directory())
            .args(["-w", "-m", mode, "stop"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            return Err(io::Error::other("pg_ctl stop failed"));
        }
        if let Some(mut child) = self.running.take() {
            child.wait()?;
        }
        self.watcher.watch(None)
    }

    fn initdb(&mut self, authentication: Authentication) -> io::Result<()> {
        let password_file = self.directory.join("password");
        fs::write(&password_file, PASSWORD)?;
        self.owner.give(&password_file)?;
        let initdb = self
            .owner
            .command(&self.binaries.program("initdb"))
            .arg("-D")
            .arg(self.data_directory())
            .args(["-U", SUPERUSER, "-E", "UTF8", "--locale=C", "--no-sync"])
            .args(["-A", authentication.hba_method()])
            .arg("--pwfile")
            .arg(&password_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        self.watcher.watch(Some(initdb.id()))?;
        let output = initdb.wait_with_output()?;
        self.watcher.watch(None)?;
        if output.status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "initdb failed: {}",
                String::from_utf8_lossy(&output.stderr)
            )))
        }
    }

    fn install_certificate(&mut self, tls: &ServerTls) -> io::Result<()> {
        for (file, setting, pem) in [
            ("server.crt", "ssl_cert_file", &tls.certificate_pem),
            ("server.key", "ssl_key_file", &tls.key_pem),
        ] {
            let path = self.directory.join(file);
            fs::write(&path, pem)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            self.owner.give(&path)?;
            self.settings.push(format!("{setting}={}", path.display()));
        }
        self.settings.push("ssl=on".to_owned());
        Ok(())
    }

    fn wait_ready(&mut self, logged_before: u64) -> io::Result<()> {
        // Sixty seconds bound a server that never comes up; a healthy one takes a fraction.
        for _ in 0..1200 {
            let ended = match &mut self.running {
                Some(child) => child.try_wait()?.is_some(),
                None => true,
            };
            if ended {
                self.running = None;
                let from = usize::try_from(logged_before).unwrap_or(0);
                let log = self.log().get(from..).unwrap_or_default().to_owned();
                return Err(io::Error::other(format!("the server did not start:\n{log}")));
            }
            // Its first line is the postmaster's id, its eighth says "ready" when connections
            // are accepted; a killed predecessor's file says so of the predecessor.
            let status = fs::read_to_string(self.data_directory().join("postmaster.pid")).unwrap_or_default();
            let ours = self.running.as_ref().map(|child| child.id().to_string());
            let mut lines = status.lines().map(str::trim);
            if lines.next().map(str::to_owned) == ours && lines.nth(6) == Some("ready") {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(io::Error::other(format!(
            "the server did not become ready:\n{}",
            self.log()
        )))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.watcher.stop_and_remove();
        if let Some(mut child) = self.running.take() {
            child.wait().ok();
        }
        self.watcher.wait();
    }
}

fn is_port_taken(error: &io::Error) -> bool {
    error.to_string().contains("Address already in use")
}

fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Durability off where a test does not crash the machine itself; small, since many run at once.
const DEFAULT_SETTINGS: &[&str] = &[
    "fsync=off",
    "shared_buffers=64MB",
    "max_connections=200",
    "max_prepared_transactions=20",
    "autovacuum_naptime=10s",
];

/// Who runs the servers: ourselves, or as root an unprivileged user.
enum Owner {
    Ourselves,
    User { uid: u32, gid: u32 },
}

impl Owner {
    fn of_servers() -> io::Result<Self> {
        if fs::metadata("/proc/self")?.uid() != 0 {
            return Ok(Self::Ourselves);
        }
        let users = fs::read_to_string("/etc/passwd")?;
        for wanted in ["postgres", "nobody"] {
            for line in users.lines() {
                let fields: Vec<&str> = line.split(':').collect();
                if let [name, _, uid, gid, ..] = fields[..]
                    && name == wanted
                    && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
                {
                    return Ok(Self::User { uid, gid });
                }
            }
        }
        Err(io::Error::other(
            "as root, the servers need an unprivileged user: neither postgres nor nobody is in /etc/passwd",
        ))
    }

    /// Where server directories go: the usual place for temporary files, unless the servers' user
    /// cannot enter it.
    fn temporary_root(&self) -> PathBuf {
        let usual = std::env::temp_dir();
        let enterable = |dir: &Path| fs::metadata(dir).is_ok_and(|metadata| metadata.mode() & 0o001 != 0);
        match self {
            Self::Ourselves => usual,
            Self::User { .. } if usual.ancestors().all(enterable) => usual,
            Self::User { .. } => PathBuf::from("/tmp"),
        }
    }

    fn give(&self, path: &Path) -> io::Result<()> {
        match *self {
            Self::Ourselves => Ok(()),
            Self::User { uid, gid } => chown(path, Some(uid), Some(gid)),
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // The caller's PGDATA, PGSSLMODE, … and ~/.postgresql are none of the servers' business.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        command.current_dir("/").env("HOME", "/").env("LC_ALL", "C");
        if let Self::User { uid, gid } = *self {
            command.uid(uid).gid(gid);
        }
        command
    }
}

/// A shell beside us that holds the other end of a pipe which nobody but us can write to. Each
/// line tells it the process that uses the directory now, or by being empty that there is none. When the pipe closes, because we drop
/// it or because we died in any way, it ends that process and removes the directory.
struct Watcher {
    shell: Child,
    pipe: Option<ChildStdin>,
}

/// SIGQUIT is Postgres' immediate shutdown; the postmaster then ends its children itself. A
/// zombie counts as gone, for whoever inherits it may never reap it.
const WATCH: &str = r#"
trap '' HUP INT TERM
pid=
while read -r line; do pid=$line; done
alive() { read -r _ _ state _ < "/proc/$pid/stat" && [ "$state" != Z ]; }
if [ -n "$pid" ]; then
    kill -QUIT "$pid"
    waited=0
    while alive && [ "$waited" -lt 200 ]; do sleep 0.05; waited=$((waited + 1)); done
    alive && kill -KILL "$pid"
fi
rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }
"#;

impl Watcher {
    fn spawn(directory: &Path) -> io::Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", WATCH, "pgtandem-watcher"])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, pipe })
    }

    fn watch(&mut self, pid: Option<u32>) -> io::Result<()> {
        let line = pid.map(|pid| pid.to_string()).unwrap_or_default();
        match &mut self.pipe {
            Some(pipe) => writeln!(pipe, "{line}"),
            None => Err(io::Error::other("the server's watcher has been told to end it")),
        }
    }

    fn stop_and_remove(&mut self) {
        self.pipe = None;
    }

    fn wait(&mut self) {
        self.shell.wait().ok();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop_and_remove();
        self.wait();
    }
}

/// A port of 127.0.0.1 on which nobody listens now. It lies below the range from which the
/// system picks the ports of outgoing connections, so that a stopped server finds its own free
/// again.
pub fn free_port() -> io::Result<u16> {
    for _ in 0..100 {
        let port = rand::random_range(15_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
