//! Findings about the two servers: versions, encodings, sort order, settings, extensions, room.

use std::collections::BTreeMap;

use super::facts::{Facts, SideFacts};
use super::finding::Finding;
use crate::control::Side;

/// Settings that change what a statement gives, and so what shadow reads find.
const SETTINGS: [&str; 11] = [
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "bytea_output",
    "extra_float_digits",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "standard_conforming_strings",
    "default_transaction_isolation",
    "search_path",
];

/// A secondary that is away for this long should not fill the journal.
const AWAY_SECONDS: f64 = 3600.0;
/// Older transactions keep the journal from rotating.
const OLD_SECONDS: i64 = 600;
/// Beyond a worker's two: the applier, its aside, capture, the lease, status, shadow reads.
const OWN_CONNECTIONS: i64 = 16;

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![versions(facts), encodings(facts), sorting(facts)];
    found.extend(missing_collations(facts));
    found.extend(settings(facts));
    found.extend(extensions(facts));
    for side in [Side::Legacy, Side::New] {
        found.extend(server(facts, side));
    }
    found.extend(journal(facts));
    found.push(disk(facts));
    found
}

fn versions(facts: &Facts) -> Finding {
    let fact = format!("legacy is Postgres {}, new {}", facts.legacy.major(), facts.new.major());
    match [&facts.legacy, &facts.new].iter().all(|side| side.major() >= 13) {
        false => Finding::blocks("version", fact).advice("pgtandem works with Postgres 13 and later"),
        true if facts.new.major() < facts.legacy.major() => Finding::warns("version", fact)
            .advice("new is the older server: what legacy knows and new does not goes into quarantine"),
        true => Finding::fine("version", fact),
    }
}

fn encodings(facts: &Facts) -> Finding {
    let (here, there) = (&facts.legacy.encoding, &facts.new.encoding);
    if here == there {
        return Finding::fine("encoding", format!("both databases are {here}"));
    }
    Finding::blocks("encoding", format!("legacy is {here}, new {there}"))
        .advice(format!("create the new database again with ENCODING '{here}' (TEMPLATE template0): text that one encoding does not have would be refused, and rows cannot be compared"))
}

fn sorting(facts: &Facts) -> Finding {
    let (here, there) = (&facts.legacy.locale, &facts.new.locale);
    let describe = |side: &SideFacts| {
        let provider = match side.locale.provider.as_str() {
            "i" => "ICU",
            "b" => "built in",
            _ => "libc",
        };
        match &side.locale.actual {
            Some(version) => format!("{} ({provider}, version {version})", side.locale.name),
            None => format!("{} ({provider})", side.locale.name),
        }
    };
    let fact = format!(
        "legacy sorts as {}, new as {}",
        describe(&facts.legacy),
        describe(&facts.new)
    );
    for (side, locale) in [(Side::Legacy, here), (Side::New, there)] {
        if let (Some(recorded), Some(actual)) = (&locale.recorded, &locale.actual)
            && recorded != actual
        {
            let database = crate::catalog::quote::identifier(&facts.side(side).database);
            return Finding::warns(
                "collation",
                format!("{side} was made with version {recorded} of its collation and runs with {actual}"),
            )
            .on(side)
            .advice("its indexes over text may be corrupt: REINDEX the database, then refresh the version")
            .sql(format!("REINDEX DATABASE {database}"))
            .sql(format!("ALTER DATABASE {database} REFRESH COLLATION VERSION"));
        }
    }
    let alike = (here.sorts_by_bytes() && there.sorts_by_bytes())
        || (here.provider == there.provider && here.name == there.name && here.actual == there.actual);
    if alike && here.ctype == there.ctype {
        return Finding::fine("collation", fact);
    }
    Finding::warns("collation", fact).advice(
        "text may be sorted and classified differently: shadow reads with ORDER BY over text will differ, and verify reads tables with text keys in one piece",
    )
}

/// Collations of columns that the secondary's server does not come with: the tables cannot be made
/// there.
fn missing_collations(facts: &Facts) -> Vec<Finding> {
    let side = facts.primary.other();
    let tables = facts
        .primary()
        .tables
        .iter()
        .filter(|table| !facts.is_transformed(table));
    let mut columns: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for table in tables {
        for column in &table.columns {
            if let Some(collation) = &column.collation
                && !facts.secondary().collations.contains(collation)
            {
                let column = format!("{}.{}", table.qualified(), column.name);
                columns.entry(collation).or_default().push(column);
            }
        }
    }
    let finding = |(collation, columns): (&str, Vec<String>)| {
        Finding::blocks(
            "collation.missing",
            format!("{side} has no such collation; columns sorted by it: {}", columns.join(", ")),
        )
        .on(side)
        .about(collation)
        .advice(format!(
            "install its locale on {side}'s machine, or a server built with ICU, and SELECT pg_import_system_collations('pg_catalog'); or change the columns' collation"
        ))
    };
    columns.into_iter().map(finding).collect()
}

fn settings(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    let (primary, secondary) = (facts.primary(), facts.secondary());
    let side = facts.primary.other();
    for name in SETTINGS {
        let (Some(here), Some(there)) = (primary.settings.get(name), secondary.settings.get(name)) else {
            continue;
        };
        if here == there {
            continue;
        }
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let id = if name == "TimeZone" { "timezone" } else { "setting" };
        let database = crate::catalog::quote::identifier(&secondary.database);
        let value = match name {
            // A list: quoted, it would be one name.
            "search_path" | "DateStyle" => text(here),
            _ => crate::catalog::quote::literal(&text(here)),
        };
        let value = if value.is_empty() { "''".to_owned() } else { value };
        found.push(
            Finding::warns(
                id,
                format!(
                    "{name} is {:?} on {}, {:?} on {side}",
                    text(here),
                    facts.primary,
                    text(there)
                ),
            )
            .on(side)
            .about(name)
            .advice("sessions of either side would answer differently: set it alike")
            .sql(format!("ALTER DATABASE {database} SET {name} = {value}")),
        );
    }
    if found.is_empty() {
        found.push(Finding::fine(
            "setting",
            "sessions begin with the same settings (time zone, formats, …)",
        ));
    }
    found
}

fn extensions(facts: &Facts) -> Vec<Finding> {
    let side = facts.primary.other();
    let (primary, secondary) = (facts.primary(), facts.secondary());
    let mut found = Vec::new();
    for (name, version) in &primary.extensions {
        let quoted = crate::catalog::quote::identifier(name);
        match secondary.extensions.get(name) {
            Some(there) if there == version => {}
            Some(there) => found.push(
                Finding::warns(
                    "extension.version",
                    format!("{name} is {version} on {}, {there} on {side}", facts.primary),
                )
                .on(side)
                .about(name)
                .advice("what it computes may differ; look at its release notes"),
            ),
            None if secondary.available.contains_key(name) => found.push(
                Finding::blocks(
                    "extension.missing",
                    format!("{name} is available on {side} and not installed"),
                )
                .on(side)
                .about(name)
                .advice("install it (`schema copy` does, where the role may)")
                .sql(format!("CREATE EXTENSION {quoted}")),
            ),
            None => found.push(
                Finding::blocks("extension.unavailable", format!("{side}'s server does not have {name}"))
                    .on(side)
                    .about(name)
                    .advice("install its package on the server, or do without it on the primary"),
            ),
        }
    }
    for name in secondary
        .extensions
        .keys()
        .filter(|name| !primary.extensions.contains_key(*name))
    {
        found.push(
            Finding::warns("extension.extra", format!("{name} is installed on {side} only"))
                .on(side)
                .about(name)
                .advice("after the flip nothing of it is on the other side"),
        );
    }
    if found.is_empty() {
        found.push(Finding::fine(
            "extension",
            format!("{} extensions, alike on both sides", primary.extensions.len()),
        ));
    }
    found
}

fn server(facts: &Facts, side: Side) -> Vec<Finding> {
    let it = facts.side(side);
    let mut found = Vec::new();
    if it.recovering {
        found.push(
            Finding::blocks(
                "server.recovering",
                format!("{side} is a standby: nothing can be written to it"),
            )
            .on(side)
            .advice("name the server that can be written to"),
        );
    }
    if it
        .settings
        .get("default_transaction_read_only")
        .and_then(Option::as_deref)
        == Some("on")
    {
        let database = crate::catalog::quote::identifier(&it.database);
        found.push(
            Finding::blocks(
                "server.read_only",
                format!("{side}'s transactions are read-only by default"),
            )
            .on(side)
            .advice("let them write")
            .sql(format!(
                "ALTER DATABASE {database} SET default_transaction_read_only = off"
            )),
        );
    }
    if !it.prepared.is_empty() {
        found.push(
            Finding::warns("server.prepared", format!("{side} has {} prepared transactions: {}", it.prepared.len(), it.prepared.join(", ")))
                .on(side)
                .advice("they hold locks and keep the journal from rotating; end those that nobody will: COMMIT PREPARED or ROLLBACK PREPARED"),
        );
    }
    if it.oldest_transaction_seconds > OLD_SECONDS {
        found.push(
            Finding::warns(
                "server.old_transaction",
                format!(
                    "{side} has a writing transaction that is {} minutes old",
                    it.oldest_transaction_seconds / 60
                ),
            )
            .on(side)
            .advice("the journal cannot rotate below it; see pg_stat_activity"),
        );
    }
    found.push(connections(facts, side));
    found
}

fn connections(facts: &Facts, side: Side) -> Finding {
    let it = &facts.side(side).connections;
    let most = if it.of_database >= 0 {
        it.max.min(it.of_database)
    } else {
        it.max
    };
    let free = most - it.reserved - it.used;
    let own = OWN_CONNECTIONS + 2 * facts.limits.backfill_workers as i64;
    let wanted = own + facts.limits.max_connections as i64;
    let of_role = facts.side(side).role.connections;
    let fact = format!(
        "{side} has {free} free connections of {most}; the proxy takes up to {own}, its clients {}",
        facts.limits.max_connections
    );
    if free < own || (0..own).contains(&of_role) {
        return Finding::blocks("connections", fact)
            .on(side)
            .advice("raise max_connections (or the database's or the role's CONNECTION LIMIT), or end sessions");
    }
    // Clients that are there now will come through the proxy instead.
    if free + it.used < wanted {
        return Finding::warns("connections", fact)
            .on(side)
            .advice("raise max_connections, or lower limits.max_connections in proxy.yaml: a session has a connection of its own on either side");
    }
    Finding::fine("connections", fact).on(side)
}

fn journal(facts: &Facts) -> Option<Finding> {
    let writes = facts.primary().writes?;
    let bound = facts.limits.journal_bytes as f64;
    let fact = format!(
        "{} writes {:.0} rows and {} of log a second; journal.max_bytes is {}",
        facts.primary,
        writes.rows,
        bytes(writes.wal_bytes),
        bytes(bound)
    );
    // The log is an upper estimate of what a change's images take.
    if writes.wal_bytes * AWAY_SECONDS > bound {
        return Some(
            Finding::warns(
                "journal",
                format!(
                    "{fact}: full after {:.0} minutes without the secondary",
                    bound / writes.wal_bytes / 60.0
                ),
            )
            .on(facts.primary)
            .advice("raise journal.max_bytes, if the disk allows it"),
        );
    }
    Some(Finding::fine("journal", fact).on(facts.primary))
}

fn disk(facts: &Facts) -> Finding {
    Finding::fine(
        "disk",
        format!(
            "legacy takes {}, new {}; the journal may take {} more on {} (free space cannot be asked for: look at both machines)",
            bytes(facts.legacy.bytes as f64),
            bytes(facts.new.bytes as f64),
            bytes(facts.limits.journal_bytes as f64),
            facts.primary
        ),
    )
}

fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.0} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::super::facts::{ColumnFacts, Limits, Locale, TableFacts, Writes};
    use super::super::finding::Level;
    use super::*;
    use crate::reconcile::schema::Script;

    fn facts() -> Facts {
        let mut side = SideFacts {
            version: 150_000,
            encoding: "UTF8".into(),
            ..SideFacts::default()
        };
        side.connections.max = 100;
        side.connections.of_database = -1;
        side.role.connections = -1;
        side.locale = Locale {
            provider: "c".into(),
            name: "en_US.UTF-8".into(),
            recorded: Some("2.36".into()),
            actual: Some("2.36".into()),
            ..Locale::default()
        };
        Facts {
            primary: Side::Legacy,
            transform: std::sync::Arc::default(),
            mapping: crate::transform::Plan::default(),
            legacy: side.clone(),
            new: side,
            differences: Vec::new(),
            script: Script::default(),
            limits: Limits {
                max_connections: 10,
                journal_bytes: 1 << 30,
                backfill_workers: 2,
            },
            users: Vec::new(),
        }
    }

    #[test]
    fn each_cause_has_its_finding() {
        type Change = fn(&mut Facts);
        let cases: [(&str, Level, Change); 10] = [
            ("version", Level::Blocks, |facts| facts.new.version = 120_000),
            ("version", Level::Warns, |facts| facts.new.version = 140_000),
            ("encoding", Level::Blocks, |facts| facts.new.encoding = "LATIN1".into()),
            ("collation", Level::Warns, |facts| {
                facts.new.locale.recorded = Some("2.28".into());
            }),
            ("collation", Level::Warns, |facts| {
                facts.new.locale.actual = Some("2.40".into());
                facts.new.locale.recorded = Some("2.40".into());
            }),
            ("collation.missing", Level::Blocks, |facts| {
                let column = |name: &str, collation: &str| ColumnFacts {
                    name: name.into(),
                    collation: Some(collation.into()),
                    ..ColumnFacts::default()
                };
                facts.legacy.tables = vec![TableFacts {
                    columns: vec![column("a", "C"), column("b", "de-x-icu")],
                    ..TableFacts::default()
                }];
                facts.new.collations = ["C".to_owned()].into();
            }),
            ("server.recovering", Level::Blocks, |facts| facts.new.recovering = true),
            ("server.prepared", Level::Warns, |facts| {
                facts.legacy.prepared = vec!["x".into()]
            }),
            ("connections", Level::Blocks, |facts| facts.new.connections.used = 95),
            ("journal", Level::Warns, |facts| {
                facts.legacy.writes = Some(Writes {
                    wal_bytes: 1e6,
                    rows: 1.0,
                });
            }),
        ];
        assert!(findings(&facts()).iter().all(|finding| finding.level == Level::Fine));
        for (id, level, change) in cases {
            let mut changed = facts();
            change(&mut changed);
            let found: Vec<_> = findings(&changed)
                .into_iter()
                .filter(|finding| finding.level != Level::Fine)
                .map(|finding| (finding.id, finding.level))
                .collect();
            assert_eq!(found, [(id, level)]);
        }
    }
}
