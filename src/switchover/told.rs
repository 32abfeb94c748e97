//! Flips and rehearsals as they are shown, put together from what the two sides record.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;

use super::records::{self, Told};
use crate::admin::api::{Flip, FlipStep, InTheWay};
use crate::config::Target;
use crate::upstream::control::connect;

/// Flips that are told of.
const HISTORY_MAX: i64 = 200;
/// A side that takes longer to tell is left out.
const ASK_MAX: Duration = Duration::from_secs(5);

/// What one side records; nothing where pgtandem is not installed.
///
/// # Errors
/// It cannot be asked.
pub async fn on(target: &Target) -> Result<Vec<Told>, String> {
    let asked = tokio::time::timeout(ASK_MAX, async {
        let client = connect(target, "history").await.map_err(|error| error.to_string())?;
        match records::is_installed(&client).await? {
            true => records::history(&client, HISTORY_MAX).await,
            false => Ok(Vec::new()),
        }
    });
    asked.await.unwrap_or_else(|_| Err("no answer".into()))
}

/// The latest first; of one flip, what the side tells that knows more of it.
pub fn flips(recorded: impl IntoIterator<Item = Told>) -> Vec<Flip> {
    let mut told: Vec<Told> = Vec::new();
    for one in recorded {
        match told.iter_mut().find(|known| known.0.row.id == one.0.row.id) {
            Some(known) if known.1.len() < one.1.len() => *known = one,
            Some(_) => {}
            None => told.push(one),
        }
    }
    told.sort_by(|a, b| b.0.began.cmp(&a.0.began));
    told.into_iter().map(shown).collect()
}

fn shown((flip, steps): Told) -> Flip {
    let mut shown = Flip {
        id: flip.row.id,
        kind: flip.row.kind,
        to: flip.row.to.primary,
        epoch: flip.row.to.epoch,
        coordinator: flip.row.coordinator,
        by: None,
        at: flip.began,
        ended: flip.ended,
        outcome: match flip.outcome {
            Some(outcome) if outcome == "done" || outcome == "rehearsed" => outcome,
            Some(why) => format!("abandoned: {why}"),
            None => "under way".into(),
        },
        forced: flip.row.forced,
        steps: Vec::new(),
        held_ms: 0.0,
        sessions_carried: 0,
        sessions_ended: 0,
        in_the_way: Vec::new(),
        fenced_out: Vec::new(),
    };
    let (mut in_the_way, mut fenced_out) = (BTreeSet::new(), BTreeSet::new());
    for step in &steps {
        if let Some(by) = step.measured.get("by").and_then(Value::as_str) {
            shown.by = Some(by.to_owned());
        }
        gather(&step.measured, &mut shown, &mut in_the_way, &mut fenced_out);
        if let Some(released) = step.measured.get("released") {
            gather(released, &mut shown, &mut in_the_way, &mut fenced_out);
        }
    }
    shown.in_the_way = in_the_way.into_iter().collect();
    shown.fenced_out = fenced_out.into_iter().collect();
    shown.steps = steps
        .into_iter()
        .map(|step| FlipStep {
            name: step.step,
            at: step.at,
            who: step.who,
            ms: step.took_ms.unwrap_or_default(),
            held: step.step.holds(),
            measured: step.measured,
        })
        .collect();
    shown
}

/// What each proxy has said, summed up.
fn gather(measured: &Value, shown: &mut Flip, in_the_way: &mut BTreeSet<InTheWay>, fenced_out: &mut BTreeSet<String>) {
    for name in measured
        .get("fenced_out")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        fenced_out.extend(name.as_str().map(str::to_owned));
    }
    for (proxy, said) in measured.as_object().into_iter().flatten() {
        if let Some(held) = said.get("held_ms").and_then(Value::as_f64) {
            shown.held_ms = shown.held_ms.max(held);
        }
        let of_hold = said.get("drain_ms").is_some();
        if let (true, Some(sessions)) = (of_hold, said.get("sessions").and_then(Value::as_u64)) {
            shown.sessions_carried += usize::try_from(sessions).unwrap_or_default();
        }
        let list = |key: &str| said.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        shown.sessions_ended += list("ended").len();
        for session in list("in_the_way").iter().chain(&list("ended")).chain(&list("failed")) {
            let text = |key: &str| session.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            in_the_way.insert(InTheWay {
                proxy: proxy.clone(),
                user: text("user"),
                application: text("application"),
                reason: text("reason"),
            });
        }
    }
}
