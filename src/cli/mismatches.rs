//! `pgtandem mismatches`: reads the log itself, so it answers whether or not a proxy runs.

use std::path::Path;

use anyhow::{Context, anyhow};
use time::OffsetDateTime;

use super::{print_json, say};
use crate::shadow::{Filter, by_fingerprint, read_log};

pub(super) fn run(
    path: &Path,
    json: bool,
    each: bool,
    since: Option<String>,
    fingerprint: Option<String>,
) -> anyhow::Result<bool> {
    let since = since
        .map(|text| Filter::parse_since(&text, OffsetDateTime::now_utc()))
        .transpose()
        .map_err(|error| anyhow!("--since: {error}"))?;
    let filter = Filter {
        since,
        fingerprint,
        ..Filter::default()
    };
    let contents = read_log(path, &filter).with_context(|| format!("read the mismatch log {}", path.display()))?;
    let summaries = by_fingerprint(&contents.mismatches);
    match (json, each) {
        (true, true) => print_json(&contents)?,
        (true, false) => print_json(&summaries)?,
        (false, true) => {
            for mismatch in &contents.mismatches {
                say(&serde_json::to_string(mismatch)?);
            }
        }
        (false, false) => {
            for summary in &summaries {
                say(&summary.to_string());
            }
        }
    }
    if !json {
        if contents.mismatches.is_empty() {
            say("no mismatches");
        }
        if contents.unreadable_lines > 0 {
            say(&format!(
                "{} lines of the log could not be read (a torn last line, or a newer version's)",
                contents.unreadable_lines
            ));
        }
    }
    Ok(contents.mismatches.is_empty())
}
