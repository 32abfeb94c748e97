//! `pgtandem mismatches`: reads the log itself, so it answers whether or not a proxy runs.

use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;

use super::quarantine::Word;
use super::{Common, Output, client, load, plans, print_json, print_line, say};
use crate::admin::api::{AcknowledgeRequest, Recorded};
use crate::admin::client::AdminError;
use crate::chain::{self, Chain, Follower};
use crate::config::{self, Config};
use crate::shadow::{
    Acknowledgement, Filter, Kind, LogContents, Parsed, by_fingerprint, events, is_acknowledged,
    is_slower_acknowledged, parse, read_log,
};

/// Between two looks at the log for new lines.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// One by one instead of by fingerprint.
    #[arg(long)]
    each: bool,
    /// Only since this time (RFC 3339), or this long ago (10min, 2h, 7d).
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only fingerprints that begin so.
    #[arg(long, value_name = "ID")]
    fingerprint: Option<String>,
    /// Only this kind: value, missing_row, extra_row, error, …; slower, which is no wrong answer and
    /// makes exit 1 only when it is asked for.
    #[arg(long, value_name = "KIND", value_parser = kind)]
    kind: Option<Kind>,
    /// Print new ones as they are confirmed, until Ctrl-C.
    #[arg(long, conflicts_with_all = ["since", "verify_log"])]
    follow: bool,
    /// Check the chain of all files, line by line, and say where it breaks. Exit 1 when it does.
    #[arg(long, conflicts_with_all = ["each", "since", "fingerprint", "kind"])]
    verify_log: bool,
    /// With it: that this head, which a report or `status` told (the hash of a line, 64 hex digits), is in
    /// the log or right before its first line. So an end that was cut off is found, too.
    #[arg(long, value_name = "HASH", requires = "verify_log", value_parser = hash)]
    head: Option<String>,
    /// Ask the running proxy for both sides' plans, of this fingerprint or of all statements that are
    /// slower on new.
    #[arg(long, conflicts_with_all = ["each", "since", "kind", "follow", "verify_log"])]
    explain: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Record that mismatches were looked at and may stand: all of a fingerprint so far, or one.
    Ack(Ack),
}

#[derive(Args)]
struct Ack {
    /// As `mismatches` shows it, or its beginning.
    #[arg(required_unless_present = "line", conflicts_with = "line")]
    fingerprint: Option<String>,
    /// Of this kind alone.
    #[arg(long, value_name = "KIND", value_parser = kind, requires = "fingerprint")]
    kind: Option<Kind>,
    /// The number of one mismatch (#17).
    #[arg(long, value_name = "NUMBER")]
    line: Option<u64>,
    #[command(flatten)]
    word: Word,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
}

fn hash(text: &str) -> Result<String, String> {
    let right = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    right
        .then(|| text.to_lowercase())
        .ok_or_else(|| "64 hex digits, as a report and `status --json` have them".into())
}

/// A kind by its name in the log.
fn kind(text: &str) -> Result<Kind, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    if let Some(Action::Ack(ack)) = arguments.action {
        return acknowledge(ack).await;
    }
    if arguments.explain {
        let client = client(&arguments.common)?;
        return plans::run(&client, arguments.output.json, arguments.fingerprint.as_deref()).await;
    }
    let config = load(&arguments.common)?;
    if arguments.verify_log {
        return verify(&config, arguments.head.as_deref(), arguments.output.json);
    }
    let since = arguments
        .since
        .map(|text| Filter::parse_since(&text, OffsetDateTime::now_utc()))
        .transpose()
        .map_err(|error| anyhow!("--since: {error}"))?;
    let filter = Filter {
        since,
        fingerprint: arguments.fingerprint,
        kind: arguments.kind,
    };
    let path = &config.mismatch_log.path;
    if arguments.follow {
        return follow(path, &filter, arguments.output.json).await;
    }
    let contents = read(path, &filter)?;
    let slower_asked = filter.kind == Some(Kind::Slower);
    match (arguments.output.json, slower_asked) {
        (true, true) => print_json(&contents.slower)?,
        (json, _) => print(&contents, json, arguments.each)?,
    }
    Ok(is_settled(&contents, slower_asked))
}

/// Whether somebody acknowledged all of it. Slowness is no wrong answer, so it counts only where it
/// was asked for.
fn is_settled(contents: &LogContents, slower_too: bool) -> bool {
    let acknowledgements = &contents.acknowledgements;
    let mut slower = contents.slower.iter().filter(|_| slower_too);
    let mut mismatches = contents.mismatches.iter();
    mismatches.all(|one| is_acknowledged(one, acknowledgements).is_some())
        && slower.all(|one| is_slower_acknowledged(one, acknowledgements).is_some())
}

fn read(path: &Path, filter: &Filter) -> anyhow::Result<LogContents> {
    read_log(path, filter).with_context(|| format!("read the mismatch log {}", path.display()))
}

fn print(contents: &LogContents, json: bool, each: bool) -> anyhow::Result<()> {
    let summaries = by_fingerprint(&contents.mismatches, &contents.acknowledgements);
    match (json, each) {
        (true, true) => return print_json(contents),
        (true, false) => return print_json(&summaries),
        (false, true) => {
            for mismatch in &contents.mismatches {
                print_line(mismatch);
            }
        }
        (false, false) => {
            for summary in &summaries {
                say(&summary.to_string());
            }
        }
    }
    if contents.mismatches.is_empty() {
        say("no mismatches");
    }
    if !contents.slower.is_empty() {
        say("slower on new (no wrong answers; `mismatches --explain` asks for both plans):");
        for slower in &contents.slower {
            say(&format!("{}  {}", slower.fingerprint, slower.statement));
            say(slower.to_string().trim_end());
            if let Some(Acknowledgement { by, reason, .. }) = is_slower_acknowledged(slower, &contents.acknowledgements)
            {
                say(&format!("    acknowledged by {by}: {reason}"));
            }
        }
    }
    if contents.unreadable_lines > 0 {
        say(&format!(
            "{} lines of the log could not be read (a torn last line, or a newer version's): see --verify-log",
            contents.unreadable_lines
        ));
    }
    Ok(())
}

/// Until the process is ended.
async fn follow(path: &Path, filter: &Filter, json: bool) -> anyhow::Result<bool> {
    let doing = || format!("follow the mismatch log {}", path.display());
    let mut follower = Follower::from_end(path).with_context(doing)?;
    loop {
        for line in follower.ready().with_context(doing)? {
            match parse(&line) {
                Some(Parsed::Mismatch(mismatch)) if filter.wants(&mismatch) => {
                    print_one(&*mismatch, &mismatch.fingerprint, &mismatch.statement, json);
                }
                Some(Parsed::Slower(slower)) if filter.wants_slower(&slower) => {
                    print_one(&*slower, &slower.fingerprint, &slower.statement, json);
                }
                _ => {}
            }
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

fn print_one(line: &(impl Display + Serialize), fingerprint: &str, statement: &str, json: bool) {
    if json {
        print_line(line);
    } else {
        say(&format!("{fingerprint}  {statement}"));
        say(line.to_string().trim_end());
    }
}

fn verify(config: &Config, head: Option<&str>, json: bool) -> anyhow::Result<bool> {
    let log = &config.mismatch_log;
    let verified = chain::verify_against(&log.path, log.signing_key().as_ref(), head)
        .with_context(|| format!("check the mismatch log {}", log.path.display()))?;
    if json {
        print_json(&verified)?;
    } else {
        say(&verified.to_string());
    }
    Ok(verified.intact)
}

/// Through the proxy that runs, which alone may write the log; where none does, directly.
async fn acknowledge(ack: Ack) -> anyhow::Result<bool> {
    let config = load(&ack.common)?;
    let request = chosen(&config.mismatch_log, &ack)?;
    let answer: Result<Recorded, AdminError> = client(&ack.common)?
        .post("/api/v1/mismatches/acknowledge", &request)
        .await;
    let head = match answer {
        Ok(recorded) => recorded.head,
        Err(AdminError::NotRunning { .. }) => write_directly(&config.mismatch_log, &request)?,
        Err(other) => return Err(other.into()),
    };
    if ack.output.json {
        print_json(&Recorded { head })?;
    } else {
        say(&format!("recorded as line #{} by {}", head.seq, request.by));
    }
    Ok(true)
}

/// What the log must have for it to be acknowledged.
fn chosen(log: &config::MismatchLog, ack: &Ack) -> anyhow::Result<AcknowledgeRequest> {
    let filter = Filter {
        fingerprint: ack.fingerprint.clone(),
        kind: ack.kind,
        ..Filter::default()
    };
    let found = read(&log.path, &filter)?;
    let mismatches = found.mismatches.iter().map(|one| (one.seq, &one.fingerprint));
    // What is slow is accepted by its kind or by its line, never together with wrong answers.
    let slower = found.slower.iter().map(|one| (one.seq, &one.fingerprint));
    let slower = slower.filter(|_| ack.line.is_some() || ack.kind == Some(Kind::Slower));
    let mut fingerprints: Vec<&str> = mismatches
        .chain(slower)
        .filter(|(seq, _)| ack.line.is_none_or(|line| line == *seq))
        .map(|(_, fingerprint)| fingerprint.as_str())
        .collect();
    fingerprints.sort_unstable();
    fingerprints.dedup();
    match fingerprints[..] {
        [] => bail!("the mismatch log holds no such mismatch"),
        [_] => {}
        [..] => bail!("several fingerprints begin so: {}", fingerprints.join(", ")),
    }
    Ok(AcknowledgeRequest {
        fingerprint: ack.line.is_none().then(|| fingerprints[0].to_owned()),
        kind: ack.kind,
        line: ack.line,
        by: ack.word.by(),
        reason: ack.word.reason.clone(),
    })
}

fn write_directly(log: &config::MismatchLog, request: &AcknowledgeRequest) -> anyhow::Result<chain::Head> {
    let doing = || format!("write the mismatch log {}", log.path.display());
    let keys = chain::body(&request.acknowledgement().map_err(anyhow::Error::msg)?)?;
    let opened = chain::body(&serde_json::json!({
        "pgtandem": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "command": "mismatches ack",
    }))?;
    let mut chain = Chain::open(log.chain(), opened).with_context(doing)?;
    let head = chain.append(events::ACKNOWLEDGED, keys).with_context(doing)?.clone();
    chain.sync().with_context(doing)?;
    Ok(head)
}
