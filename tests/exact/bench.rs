//! Runs a table of cases, each in a schema of its own, and looks at both databases after each.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, future::join_all};
use pgtandem::admin::api::WaitAnswer;
use pgtandem::catalog::compare::rows_different;
use pgtandem::catalog::definitions::definitions_different;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::{Binaries, SUPERUSER};
use tokio_postgres::{Client, SimpleQueryMessage, Statement};

use crate::rig::{APP, OWN_ROLE, Rig};

/// A named list of what a client does.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) steps: &'static [Step],
}

/// One thing that a client does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// One Query.
    Q(&'static str),
    /// Parse, Bind, Execute.
    X(&'static str),
    /// A Query that fails with this SQLSTATE.
    Fails(&'static str, &'static str),
    /// The same by the extended protocol.
    XFails(&'static str, &'static str),
    /// A Query whose first row's first value is this.
    Is(&'static str, &'static str),
    /// COPY FROM STDIN with this data; an SQLSTATE if it fails.
    Copy(&'static str, &'static [u8], Option<&'static str>),
    /// Prepares under a name; runs it.
    Prepare(&'static str, &'static str),
    Run(&'static str),
    /// Sent without waiting for each other's answers.
    Pipeline(&'static [&'static str]),
    /// From here on by another session (each index is one).
    Session(usize),
    /// By the superuser, past the proxy, on both sides: what a DBA does.
    Dba(&'static str),
    /// Waits until the secondary has everything.
    CaughtUp,
}

pub(crate) const fn case(name: &'static str, steps: &'static [Step]) -> Case {
    Case { name, steps }
}

/// Roles that cases use, besides the application's own.
const ROLES: &str = "
    CREATE ROLE reader; CREATE ROLE writer; CREATE ROLE bare;
    GRANT reader, writer, bare TO app; GRANT reader, writer, bare TO pgtandem";

pub(crate) async fn run(new: Binaries, cases: &[Case]) {
    run_as(new, cases, "").await;
}

/// With more for the proxy's role: `attributes` of ALTER ROLE.
pub(crate) async fn run_as(new: Binaries, cases: &[Case], attributes: &str) {
    let wanted = std::env::var("PGTANDEM_CASES").unwrap_or_default();
    let mut rig = Rig::between(&Binaries::legacy().unwrap(), &new);
    for side in [Side::Legacy, Side::New] {
        rig.server(side).sql("postgres", ROLES).unwrap();
        let alter = format!("ALTER ROLE {OWN_ROLE} LOGIN {attributes}");
        rig.server(side).sql("postgres", &alter).unwrap();
    }
    rig.serve(Phase::DualWrite).await;
    let mut failures = Vec::new();
    for (index, case) in cases.iter().enumerate().filter(|(_, case)| case.name.contains(&wanted)) {
        let schema = format!("c{index}");
        let outcome = AssertUnwindSafe(check(&rig, case, &schema)).catch_unwind().await;
        let Err(problem) = outcome else { continue };
        let text = problem
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "a panic without a text".to_owned());
        failures.push(format!("== {}\n{text}", case.name));
        // The next case begins on clean databases, whatever this one left.
        fresh(&mut rig).await;
    }
    assert!(
        failures.is_empty(),
        "{} of {} cases failed:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

async fn fresh(rig: &mut Rig) {
    rig.kill_proxy();
    for server in [&rig.legacy, &rig.new] {
        server.sql("postgres", "DROP DATABASE shop WITH (FORCE)").unwrap();
        Rig::create_database(server);
    }
    rig.serve(Phase::DualWrite).await;
}

async fn check(rig: &Rig, case: &Case, schema: &str) {
    let mut sessions: HashMap<usize, Client> = HashMap::new();
    let mut statements: HashMap<&str, Statement> = HashMap::new();
    let mut at = 0;
    sessions.insert(0, begin(rig, schema, true).await);
    for step in case.steps {
        match *step {
            Step::Session(index) => {
                at = index;
                if let Entry::Vacant(entry) = sessions.entry(index) {
                    entry.insert(begin(rig, schema, false).await);
                }
            }
            Step::CaughtUp => caught_up(rig).await,
            Step::Dba(sql) => {
                for side in [Side::Legacy, Side::New] {
                    let dba = rig.direct(side, SUPERUSER).await;
                    dba.batch_execute(&format!("SET search_path = {schema}, public"))
                        .await
                        .unwrap();
                    if side == Side::New {
                        // Past the fence that event triggers are, where there are any.
                        dba.batch_execute("SET session_replication_role = replica")
                            .await
                            .unwrap();
                    }
                    dba.batch_execute(sql).await.unwrap();
                    // An event trigger may have it mirrored: not at the same moment as by hand.
                    caught_up(rig).await;
                }
            }
            Step::Prepare(name, sql) => {
                let statement = sessions[&at].prepare(sql).await;
                statements.insert(
                    name,
                    statement.unwrap_or_else(|error| panic!("prepare {sql}: {error:?}")),
                );
            }
            Step::Run(name) => {
                let done = sessions[&at].execute(&statements[name], &[]).await;
                done.unwrap_or_else(|error| panic!("run {name}: {error:?}"));
            }
            step => take(&sessions[&at], step).await,
        }
    }
    assert_identical(rig).await;
    // What a case leaves goes as an application would remove it.
    drop(sessions);
    let client = rig.client().await;
    client
        .batch_execute(&format!("DROP SCHEMA {schema} CASCADE"))
        .await
        .unwrap_or_else(|error| panic!("drop the schema: {error:?}"));
    assert_identical(rig).await;
}

async fn begin(rig: &Rig, schema: &str, create: bool) -> Client {
    let client = rig.client().await;
    if create {
        let sql = format!(
            "CREATE SCHEMA {schema}; GRANT USAGE ON SCHEMA {schema} TO reader, writer, bare; GRANT CREATE ON SCHEMA {schema} TO writer"
        );
        client.batch_execute(&sql).await.unwrap();
    }
    client
        .batch_execute(&format!("SET search_path = {schema}, public"))
        .await
        .unwrap();
    client
}

async fn take(client: &Client, step: Step) {
    let failed = |sql: &str, error: tokio_postgres::Error| -> () { panic!("{sql}: {error:?}") };
    let expected = |sql: &str, wanted: &str, result: Result<(), tokio_postgres::Error>| match result {
        Ok(()) => panic!("{sql}: succeeded, {wanted} was expected"),
        Err(error) => {
            let code = error.code().map(|code| code.code().to_owned());
            assert_eq!(code.as_deref(), Some(wanted), "{sql}: {error:?}");
        }
    };
    match step {
        Step::Q(sql) => client
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| failed(sql, error)),
        Step::X(sql) => {
            let done = client.execute(sql, &[]).await.map(drop);
            done.unwrap_or_else(|error| failed(sql, error));
        }
        Step::Fails(code, sql) => expected(sql, code, client.batch_execute(sql).await),
        Step::XFails(code, sql) => expected(sql, code, client.execute(sql, &[]).await.map(drop)),
        Step::Is(sql, value) => {
            let messages = client.simple_query(sql).await;
            let messages = messages.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            let found = messages.iter().find_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL")),
                _ => None,
            });
            assert_eq!(found, Some(value), "{sql}");
        }
        Step::Copy(sql, data, code) => {
            let sink = client.copy_in::<_, Bytes>(sql).await;
            let sink = sink.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            futures_util::pin_mut!(sink);
            sink.send(Bytes::from_static(data)).await.unwrap();
            let done = sink.finish().await.map(drop);
            match code {
                None => done.unwrap_or_else(|error| failed(sql, error)),
                Some(code) => expected(sql, code, done),
            }
        }
        Step::Pipeline(list) => {
            for (sql, done) in list
                .iter()
                .zip(join_all(list.iter().map(|sql| client.batch_execute(sql))).await)
            {
                done.unwrap_or_else(|error| failed(sql, error));
            }
        }
        Step::Prepare(..) | Step::Run(_) | Step::Session(_) | Step::Dba(_) | Step::CaughtUp => {}
    }
}

async fn caught_up(rig: &Rig) {
    let answer: WaitAnswer = rig.admin().get("/api/v1/wait?timeout_ms=15000").await.unwrap();
    if !answer.caught_up {
        let status = rig.status().await.unwrap();
        panic!("not caught up: {:?}", status.databases[0].mirroring);
    }
}

/// Rows and definitions are the same, and every table counts as synced.
pub(crate) async fn assert_identical(rig: &Rig) {
    caught_up(rig).await;
    let legacy = rig.direct(Side::Legacy, SUPERUSER).await;
    let new = rig.direct(Side::New, SUPERUSER).await;
    let mut problems: Vec<String> = Vec::new();
    problems.extend(
        definitions_different(&legacy, &new)
            .await
            .unwrap()
            .iter()
            .map(ToString::to_string),
    );
    problems.extend(
        rows_different(&legacy, &new)
            .await
            .unwrap()
            .iter()
            .map(ToString::to_string),
    );
    let status = rig.status().await.unwrap();
    let mirroring = status.databases[0].mirroring.clone().unwrap();
    for table in mirroring
        .tables
        .iter()
        .filter(|table| table.seeding != "synced" || table.paused.is_some())
    {
        problems.push(format!("{table:?}"));
    }
    if mirroring.divergences > 0 {
        let rows = new.query(
            "SELECT format('divergence: %s %s %s', name, kind, key) FROM pgtandem.divergence",
            &[],
        );
        problems.extend(rows.await.unwrap().iter().map(|row| row.get::<_, String>(0)));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Past the proxy, as the application's role.
pub(crate) async fn as_app(rig: &Rig, side: Side) -> Client {
    rig.direct(side, APP).await
}
