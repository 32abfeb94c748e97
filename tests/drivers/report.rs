//! What a driver observed, and the comparison of two such reports.

use serde_json::Value;

use crate::KNOWN_DIFFERENCES;
use crate::driver::Driver;

/// One named behaviour.
#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) name: String,
    pub(crate) result: Result<Value, Unexpected>,
}

/// The driver's script failed where it did not expect to.
#[derive(Debug, PartialEq)]
pub(crate) struct Unexpected(pub(crate) String);

/// Reads a script's output: a line of JSON for each behaviour.
pub(crate) fn parse(output: &str) -> Vec<Observed> {
    output
        .lines()
        .map(|line| {
            let mut value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
            let result = match value.get("unexpected").and_then(Value::as_str) {
                Some(trace) => Err(Unexpected(trace.to_owned())),
                None => Ok(value["result"].take()),
            };
            Observed {
                name: value["name"].as_str().unwrap_or_default().to_owned(),
                result,
            }
        })
        .collect()
}

/// A failure that both runs agree on would otherwise pass as equal.
pub(crate) fn refuse_unexpected(driver: &str, observed: &[Observed]) {
    assert!(
        !observed.is_empty() || std::env::var_os("DRIVER_ONLY").is_some(),
        "{driver} ran nothing"
    );
    for Observed { name, result } in observed {
        if let Err(Unexpected(trace)) = result {
            panic!("{driver}, {name}, directly: {trace}");
        }
    }
}

/// A paragraph for each behaviour that differs, or should and does not.
pub(crate) fn differences(
    context: &str,
    driver: Driver,
    phase: &str,
    direct: &[Observed],
    through: &[Observed],
) -> Vec<String> {
    let names = |observed: &[Observed]| observed.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    if names(direct) != names(through) {
        let (direct, through) = (names(direct), names(through));
        return vec![format!(
            "{context}: ran {direct:?} directly, but {through:?} through the proxy"
        )];
    }
    let mut found = Vec::new();
    for (direct, through) in direct.iter().zip(through) {
        let known = KNOWN_DIFFERENCES
            .iter()
            .find(|known| (known.0, known.1, known.2) == (driver.name(), phase, direct.name.as_str()));
        match (direct.result == through.result, known) {
            (true, None) | (false, Some(_)) => {}
            (true, Some((.., why))) => found.push(format!(
                "{context}, {}: no longer differs; take it off the list of known differences ({why})",
                direct.name
            )),
            (false, None) => found.push(format!(
                "{context}, {}:\n{}",
                direct.name,
                where_they_part(direct, through)
            )),
        }
    }
    found
}

/// Both results from a little before their first difference on.
fn where_they_part(direct: &Observed, through: &Observed) -> String {
    let text = |observed: &Observed| match &observed.result {
        Ok(value) => value.to_string(),
        Err(Unexpected(trace)) => trace.clone(),
    };
    let (direct, through) = (text(direct), text(through));
    if through.contains("Traceback") || through.contains("Exception") {
        return format!("  through the proxy: {through}");
    }
    let same = direct.chars().zip(through.chars()).take_while(|(a, b)| a == b).count();
    let part = |text: &str| {
        text.chars()
            .skip(same.saturating_sub(150))
            .take(500)
            .collect::<String>()
    };
    format!(
        "  directly:          …{}\n  through the proxy: …{}",
        part(&direct),
        part(&through)
    )
}
