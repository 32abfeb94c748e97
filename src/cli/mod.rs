//! The commands. Each asks the running proxy through its admin address (`serve`, `demo`,
//! `check`, `schema diff` and `schema copy` apart), prints for a person or with `--json` for a script, and answers with an exit code:
//! 0 done, 1 the answer is no, 2 it could not run.

mod backfill;
mod check;
mod complete;
mod explain;
mod mismatches;
mod plans;
mod quarantine;
mod reconcile;
mod report;
mod schema;
mod status;
mod strays;
mod switchover;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::admin::api::{ReloadAnswer, SwitchoverRequest};
use crate::admin::client::AdminClient;
use crate::app::ServeOptions;
use crate::config::{Config, parse_duration};
use crate::control::Side;
use crate::reconcile::backfill::Order;

/// A Postgres proxy for zero-downtime migration: mirrors every committed write to a legacy and a
/// new database, compares their answers, and flips the primary without a dropped connection.
#[derive(Parser)]
#[command(name = "pgtandem", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Common {
    /// The proxy's configuration.
    #[arg(
        long,
        short,
        value_name = "FILE",
        default_value = "./proxy.yaml",
        env = "PGTANDEM_CONFIG"
    )]
    config: PathBuf,
}

#[derive(Args)]
struct Output {
    /// Print facts as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy. SIGHUP reloads proxy.yaml; SIGTERM drains and stops.
    Serve {
        #[command(flatten)]
        common: Common,
        /// Stop when stdin ends, so that whoever started the proxy cannot leave it behind.
        #[arg(long, hide = true)]
        until_stdin_closes: bool,
    },
    /// Say what stands in the way of a migration, and what to do about it: reads both sides,
    /// changes nothing; the proxy need not run. Exit 1 when something blocks.
    Check {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// Only this one.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
        /// Print the statements that mend what can be mended, for each side.
        #[arg(long, conflicts_with = "json")]
        sql: bool,
    },
    /// Show phase, primary, lag, tables, shadow reads and gates. Exit 1 when something is wrong.
    Status {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
    },
    /// Ask the running proxy to read proxy.yaml again. Exit 1 when it refuses.
    Reload {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// Also where `phase: complete` ends the way back.
        #[arg(long)]
        yes: bool,
    },
    /// Flip the primary, or show whether it could be. Exit 1 when a gate is closed.
    Switchover {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// The side that shall be primary: new or legacy.
        #[arg(long, value_name = "SIDE", required_unless_present_any = ["history", "rehearse"])]
        to: Option<Side>,
        /// Show the gates and change nothing.
        #[arg(long)]
        dry_run: bool,
        /// Do all of it up to the point of no return, go back, and tell how long clients were held
        /// and which sessions were in the way.
        #[arg(long, conflicts_with = "dry_run")]
        rehearse: bool,
        /// Show every switchover and rehearsal that was tried.
        #[arg(long, conflicts_with_all = ["to", "dry_run", "rehearse", "force"])]
        history: bool,
        /// Flip although a gate is closed; needs --reason, which is recorded.
        #[arg(long, requires = "reason")]
        force: bool,
        /// Why closed gates may be passed.
        #[arg(long, value_name = "TEXT", requires = "force")]
        reason: Option<String>,
        /// Who orders it; otherwise PGTANDEM_ACTOR or the user at the keyboard. It is recorded.
        #[arg(long, value_name = "NAME")]
        by: Option<String>,
    },
    /// End the migration: mirroring stops and what pgtandem installed is removed from both sides.
    /// There is no way back after it. Exit 1 without --yes, and where clients are still on legacy.
    Complete {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// Legacy will no longer be kept in step, and that is meant.
        #[arg(long)]
        yes: bool,
    },
    /// Wait until everything committed before this call has been applied to the secondary.
    Wait {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// What to wait for; the only one there is.
        #[arg(long, required = true)]
        caught_up: bool,
        /// How long; exit 1 when the time is over.
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
        timeout: Duration,
    },
    /// Read the mismatch log, check its chain, acknowledge what it holds. Exit 1 when it holds any
    /// that was asked for and nobody acknowledged.
    #[command(args_conflicts_with_subcommands = true)]
    Mismatches(mismatches::Arguments),
    /// Show who wrote to the secondary past pgtandem (`stray_writers: report`), acknowledge it. Exit 1
    /// when there is any that nobody acknowledged.
    #[command(args_conflicts_with_subcommands = true)]
    Strays(strays::Arguments),
    /// Put together what an auditor keeps: coverage, match rate, mismatches, latencies,
    /// verifications, phases and flips, and the head that ties it to the log. Exit 1 when the log's
    /// chain is broken or lines were lost.
    Report(report::Arguments),
    /// Compare the rows of both sides, exactly, while applications write. Exit 1 on any difference
    /// or where something could not be compared.
    Verify {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        which: reconcile::Which,
    },
    /// Bring rows of the secondary that differ to what the primary has, and compare them again.
    /// Exit 1 when something still differs.
    Repair {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        which: reconcile::Which,
        /// Show what would be mended and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Copy existing rows to the secondary while applications write, in the running proxy. Ending
    /// this command ends nothing: run it again to watch, or to change workers and rate. Exit 1 when
    /// not every table is synced.
    Backfill {
        #[command(flatten)]
        common: Common,
        /// Print JSON lines (also where stdout is no terminal).
        #[arg(long)]
        json: bool,
        /// Only this table, may be repeated; otherwise every table that is not synced.
        #[arg(long = "table", value_name = "NAME", conflicts_with = "cancel")]
        tables: Vec<String>,
        /// Ranges copied at once (backfill.workers in proxy.yaml).
        #[arg(long, value_name = "N", conflicts_with = "cancel")]
        workers: Option<usize>,
        /// At most so much a second: 50000 (rows), 20MiB/s, or none.
        #[arg(long, value_name = "RATE", conflicts_with = "cancel")]
        max_rate: Option<String>,
        /// End the running one; what is copied stays, and the next one goes on from there.
        #[arg(long)]
        cancel: bool,
        /// Where there are several.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
    },
    /// What the secondary refused: show it, apply it again, or drop it.
    Quarantine {
        #[command(subcommand)]
        action: quarantine::Action,
    },
    /// The definitions of both sides: compare them, bring the secondary's in line.
    Schema {
        #[command(subcommand)]
        action: schema::Action,
    },
    /// Show how a statement would be handled: class, tables, shadowed or not, mirrored how, why.
    Explain {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        sql: String,
    },
    /// See it all on two throwaway servers: writes mirrored, reads compared, a flip and a flip back.
    Demo {
        /// Leave everything running at the end, until Ctrl-C.
        #[arg(long)]
        keep: bool,
    },
}

/// Runs the command that the arguments name.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Serve {
            common,
            until_stdin_closes,
        } => load(&common).and_then(|config| {
            crate::app::serve(config, ServeOptions { until_stdin_closes })?;
            Ok(true)
        }),
        Command::Demo { keep } => crate::demo::run(keep),
        other => ask(other),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("pgtandem: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The commands that ask a running proxy or read its log.
#[tokio::main(flavor = "current_thread")]
async fn ask(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Check {
            common,
            output,
            database,
            sql,
        } => check::run(&load(&common)?, output.json, sql, database.as_deref()).await,
        Command::Status { common, output } => status::run(&client(&common)?, output.json).await,
        Command::Reload { common, output, yes } => reload(&client(&common)?, output.json, yes).await,
        Command::Switchover {
            common,
            output,
            to,
            dry_run,
            rehearse,
            history,
            force: _,
            reason,
            by,
        } => {
            let client = client(&common)?;
            if history {
                return switchover::history(&client, output.json).await;
            }
            let request = SwitchoverRequest {
                to,
                dry_run,
                rehearse,
                force: reason,
                by: Some(by.unwrap_or_else(quarantine::actor)),
            };
            switchover::run(&client, output.json, request).await
        }
        Command::Complete { common, output, yes } => complete::run(&client(&common)?, output.json, yes).await,
        Command::Wait {
            common,
            output,
            caught_up: _,
            timeout,
        } => wait::run(&client(&common)?, output.json, timeout).await,
        Command::Mismatches(arguments) => mismatches::run(arguments).await,
        Command::Strays(arguments) => strays::run(arguments).await,
        Command::Report(arguments) => report::run(arguments).await,
        Command::Verify { common, output, which } => {
            reconcile::run(&common, output.json, which, reconcile::Doing::Verify).await
        }
        Command::Repair {
            common,
            output,
            which,
            dry_run,
        } => {
            let doing = match dry_run {
                true => reconcile::Doing::DryRun,
                false => reconcile::Doing::Repair,
            };
            reconcile::run(&common, output.json, which, doing).await
        }
        Command::Backfill {
            common,
            json,
            tables,
            workers,
            max_rate,
            cancel,
            database,
        } => {
            let order = Order {
                tables,
                workers,
                max_rate,
            };
            let arguments = backfill::Arguments {
                database,
                order,
                cancel,
            };
            backfill::run(&client(&common)?, json, arguments).await
        }
        Command::Quarantine { action } => quarantine::run(action).await,
        Command::Schema { action } => schema::run(action).await,
        Command::Explain { common, output, sql } => explain::run(&client(&common)?, output.json, &sql).await,
        Command::Serve { .. } | Command::Demo { .. } => unreachable!("run() takes these"),
    }
}

async fn reload(client: &AdminClient, json: bool, yes: bool) -> anyhow::Result<bool> {
    let path = format!("/api/v1/reload?yes={yes}");
    change_phase(client, &path, json, ["reloaded; phase", "not reloaded"]).await
}

/// Has the proxy change something, and tells what it did (`done`) or why it did not (`refused`).
async fn change_phase(
    client: &AdminClient,
    path: &str,
    json: bool,
    [done, refused]: [&str; 2],
) -> anyhow::Result<bool> {
    use crate::admin::client::AdminError;
    let answer: ReloadAnswer = match client.post(path, &()).await {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("{refused}: {why}");
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    if json {
        print_json(&answer)?;
    } else {
        say(&format!("{done} {}", answer.phase));
        for change in &answer.changed {
            say(&format!("  {change}"));
        }
    }
    Ok(true)
}

fn load(common: &Common) -> anyhow::Result<Config> {
    Ok(Config::load(&common.config)?)
}

fn client(common: &Common) -> anyhow::Result<AdminClient> {
    Ok(AdminClient::new(&load(common)?.admin))
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    say(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// One JSON line; what cannot be written as JSON does not exist.
fn print_line(value: &impl serde::Serialize) {
    say(&serde_json::to_string(value).unwrap_or_default());
}

/// Facts go to stdout. A reader that went away (`pgtandem … | head`) is no error.
fn say(line: &str) {
    use std::io::Write;
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_forced_switchover_needs_a_reason() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("pgtandem switchover --to new").is_ok());
        assert!(parse("pgtandem switchover --to new --force").is_err());
        assert!(parse("pgtandem switchover --to new --force --reason checked").is_ok());
        assert!(parse("pgtandem switchover --to elsewhere").is_err());
        assert!(parse("pgtandem switchover").is_err());
        assert!(parse("pgtandem switchover --rehearse").is_ok());
        assert!(parse("pgtandem switchover --rehearse --dry-run").is_err());
        assert!(parse("pgtandem switchover --history --json").is_ok());
        assert!(parse("pgtandem switchover --history --to new").is_err());
        assert!(parse("pgtandem wait").is_err());
        assert!(parse("pgtandem check --database shop --sql").is_ok());
        assert!(parse("pgtandem check --sql --json").is_err());
        assert!(parse("pgtandem schema copy --before-rows --dry-run").is_ok());
        assert!(parse("pgtandem schema copy --before-rows --after-rows").is_err());
        assert!(parse("pgtandem schema diff --sql").is_ok());
        assert!(parse("pgtandem schema diff --sql --json").is_err());
        assert!(parse("pgtandem schema heal --table public.a --table b --dry-run").is_ok());
        assert!(parse("pgtandem backfill --table a --table b.c --workers 3 --max-rate 5MiB/s").is_ok());
        assert!(parse("pgtandem backfill --cancel --workers 3").is_err());
        assert!(parse("pgtandem quarantine retry --json").is_ok());
        assert!(parse("pgtandem quarantine retry 3").is_ok());
        assert!(parse("pgtandem verify --table a --table s.b --values plain --report r.json").is_ok());
        assert!(parse("pgtandem verify --dry-run").is_err());
        assert!(parse("pgtandem repair --dry-run --json").is_ok());
        assert!(parse("pgtandem mismatches --since 2h --kind value --json").is_ok());
        assert!(parse("pgtandem mismatches --kind odd").is_err());
        assert!(parse("pgtandem mismatches --verify-log --each").is_err());
        assert!(parse("pgtandem mismatches ack 0a --reason known --by ann").is_ok());
        assert!(parse("pgtandem mismatches ack --line 3 --reason known").is_ok());
        assert!(parse("pgtandem mismatches ack 0a").is_err() && parse("pgtandem mismatches ack --reason x").is_err());
        assert!(parse("pgtandem strays --json").is_ok());
        assert!(parse("pgtandem strays ack --reason known --by ann --database shop").is_ok());
        assert!(parse("pgtandem strays ack").is_err());
        assert!(parse("pgtandem report --since 7d -o r.html --verification v.json").is_ok());
        assert!(parse("pgtandem report --json --md").is_err());
        assert!(parse("pgtandem quarantine discard 3").is_err());
        assert!(parse("pgtandem quarantine discard 3 --reason stale").is_ok());
    }
}
