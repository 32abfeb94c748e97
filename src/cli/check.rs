//! `pgtandem check`

use super::schema::pairs;
use super::{print_json, say};
use crate::check::{Finding, Level, Report, check};
use crate::config::Config;
use crate::control::Side;

/// True where nothing blocks.
pub(super) async fn run(config: &Config, json: bool, sql: bool, only: Option<&str>) -> anyhow::Result<bool> {
    let mut reports = Vec::new();
    for (name, targets) in pairs(config, only).await? {
        reports.push(check(config, name, &targets).await?);
    }
    if json {
        print_json(&reports)?;
    } else {
        for report in &reports {
            if sql {
                print_sql(report);
            } else {
                print(report);
            }
        }
    }
    Ok(reports.iter().all(|report| report.count(Level::Blocks) == 0))
}

fn warnings(count: usize) -> String {
    format!("{count} warning{}", if count == 1 { "" } else { "s" })
}

fn print(report: &Report) {
    let (blocks, warns) = (report.count(Level::Blocks), report.count(Level::Warns));
    say(&format!(
        "database {}: {} (primary: {})",
        report.database,
        match (blocks, warns) {
            (0, 0) => "all is fine".to_owned(),
            (0, _) => format!("nothing blocks, {}", warnings(warns)),
            (1, _) => format!("1 finding blocks, {}", warnings(warns)),
            _ => format!("{blocks} findings block, {}", warnings(warns)),
        },
        report.primary
    ));
    for (level, title) in [
        (Level::Blocks, "blocks"),
        (Level::Warns, "warns"),
        (Level::Fine, "fine"),
    ] {
        let found: Vec<&Finding> = report
            .findings
            .iter()
            .filter(|finding| finding.level == level)
            .collect();
        if found.is_empty() {
            continue;
        }
        say(title);
        for finding in found {
            print_finding(finding);
        }
    }
    let apart: Vec<_> = report.tables.iter().filter(|table| !table.why.is_empty()).collect();
    if !apart.is_empty() {
        say("tables");
    }
    for table in apart {
        let what = if table.exact { "exact" } else { "not mirrored exactly" };
        say(&format!("  {}: {what}: {}", table.name, table.why.join("; ")));
    }
    if report.findings.iter().any(|finding| !finding.sql.is_empty()) {
        say("`pgtandem check --sql` prints the statements that mend what can be mended");
    }
}

fn print_finding(finding: &Finding) {
    let about = match finding.subject.as_str() {
        "" => String::new(),
        subject => format!(" {subject}:"),
    };
    say(&format!("  {}{about} {}", finding.id, finding.fact));
    if !finding.advice.is_empty() && finding.level != Level::Fine {
        say(&format!("      {}", finding.advice));
    }
}

/// A part for each side, since each is run by a psql of its own.
fn print_sql(report: &Report) {
    for side in [Side::Legacy, Side::New] {
        let found = report.findings.iter();
        let found: Vec<&Finding> = found
            .filter(|finding| finding.side == Some(side) && !finding.sql.is_empty())
            .collect();
        if found.is_empty() {
            continue;
        }
        say(&format!("-- database {}, on {side}", report.database));
        for finding in found {
            let fact = finding.fact.replace('\n', " ");
            say(&format!("-- {}: {fact}", finding.id));
            for statement in &finding.sql {
                say(&format!("{statement};"));
            }
        }
    }
}
