//! Throwaway Postgres servers on free loopback ports, for the demo and the tests: real
//! binaries, a directory of their own, gone when dropped.
//!
//! Postgres refuses to run as root, so as root the server runs as an unprivileged user. Each
//! server is started through [`Reaper`], a shell that waits for our end of a pipe to close: so
//! it goes away even if this process is killed with SIGKILL.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

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

fn candidate_dirs() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        dirs.push(entry.path().join("bin"));
    }
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for root in [manifest.join(".servers"), PathBuf::from("/var/cache/pgtandem")] {
        if let Ok(listed) = fs::read_to_string(root.join("new.path")) {
            dirs.push(PathBuf::from(listed.trim()));
        }
    }
    dirs
}

/// A running server. Dropping it stops the server and removes its directory.
pub struct Server {
    pub port: u16,
    pub major: u32,
    binaries: Binaries,
    settings: Vec<String>,
    directory: TempDir,
    running: Option<Reaper>,
}

/// The superuser of a throwaway server.
pub const SUPERUSER: &str = "postgres";

impl Server {
    /// Initialises and starts a server that asks for SCRAM passwords over TCP. `settings` are
    /// `name=value` pairs for postgresql.conf.
    pub fn start(binaries: &Binaries, settings: &[&str]) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("pgtandem-server-").tempdir()?;
        let owner = Owner::of_servers()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        owner.give(directory.path())?;
        let mut server = Self {
            port: free_port()?,
            major: binaries.major,
            binaries: binaries.clone(),
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            directory,
            running: None,
        };
        server.initdb(&owner)?;
        server.start_again()?;
        Ok(server)
    }

    pub fn data_directory(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
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

    /// Starts a stopped or killed server on its old port and directory, and waits until it
    /// accepts connections.
    pub fn start_again(&mut self) -> io::Result<()> {
        let owner = Owner::of_servers()?;
        let socket_dir = self.directory.path().to_owned();
        let mut command = owner.command(&self.binaries.program("postgres"));
        command
            .arg("-D")
            .arg(self.data_directory())
            .args(["-p", &self.port.to_string(), "-h", "127.0.0.1"])
            .arg("-k")
            .arg(&socket_dir);
        for setting in DEFAULT_SETTINGS
            .iter()
            .map(|&setting| setting.to_owned())
            .chain(self.settings.clone())
        {
            command.arg("-c").arg(setting);
        }
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        self.running = Some(Reaper::spawn(command)?);
        self.wait_ready()
    }

    /// `pg_ctl stop -m MODE` (smart, fast, immediate).
    pub fn stop(&mut self, mode: &str) -> io::Result<()> {
        let owner = Owner::of_servers()?;
        let status = owner
            .command(&self.binaries.program("pg_ctl"))
            .arg("-D")
            .arg(self.data_directory())
            .args(["-w", "-m", mode, "stop"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        self.running = None;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other("pg_ctl stop failed"))
        }
    }

    fn initdb(&self, owner: &Owner) -> io::Result<()> {
        let password_file = self.directory.path().join("password");
        fs::write(&password_file, PASSWORD)?;
        owner.give(&password_file)?;
        let output = owner
            .command(&self.binaries.program("initdb"))
            .arg("-D")
            .arg(self.data_directory())
            .args([
                "-U",
                SUPERUSER,
                "-A",
                "scram-sha-256",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ])
            .arg("--pwfile")
            .arg(&password_file)
            .output()?;
        if output.status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "initdb failed: {}",
                String::from_utf8_lossy(&output.stderr)
            )))
        }
    }

    fn wait_ready(&self) -> io::Result<()> {
        // Thirty seconds bound a server that never comes up; a healthy one takes a fraction.
        for _ in 0..600 {
            // postmaster.pid's eighth line says "ready" when connections are accepted.
            let status = fs::read_to_string(self.data_directory().join("postmaster.pid")).unwrap_or_default();
            if status.lines().nth(7).is_some_and(|line| line.trim() == "ready") {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(io::Error::other(format!("the server did not start:\n{}", self.log())))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The reaper stops it as well; this waits, so that the directory can be removed.
        if self.running.is_some() {
            self.stop("immediate").ok();
        }
    }
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

    fn give(&self, path: &Path) -> io::Result<()> {
        match *self {
            Self::Ourselves => Ok(()),
            Self::User { uid, gid } => chown(path, Some(uid), Some(gid)),
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/").env_remove("PGDATA").env("LC_ALL", "C");
        if let Self::User { uid, gid } = *self {
            command.uid(uid).gid(gid);
        }
        command
    }
}

/// A child that is stopped when its handle is dropped, and also when this process dies in any
/// way: a shell beside it reads from a pipe that only we hold open.
struct Reaper {
    child: Child,
    watcher: Child,
    _pipe: ChildStdin,
}

impl Reaper {
    fn spawn(mut command: Command) -> io::Result<Self> {
        // A group of its own: Ctrl-C at the terminal must reach it through us, in order.
        let child = command.stdin(Stdio::null()).process_group(0).spawn()?;
        let mut watcher = Command::new("sh")
            .arg("-c")
            .arg(format!("read -r _; kill -QUIT {} 2>/dev/null", child.id()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = watcher
            .stdin
            .take()
            .ok_or_else(|| io::Error::other("no pipe to the watcher"))?;
        Ok(Self {
            child,
            watcher,
            _pipe: pipe,
        })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self._pipe.write_all(b"\n").ok();
        self.watcher.wait().ok();
        self.child.wait().ok();
    }
}

/// A port nobody listens on now. Another process could take it in between; the servers' start
/// would then fail loudly.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
