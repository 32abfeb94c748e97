//! The throwaway servers themselves: they do what their options say, and are gone afterwards
//! however their process ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pgtandem::servers::{Authentication, Binaries, Options, PASSWORD, SUPERUSER, Server, ServerTls};

fn each_version(test: impl Fn(&Binaries)) {
    for binaries in [Binaries::legacy(), Binaries::new_side()] {
        test(&binaries.expect("server binaries"));
    }
}

fn is_running(pid: u32) -> bool {
    // A zombie has ended; only its parent has not looked yet.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

/// By the shell's own `kill`: the program of that name is not on every machine.
fn signal(name: &str, pid: u32) {
    let done = Command::new("sh")
        .args(["-c", &format!("kill -{name} {pid}")])
        .status()
        .expect("run sh");
    assert!(done.success());
}

/// Waits for what must come soon; gives up only where nobody would wait any longer.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1200 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("never: {what}");
}

#[test]
fn a_server_runs_stops_starts_again_and_is_removed() {
    each_version(|binaries| {
        let mut server = Server::start(binaries, &["work_mem=5MB"]).unwrap();
        server.create_role("app user", "LOGIN").unwrap();
        server.create_database("shop", "app user").unwrap();
        assert_eq!(server.sql("shop", "SHOW work_mem; SELECT 1, 2").unwrap(), "5MB\n1|2");
        assert!(
            server
                .sql("shop", "SELECT 1/0")
                .unwrap_err()
                .to_string()
                .contains("division by zero")
        );

        let (pid, port, directory) = (server.pid().unwrap(), server.port, server.directory().to_owned());
        server.stop("fast").unwrap();
        assert!(!is_running(pid));
        assert!(server.sql("shop", "SELECT 1").is_err());
        server.start_again().unwrap();
        assert_eq!(server.port, port);

        // As in a crash: no word to anyone.
        signal("KILL", server.pid().unwrap());
        server.start_again().unwrap();
        assert_eq!(server.sql("shop", "SELECT 1").unwrap(), "1");

        let pid = server.pid().unwrap();
        drop(server);
        assert!(!is_running(pid));
        assert!(!directory.exists());
    });
}

#[test]
fn each_authentication_method_is_asked_for() {
    let cases = [
        (Authentication::Scram, "SCRAM-SHA-256$", false),
        (Authentication::Md5, "md5", false),
        (Authentication::Password, "SCRAM-SHA-256$", false),
        (Authentication::Trust, "SCRAM-SHA-256$", true),
    ];
    each_version(|binaries| {
        for (authentication, stored, lets_anyone_in) in cases {
            let options = Options {
                authentication,
                ..Options::default()
            };
            let server = Server::start_with(binaries, &options).unwrap();
            let query = format!("SELECT rolpassword LIKE '{stored}%' FROM pg_authid WHERE rolname = '{SUPERUSER}'");
            assert_eq!(server.sql("postgres", &query).unwrap(), "t", "{authentication:?}");
            let wrong = Command::new(server.binaries().program("psql"))
                .args([
                    "-X",
                    "-c",
                    "SELECT 1",
                    "-d",
                    &server.url(SUPERUSER, "postgres").replace(PASSWORD, "wrong"),
                ])
                .output()
                .unwrap();
            assert_eq!(wrong.status.success(), lets_anyone_in, "{authentication:?}");
        }
    });
}

#[test]
fn a_server_shows_its_certificate() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let options = Options {
        tls: Some(ServerTls {
            certificate_pem: certified.cert.pem(),
            key_pem: certified.signing_key.serialize_pem(),
        }),
        ..Options::default()
    };
    // The newest server's binaries come without OpenSSL.
    let server = Server::start_with(&Binaries::legacy().unwrap(), &options).unwrap();
    let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(server.sql("postgres", query).unwrap(), "t");
}

/// The child of the test below: holds a server until it is killed. Alone it does nothing.
#[test]
fn child_that_holds_a_server() {
    if std::env::var_os("PGTANDEM_TEST_HOLD_SERVER").is_none() {
        return;
    }
    let server = Server::start(&Binaries::legacy().unwrap(), &[]).unwrap();
    let mut out = io::stdout();
    writeln!(out, "\nheld {} {}", server.pid().unwrap(), server.directory().display()).unwrap();
    out.flush().unwrap();
    // The parent holds the other end, so that this one ends with it whatever happens.
    io::stdin().lock().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn nothing_is_left_of_a_killed_process() {
    for name in ["KILL", "INT"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_holds_a_server", "--nocapture"])
            .env("PGTANDEM_TEST_HOLD_SERVER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let held = lines
            .map_while(Result::ok)
            .find(|line| line.starts_with("held "))
            .expect("the child's server");
        let mut words = held.split(' ').skip(1);
        let pid: u32 = words.next().unwrap().parse().unwrap();
        let directory = Path::new(words.next().unwrap());
        assert!(is_running(pid) && directory.exists());

        signal(name, child.id());
        child.wait().unwrap();
        eventually("the server ends", || !is_running(pid));
        eventually("the directory goes", || !directory.exists());
    }
}
