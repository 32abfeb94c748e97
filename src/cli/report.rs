//! `pgtandem report`: the auditor's page.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Args;
use time::OffsetDateTime;

use super::quarantine::actor;
use super::schema::pairs;
use super::{Common, client, load, print_json, say};
use crate::admin::api::{Recorded, Status};
use crate::admin::client::{AdminClient, AdminError};
use crate::report::{Report, Wanted, gather};
use crate::shadow::Filter;

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Since this time (RFC 3339), or this long ago (2h, 7d); without it, since the log began.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Write it here; without it, to stdout.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// As JSON, with everything.
    #[arg(long, conflicts_with = "md")]
    json: bool,
    /// As Markdown.
    #[arg(long)]
    md: bool,
    /// Read this log instead of the one that proxy.yaml names; repeated, the logs of several proxies of
    /// the pair, whose counts add up.
    #[arg(long = "log", value_name = "FILE")]
    logs: Vec<PathBuf>,
    /// A report of `verify --report FILE` to take in; may be repeated.
    #[arg(long = "verification", value_name = "FILE")]
    verifications: Vec<PathBuf>,
}

/// True where the chain is intact and nothing was lost.
pub(super) async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    let config = load(&arguments.common)?;
    let since = arguments
        .since
        .map(|text| Filter::parse_since(&text, OffsetDateTime::now_utc()))
        .transpose()
        .map_err(|error| anyhow!("--since: {error}"))?;
    let proxy = ask_proxy(&client(&arguments.common)?).await?;
    for log in &arguments.logs {
        anyhow::ensure!(log.exists(), "--log: there is no {}", log.display());
    }
    let wanted = Wanted {
        logs: arguments.logs,
        since,
        by: actor(),
        verifications: arguments.verifications,
        slower_ratio: config.reads.slower_ratio,
    };
    let report = gather(&config.mismatch_log, &pairs(&config, None).await?, proxy, &wanted).await?;
    if arguments.json && arguments.output.is_none() {
        print_json(&report)?;
    } else {
        let text = match (arguments.json, arguments.md) {
            (true, _) => serde_json::to_string_pretty(&report)?,
            (false, true) => report.markdown()?,
            (false, false) => report.html()?,
        };
        match arguments.output {
            None => say(&text),
            Some(file) => {
                std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
                say(&summary(&report, &file));
            }
        }
    }
    Ok(report.is_whole())
}

/// The running proxy writes its newest counts to the log first. None where none runs: the report
/// says so.
async fn ask_proxy(client: &AdminClient) -> anyhow::Result<Option<Status>> {
    let recorded: Result<Recorded, AdminError> = client.post("/api/v1/mismatches/statistics", &()).await;
    match recorded {
        // A log that cannot be written is told in the status.
        Ok(_) | Err(AdminError::Refused(_)) => Ok(Some(client.get("/api/v1/status").await?)),
        Err(AdminError::NotRunning { .. }) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn summary(report: &Report, file: &std::path::Path) -> String {
    let mut text = format!(
        "{}: {} reads compared, {} mismatched",
        file.display(),
        report.overall.compared,
        report.overall.mismatched,
    );
    for log in report.logs() {
        let state = if log.chain.intact { "intact" } else { "NOT INTACT" };
        let head = &log.chain.head;
        text.push_str(&format!("; log {state}, head {} {}", head.seq, head.hash));
    }
    text
}
