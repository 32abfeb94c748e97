//! What the shadow is shown of reads.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgtandem::control::Phase;
use pgtandem::session::hooks::{Asked, Call, Hooks, Observer, Read, Shadow};
use pgtandem::shadow::{Outcome, Timing};
use pgtandem::sql::Script;
use pgtandem::wire::frontend;

use crate::common::{Options, Proxy, extended};

/// Writes down what it is shown, one line for each read.
#[derive(Default)]
struct Witness {
    seen: Arc<Mutex<Vec<String>>>,
}

struct Notes {
    line: String,
    bytes: usize,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Shadow for Witness {
    fn wanted(&self) -> bool {
        true
    }

    fn sampled(&self, asked: &Asked<'_>) -> bool {
        assert_eq!((asked.database, asked.user), ("shadowed", "app"));
        !asked.text.ends_with(b"-- not me")
    }

    fn passed_over(&self, _database: &str, _script: &Script, text: &[u8], why: Outcome) {
        let (_, why) = why.labels();
        let line = format!("passed over {why}: {}", String::from_utf8_lossy(text));
        self.seen.lock().unwrap().push(line);
    }

    fn may_write(&self, _database: &str, text: &[u8]) -> bool {
        text.starts_with(b"select audit")
    }

    fn observe(&self, read: &Read<'_>) -> Option<Box<dyn Observer>> {
        // It knows no kinds of statements.
        read.script?;
        let call = match read.call {
            Call::Simple => "simple".to_owned(),
            Call::Extended { types, values } => format!("extended({}, {})", types.len() / 4, values.len()),
            Call::Prepared { name, prepare, execute } => {
                let text = |text| String::from_utf8_lossy(text).into_owned();
                format!("{name}[{} / {}]", text(prepare), text(execute))
            }
        };
        let settings = read
            .settings
            .map_or(-1, |settings| i64::try_from(settings.len()).unwrap());
        let line = format!(
            "{call} {} {} settings={settings}{} {}: ",
            if read.in_transaction { "within" } else { "alone" },
            if read.after_write { "after-write" } else { "-" },
            if read.temporary.is_empty() {
                String::new()
            } else {
                format!(" temporary={}", read.temporary.join(","))
            },
            String::from_utf8_lossy(read.text),
        );
        Some(Box::new(Notes {
            line,
            bytes: 0,
            seen: self.seen.clone(),
        }))
    }
}

impl Observer for Notes {
    fn begin(&mut self, kind: u8) {
        self.line.push(char::from(kind));
    }

    fn piece(&mut self, body: &[u8]) {
        self.bytes += body.len();
    }

    fn end(&mut self) {}

    fn complete(mut self: Box<Self>, timing: Timing) {
        assert!(timing.total > Duration::ZERO);
        assert!(timing.first_row.is_none_or(|first| first <= timing.total));
        self.line.push_str(&format!(" {}", self.bytes > 1_000_000));
        self.seen.lock().unwrap().push(std::mem::take(&mut self.line));
    }

    fn give_up(self: Box<Self>, why: Outcome) {
        let (_, why) = why.labels();
        self.seen.lock().unwrap().push(format!("given up {why}: {}", self.line));
    }
}

#[tokio::test]
async fn reads_are_shown_with_what_is_needed_to_repeat_them() {
    let witness = Witness::default();
    let seen = witness.seen.clone();
    let options = Options {
        phase: Phase::DualRead,
        hooks: Hooks {
            shadow: Some(Arc::new(witness)),
            ..Hooks::default()
        },
        ..Options::default()
    };
    let proxy = Proxy::start("shadowed", options).await;
    let mut raw = proxy.client().await;
    for text in [
        "create table t (x int)",
        "select 1",
        "select 2 -- not me",
        "insert into t values (1)",
        "insert into t values (2) returning x",
        "set work_mem = '5MB'",
        "set no_such_setting = 1",
        "select 3",
        "select 1/(x-1) from t",
        "begin",
        "select 4",
        "update t set x = 3",
        "select 5",
        "set timezone = 'UTC'",
        "select 6",
        "commit",
        "select 7; select 8",
        "reset all",
        "select repeat('x', 2000000)",
    ] {
        raw.query(text).await;
    }
    let mut out = extended("", "select 9");
    frontend::put_parse(&mut out, b"s", b"select $1::int", &23_u32.to_be_bytes());
    frontend::put_bind(&mut out, b"p", b"s", &[Some(b"10")]);
    frontend::put_execute(&mut out, b"p");
    out.extend_from_slice(frontend::SYNC);
    raw.send(&out).await;
    assert_eq!(raw.kinds().await, "12TDC12DCZ");
    assert_eq!(
        *seen.lock().unwrap(),
        [
            "simple alone - settings=0 select 1: TDC false",
            "simple alone - settings=1 select 3: TDC false",
            "simple alone - settings=1 select 1/(x-1) from t: TE false",
            "simple within - settings=1 select 4: TDC false",
            "simple within after-write settings=1 select 5: TDC false",
            "simple within after-write settings=-1 select 6: TDC false",
            "passed over several_statements: select 7; select 8",
            "simple alone - settings=0 select repeat('x', 2000000): TDC true",
            // One observer at a time: the second of the batch is passed over.
            "passed over pipelined: select $1::int",
            "extended(0, 6) alone - settings=0 select 9: DC false",
        ]
    );
}
