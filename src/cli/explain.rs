//! `pgtandem explain "SQL"`

use super::{print_json, say};
use crate::admin::api::ExplainAnswer;
use crate::admin::client::{AdminClient, query_value};

pub(super) async fn run(client: &AdminClient, json: bool, sql: &str) -> anyhow::Result<bool> {
    let answer: ExplainAnswer = client.get(&format!("/api/v1/explain?sql={}", query_value(sql))).await?;
    if json {
        print_json(&answer.explanation)?;
    } else {
        say(answer.text.trim_end());
    }
    Ok(true)
}
