//! `pgtandem mismatches --explain`: both sides' plans, from the running proxy.

use anyhow::anyhow;

use super::{print_json, say};
use crate::admin::api::ShadowsAnswer;
use crate::admin::client::AdminClient;
use crate::shadow::Plans;

/// The plans of one fingerprint, or of all that are named as slower on new. True where there are
/// any.
pub(super) async fn run(client: &AdminClient, json: bool, fingerprint: Option<&str>) -> anyhow::Result<bool> {
    let fingerprints = match fingerprint {
        Some(fingerprint) => vec![fingerprint.to_owned()],
        None => {
            let answer: ShadowsAnswer = client.get("/api/v1/shadows").await?;
            let slower = answer.databases.into_values().flat_map(|report| report.slower);
            slower.map(|slower| slower.fingerprint).collect()
        }
    };
    let mut all = Vec::new();
    for fingerprint in &fingerprints {
        let plans: Plans = client
            .get(&format!("/api/v1/shadows/plans?fingerprint={fingerprint}"))
            .await
            .map_err(|error| anyhow!("{fingerprint}: {error}"))?;
        all.push(plans);
    }
    if json {
        print_json(&all)?;
    } else {
        if all.is_empty() {
            say("nothing is slower on new");
        }
        for plans in &all {
            say(&format!("{} {}", plans.fingerprint, plans.text));
            for (side, lines) in [("legacy", &plans.legacy), ("new", &plans.new)] {
                say(&format!("  {side}"));
                lines.iter().for_each(|line| say(&format!("    {line}")));
            }
        }
    }
    Ok(!all.is_empty())
}
