"""The processes of the benchmark: two servers, PgBouncer, pgtandem. All listen on free loopback
ports, live in one throwaway directory, and end with this process, whatever ends it."""

import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PASSWORD = "secret"
# The loads' role, and the proxy's own.
CLIENT, PROXY = "bench", "pgtandem"


def raise_file_limit():
    """A thousand sessions are two thousand sockets in a proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def eventually(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise SystemExit(f"bench: {what} did not happen within {seconds} s")


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


class Workshop:
    """The throwaway directory, and every process that was started."""

    def __init__(self):
        raise_file_limit()
        self.directory = tempfile.mkdtemp(prefix="pgtandem-bench-")
        self.processes = []
        # Neither Postgres nor PgBouncer runs as root.
        self.user = None
        if os.geteuid() == 0:
            self.user = next(pwd.getpwnam(name) for name in ("postgres", "nobody") if name in {p.pw_name for p in pwd.getpwall()})
        os.chmod(self.directory, 0o755)
        self.give(self.directory)

    def give(self, path):
        if self.user:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def subdirectory(self, name):
        path = os.path.join(self.directory, name)
        os.mkdir(path)
        self.give(path)
        return path

    def unprivileged(self, command):
        if not self.user:
            return command
        return ["setpriv", f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups", "--", *command]

    def start(self, command, log, end_with, unprivileged=True, environment=None):
        """Starts a process of its own group; the kernel sends it `end_with` when we die."""
        command = ["setpriv", "--pdeathsig", end_with, "--", *command]
        with open(log, "ab") as output:
            process = subprocess.Popen(
                self.unprivileged(command) if unprivileged else command,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True, env=environment,
            )  # fmt: skip
        process.end_with = getattr(signal, f"SIG{end_with}")
        process.log = log
        self.processes.append(process)
        return process

    def stop(self, process):
        if process.poll() is None:
            process.send_signal(process.end_with)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.remove(process)

    def close(self):
        for process in reversed(list(self.processes)):
            self.stop(process)
        shutil.rmtree(self.directory, ignore_errors=True)


def environment(**extra):
    """Ours, without what libpq would read from it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "PGPASSWORD": PASSWORD, "LC_ALL": "C", "HOME": "/", **extra}


class Server:
    """A Postgres server with the roles of the loads and of the proxy."""

    def __init__(self, workshop, binaries, name, fsync, **more):
        self.binaries, self.name, self.port = binaries, name, free_port()
        directory = workshop.subdirectory(name)
        data = os.path.join(directory, "data")
        password = os.path.join(directory, "password")
        with open(password, "w") as file:
            file.write(PASSWORD)
        workshop.give(password)
        subprocess.run(
            workshop.unprivileged([
                f"{binaries}/initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync",
                "--pwfile", password,
            ]),
            check=True, stdout=subprocess.DEVNULL, cwd="/", env=environment(),
        )  # fmt: skip
        settings = {
            "shared_buffers": "256MB", "max_connections": "2400", "max_wal_size": "4GB", "checkpoint_timeout": "30min",
            "fsync": "on" if fsync else "off", "autovacuum_naptime": "10s", "max_prepared_transactions": "10", **more,
        }  # fmt: skip
        options = [part for item in settings.items() for part in ("-c", "=".join(item))]
        self.process = workshop.start(
            [f"{binaries}/postgres", "-D", data, "-p", str(self.port), "-h", "127.0.0.1", "-k", directory, *options],
            os.path.join(directory, "log"), "QUIT", environment=environment(),
        )  # fmt: skip
        eventually(f"the start of the {name} server", lambda: self.ready())
        self.version = self.sql("SHOW server_version").split()[0]
        self.sql(f"CREATE ROLE {CLIENT} LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE {PROXY} LOGIN SUPERUSER PASSWORD '{PASSWORD}'")

    def ready(self):
        if self.process.poll() is not None:
            raise SystemExit(f"bench: the {self.name} server ended:\n{open(self.process.log).read()}")
        done = subprocess.run(
            [f"{self.binaries}/psql", "-X", "-c", "SELECT 1", "-d", self.conninfo("postgres", "postgres")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        return done.returncode == 0

    def conninfo(self, user, dbname):
        return f"host=127.0.0.1 port={self.port} user={user} dbname={dbname} sslmode=disable"

    def url(self, user, dbname):
        return f"postgresql://{user}:{PASSWORD}@127.0.0.1:{self.port}/{dbname}"

    def sql(self, statements, dbname="postgres"):
        done = subprocess.run(
            [f"{self.binaries}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.conninfo("postgres", dbname), "-f", "-"],
            input=statements, capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"bench: psql on {self.name}: {done.stderr}")
        return done.stdout.strip()

    def create_database(self, name):
        self.sql(f"CREATE DATABASE {name} OWNER {CLIENT}")


class PgBouncer:
    """Session mode, one server connection for each client, as pgtandem does it."""

    def __init__(self, workshop, program, server):
        self.port = free_port()
        directory = workshop.subdirectory("pgbouncer")
        with open(os.path.join(directory, "users"), "w") as file:
            file.write(f'"{CLIENT}" "{PASSWORD}"\n')
        config = os.path.join(directory, "pgbouncer.ini")
        with open(config, "w") as file:
            file.write(
                f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\n"
                f"unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {directory}/users\npool_mode = session\n"
                "max_client_conn = 1300\ndefault_pool_size = 1300\nlog_connections = 0\nlog_disconnections = 0\nlog_stats = 0\n"
            )
        self.process = workshop.start([program, config], os.path.join(directory, "log"), "INT")
        eventually("the start of PgBouncer", lambda: accepts(self.port))
        self.version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split("\n")[0]


class Pgpool:
    """pgpool-II in native replication: every statement that may write runs on both servers."""

    def __init__(self, workshop, program, legacy, new):
        self.port = free_port()
        directory = workshop.subdirectory("pgpool")
        config = os.path.join(directory, "pgpool.conf")
        backends = "".join(
            f"backend_hostname{number} = '127.0.0.1'\nbackend_port{number} = {server.port}\nbackend_weight{number} = 1\n"
            f"backend_flag{number} = 'DISALLOW_TO_FAILOVER'\nbackend_data_directory{number} = '{directory}'\n"
            for number, server in enumerate((legacy, new))
        )
        with open(config, "w") as file:
            file.write(
                f"backend_clustering_mode = 'native_replication'\nlisten_addresses = '127.0.0.1'\nport = {self.port}\n"
                f"socket_dir = '{directory}'\npcp_listen_addresses = ''\npcp_port = {free_port()}\npcp_socket_dir = '{directory}'\n"
                f"wd_ipc_socket_dir = '{directory}'\npid_file_name = '{directory}/pgpool.pid'\nlogdir = '{directory}'\n{backends}"
                "num_init_children = 80\nmax_pool = 1\nload_balance_mode = off\nreplicate_select = off\ninsert_lock = on\n"
                "enable_pool_hba = off\npool_passwd = ''\nallow_clear_text_frontend_auth = on\nsr_check_period = 0\n"
                "health_check_period = 0\nuse_watchdog = off\nmemory_cache_enabled = off\n"
            )
        for name in ("pcp.conf", "pool_hba.conf"):
            open(os.path.join(directory, name), "w").close()
        self.process = workshop.start(
            [program, "-n", "-f", config, "-F", f"{directory}/pcp.conf", "-a", f"{directory}/pool_hba.conf"],
            os.path.join(directory, "log"), "INT",
        )  # fmt: skip
        eventually("the start of pgpool-II", lambda: accepts(self.port))
        done = subprocess.run([program, "--version"], capture_output=True, text=True)
        self.version = (done.stdout + done.stderr).split("\n")[0]


class Pgtandem:
    """`pgtandem serve` in a phase, for one database of the two servers."""

    def __init__(self, workshop, program, legacy, new, dbname, phase, worker_threads=0, name=None, more=""):
        self.program, self.port, self.admin_port = program, free_port(), free_port()
        directory = workshop.subdirectory(f"pgtandem-{name or phase}")
        self.config = os.path.join(directory, "proxy.yaml")
        with open(self.config, "w") as file:
            file.write(
                f"listen: 127.0.0.1:{self.port}\nadmin: 127.0.0.1:{self.admin_port}\nphase: {phase}\ndatabases:\n"
                f"  {dbname}:\n    legacy: {legacy.url(PROXY, dbname)}\n    new: {new.url(PROXY, dbname)}\n"
                f"auth:\n  users: {{ {CLIENT}: {PASSWORD} }}\nlimits:\n  max_connections: 1300\n  worker_threads: {worker_threads}\n{more}"
            )
        self.workshop, self.directory, self.phase = workshop, directory, phase
        self.start()

    def start(self):
        log = os.path.join(self.directory, "log")
        self.process = self.workshop.start([self.program, "serve", "--config", self.config], log, "TERM", unprivileged=False)
        eventually(f"readiness of pgtandem in {self.phase}", self.is_ready)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.workshop.processes.remove(self.process)

    def is_ready(self):
        if self.process.poll() is not None:
            raise SystemExit(f"bench: pgtandem ended:\n{open(self.process.log).read()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/readyz", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait_caught_up(self, seconds):
        """Returns how long it took until all that is committed now was on the other side."""
        start = time.monotonic()
        done = subprocess.run(
            [self.program, "wait", "--caught-up", "--config", self.config], capture_output=True, text=True, timeout=seconds
        )
        if done.returncode != 0:
            raise SystemExit(f"bench: pgtandem wait --caught-up: {done.stdout}{done.stderr}\n{open(self.process.log).read()[-3000:]}")
        return time.monotonic() - start


def cpu_seconds(process):
    """User and system time of a process and its threads so far."""
    with open(f"/proc/{process.pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def server_cpu_seconds(server):
    """Of a server: the postmaster, its children that live, and those that are gone."""
    with open(f"/proc/{server.process.pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    ticks = sum(int(field) for field in fields[11:15])
    children = open(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(pid_cpu_seconds(pid) for pid in children)


def pid_cpu_seconds(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0


def memory_kb(process):
    """Resident and proportional set size."""
    found = {}
    for path, name in (("status", "VmRSS"), ("smaps_rollup", "Pss")):
        with open(f"/proc/{process.pid}/{path}") as file:
            found[name] = next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))
    return found["VmRSS"], found["Pss"]


def peak_memory_mb(process):
    """The most that was ever resident."""
    with open(f"/proc/{process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
