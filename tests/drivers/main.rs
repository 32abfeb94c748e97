//! Real drivers against real servers, directly and through the proxy: a client must not be able
//! to tell the two apart.
//!
//! Each driver runs a fixed list of named behaviours and reports what the client observed, as
//! JSON without what differs between any two runs (process ids, ports, times). The lists of the
//! Python, JavaScript and Java drivers are scripts beside this file, those of tokio-postgres and
//! sqlx are modules here. A driver is run against each server directly, then through a proxy in
//! front of it, in the phases `initial` and `dual_write`, there also with commits acknowledged by
//! both sides; the reports must be equal.
//!
//! `scripts/install-drivers` installs the drivers; without it these tests fail and say so.
//! `DRIVER_ONLY=copy` runs only the behaviours with `copy` in their names.

mod driver;
mod pair;
mod proxy;
mod report;
mod sqlx_driver;
mod tokio_postgres_driver;

use driver::Driver;
use pair::{Endpoint, Pair, authority_and_certificate};
use proxy::Proxy;

/// What a proxy in front of a server changes for a client today, though it should not: driver,
/// phase, behaviour, and why. The tests insist that these do differ, so that a line goes when its
/// cause does.
const KNOWN_DIFFERENCES: &[(&str, &str, &str, &str)] = &[];

fn check(driver: Driver) {
    let (authority_pem, certificate) = authority_and_certificate();
    let pair = Pair::start(&certificate);
    let authority = pair.file("authority.crt", &authority_pem);
    let mut differences = Vec::new();
    for (served, other) in [(&pair.older, &pair.newer), (&pair.newer, &pair.older)] {
        let database = format!("shop{}", served.major);
        pair.create_databases(&database);
        let endpoint = pair::endpoint(served, &database);
        let direct = driver.run(&endpoint, served.binaries());
        report::refuse_unexpected(driver.name(), &direct);
        for (phase, acknowledge) in [
            ("initial", "primary"),
            ("dual_write", "primary"),
            ("dual_write", "both"),
        ] {
            if acknowledge == "both" && served.major != pair.older.major {
                continue;
            }
            let proxy = Proxy::start(served, other, &database, phase, acknowledge, &certificate);
            let through = driver.run(&proxy.endpoint(&database), served.binaries());
            let context = format!(
                "{} on {} in {phase}, acknowledged by {acknowledge}",
                driver.name(),
                served.major
            );
            differences.extend(report::differences(&context, driver, phase, &direct, &through));

            // TLS between client and server, against TLS between client and proxy. The newer
            // server's binaries are built without.
            if served.major == pair.older.major && phase == "initial" && driver.has_tls_list() {
                let with_tls = |endpoint: Endpoint| {
                    let tls_root = Some(authority.clone());
                    driver.run(&Endpoint { tls_root, ..endpoint }, served.binaries())
                };
                let direct = with_tls(endpoint.clone());
                report::refuse_unexpected(driver.name(), &direct);
                let through = with_tls(proxy.endpoint(&database));
                let context = format!("{context} with TLS");
                differences.extend(report::differences(&context, driver, phase, &direct, &through));
            }
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

#[test]
fn psql() {
    check(Driver::Psql);
}

#[test]
fn psycopg() {
    check(Driver::Psycopg);
}

#[test]
fn asyncpg() {
    check(Driver::Asyncpg);
}

#[test]
fn node_postgres() {
    check(Driver::NodePostgres);
}

#[test]
fn jdbc() {
    check(Driver::Jdbc);
}

#[test]
fn tokio_postgres() {
    check(Driver::TokioPostgres);
}

#[test]
fn sqlx() {
    check(Driver::Sqlx);
}
