//! `pgtandem wait --caught-up`

use std::time::Duration;

use super::{print_json, say};
use crate::admin::api::WaitAnswer;
use crate::admin::client::AdminClient;

pub(super) async fn run(client: &AdminClient, json: bool, timeout: Duration) -> anyhow::Result<bool> {
    let path = format!("/api/v1/wait?timeout_ms={}", timeout.as_millis());
    let answer: WaitAnswer = client.get(&path).await?;
    if json {
        print_json(&answer)?;
    } else if answer.caught_up {
        say(&format!("caught up after {:.0} ms", answer.waited_ms));
    } else {
        let behind = answer.behind.as_deref().unwrap_or("the secondary");
        say(&format!("not caught up after {:.0} ms: {behind}", answer.waited_ms));
    }
    Ok(answer.caught_up)
}
