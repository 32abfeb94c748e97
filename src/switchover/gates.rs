//! What must hold before a flip, measured from the status. Pure.

use crate::admin::api::{DatabaseStatus, Gate, Mirroring};

/// A flip waits for the last round under the hold: a lag beyond this would make clients wait.
const LAG_SECONDS_MAX: f64 = 2.0;

/// Every gate with what was measured; a flip needs all of them open.
pub fn gates(databases: &[DatabaseStatus]) -> Vec<Gate> {
    databases.iter().flat_map(of_database).collect()
}

fn of_database(database: &DatabaseStatus) -> Vec<Gate> {
    let gate = |what: &str, measured: String, required: &str, open: bool| Gate {
        name: format!("{}: {what}", database.name),
        measured,
        required: required.to_owned(),
        open,
    };
    let reachable = database.legacy.error.is_none() && database.new.error.is_none();
    let mut gates = vec![gate(
        "both sides reachable",
        match (&database.legacy.error, &database.new.error) {
            (None, None) => "both answer".to_owned(),
            (Some(error), _) => format!("legacy: {error}"),
            (None, Some(error)) => format!("new: {error}"),
        },
        "both answer",
        reachable,
    )];
    let Some(mirroring) = &database.mirroring else {
        gates.push(gate("mirroring", "off".to_owned(), "running", false));
        return gates;
    };
    gates.push(gate(
        "mirroring",
        match &mirroring.error {
            Some(error) => format!("{}: {error}", mirroring.state),
            None => mirroring.state.clone(),
        },
        "running",
        // Another proxy may be the one that applies.
        mirroring.state == "running" || (mirroring.state == "waiting" && mirroring.applier.is_some()),
    ));
    gates.push(gate(
        "lag",
        format!("{:.1} s", mirroring.lag.seconds),
        "at most 2 s",
        mirroring.lag.seconds <= LAG_SECONDS_MAX,
    ));
    gates.push(not_synced(mirroring, &gate));
    gates.push(definitions(mirroring, &gate));
    gates.push(gate(
        "way back",
        match mirroring.one_way.as_slice() {
            [] => "every table has one".to_owned(),
            [only] => only.clone(),
            [first, rest @ ..] => format!("{first}; and {} more", rest.len()),
        },
        "every table has one",
        mirroring.one_way.is_empty(),
    ));
    gates.push(gate(
        "quarantine",
        match &mirroring.quarantine.error {
            Some(error) => format!(
                "{} transactions, the oldest: {error}",
                mirroring.quarantine.transactions
            ),
            None => "empty".to_owned(),
        },
        "empty",
        mirroring.quarantine.transactions == 0,
    ));
    gates.push(gate(
        "divergences",
        mirroring.divergences.to_string(),
        "0",
        mirroring.divergences == 0,
    ));
    gates
}

fn not_synced(mirroring: &Mirroring, gate: &dyn Fn(&str, String, &str, bool) -> Gate) -> Gate {
    let missing: Vec<&str> = mirroring
        .tables
        .iter()
        .filter(|table| table.seeding != "synced" || table.paused.is_some())
        .map(|table| table.name.as_str())
        .collect();
    let measured = match missing.as_slice() {
        [] => format!("all {} tables synced", mirroring.tables.len()),
        [first] => format!("{first} is not"),
        [first, rest @ ..] => format!("{first} and {} more are not", rest.len()),
    };
    gate("tables", measured, "all synced, none paused", missing.is_empty())
}

/// What differs would be another schema to the clients, from the flip on.
fn definitions(mirroring: &Mirroring, gate: &dyn Fn(&str, String, &str, bool) -> Gate) -> Gate {
    let measured = match mirroring.different.as_slice() {
        [] => "alike".to_owned(),
        [only] => format!("{only} differs; see `pgtandem schema diff` and `schema heal`"),
        [first, rest @ ..] => format!(
            "{first} and {} more differ; see `pgtandem schema diff` and `schema heal`",
            rest.len()
        ),
    };
    gate("definitions", measured, "alike", mirroring.different.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::{Journal, Lag, Quarantine, ServerStatus, ShadowReads, TableStatus};

    fn healthy() -> DatabaseStatus {
        DatabaseStatus {
            name: "shop".into(),
            legacy: ServerStatus::default(),
            new: ServerStatus::default(),
            mirroring: Some(Mirroring {
                state: "running".into(),
                error: None,
                applier: None,
                round: 7,
                watermark: None,
                changes_applied: 0,
                lag: Lag::default(),
                journal: Journal::default(),
                not_mirrored: Vec::new(),
                sql_for_dba: Vec::new(),
                different: Vec::new(),
                one_way: Vec::new(),
                sequence_errors: Vec::new(),
                position: None,
                transactions_applied: 0,
                tables: vec![table("synced", None)],
                divergences: 0,
                stray_writes: 0,
                quarantine: Quarantine::default(),
            }),
            shadow_reads: ShadowReads::default(),
            acknowledge: None,
            backfill: None,
        }
    }

    fn table(seeding: &str, paused: Option<&str>) -> TableStatus {
        TableStatus {
            name: "public.t".into(),
            seeding: seeding.into(),
            paused: paused.map(str::to_owned),
            note: None,
            diverged: 0,
            verified: None,
        }
    }

    fn closed(change: impl FnOnce(&mut DatabaseStatus)) -> Vec<String> {
        let mut database = healthy();
        change(&mut database);
        let gates = gates(&[database]);
        gates
            .into_iter()
            .filter(|gate| !gate.open)
            .map(|gate| gate.name)
            .collect()
    }

    fn mirroring(database: &mut DatabaseStatus) -> &mut Mirroring {
        database.mirroring.as_mut().unwrap()
    }

    #[test]
    fn each_fault_closes_its_gate_and_no_other() {
        assert_eq!(closed(|_| {}), Vec::<String>::new());
        assert_eq!(
            closed(|d| d.new.error = Some("refused".into())),
            ["shop: both sides reachable"]
        );
        assert_eq!(closed(|d| d.mirroring = None), ["shop: mirroring"]);
        assert_eq!(closed(|d| mirroring(d).state = "failing".into()), ["shop: mirroring"]);
        assert_eq!(closed(|d| mirroring(d).state = "halted".into()), ["shop: mirroring"]);
        assert_eq!(
            closed(|d| mirroring(d).quarantine.transactions = 1),
            ["shop: quarantine"]
        );
        assert_eq!(closed(|d| mirroring(d).lag.seconds = 2.5), ["shop: lag"]);
        assert_eq!(closed(|d| mirroring(d).divergences = 1), ["shop: divergences"]);
        assert_eq!(
            closed(|d| mirroring(d).different.push("index public.i".into())),
            ["shop: definitions"]
        );
        assert_eq!(
            closed(|d| mirroring(d).one_way.push("public.t.fax: it has no inverse".into())),
            ["shop: way back"]
        );
        assert_eq!(
            closed(|d| mirroring(d).tables.push(table("unseeded", None))),
            ["shop: tables"]
        );
        assert_eq!(
            closed(|d| mirroring(d).tables.push(table("synced", Some("columns differ")))),
            ["shop: tables"]
        );
    }
}
