//! How both sides would carry out a statement: its plans, asked with a read that was compared.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::connection::ConnectionError;
use super::read::{Call, ShadowRead};
use super::worker::Worker;
use crate::control::Side;
use crate::sql::{Class, FingerprintId};

/// `GET /api/v1/shadows/plans?fingerprint=…`: what EXPLAIN says on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plans {
    pub fingerprint: String,
    /// The statement with its constants removed.
    pub text: String,
    /// A line each. Conditions hold values, so they are left out unless the mismatch log shows
    /// values plainly.
    pub legacy: Vec<String>,
    pub new: Vec<String>,
}

/// Asks for plans; cheap to clone.
#[derive(Clone)]
pub struct Planner(pub(super) Arc<Worker>);

impl Planner {
    /// Both plans of a statement, for the last read of it that was compared, as its user.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn plans(&self, fingerprint: FingerprintId) -> Result<Plans, String> {
        let worker = &self.0;
        let read = worker.counters.fingerprints.example(fingerprint);
        let read = read.ok_or("no read of this fingerprint was compared since the proxy's start")?;
        let [legacy, new] = [Side::Legacy, Side::New].map(|side| explained(worker, &read, side));
        let (legacy, new) = tokio::try_join!(legacy, new)?;
        Ok(Plans {
            fingerprint: fingerprint.to_string(),
            text: read.fingerprint().text.clone(),
            legacy,
            new,
        })
    }
}

async fn explained(worker: &Worker, read: &ShadowRead, side: Side) -> Result<Vec<String>, String> {
    let (text, call) = explain(worker, read, side)?;
    let key = worker.key(read, side);
    let asked = async {
        let mut connection = worker.connection(&key).await?;
        let answer = connection.answer(&text, &call, 0).await?;
        worker.pool.give(key.clone(), connection);
        Ok::<_, ConnectionError>(answer)
    };
    let answer = tokio::time::timeout(worker.patience(), asked)
        .await
        .map_err(|_| format!("{side}: no plan within the deadline"))?
        .map_err(|error| format!("{side}: {error}"))?;
    if let Some(code) = answer.digest.sqlstate() {
        return Err(format!("{side}: EXPLAIN failed with SQLSTATE {code}"));
    }
    let shows_values = worker.log.values.shows_values();
    Ok(answer.lines().filter(|line| shows_values || is_node(line)).collect())
}

/// The read with EXPLAIN before it.
fn explain(worker: &Worker, read: &ShadowRead, side: Side) -> Result<(Bytes, Call), String> {
    let with_explain = |text: &[u8]| Bytes::from([b"explain ", text].concat());
    if matches!(
        read.script().single().map(|statement| &statement.class),
        Some(Class::CopyTo(_))
    ) {
        return Err("COPY has no plan".into());
    }
    let call = match side == read.control.primary {
        true => read.call.clone(),
        false => worker
            .call_for_secondary(&read.call)
            .ok_or_else(|| format!("{side}: a parameter's type is not known there"))?,
    };
    Ok(match call {
        Call::Prepared { name, prepare, execute } => {
            let execute = with_explain(&execute);
            (execute.clone(), Call::Prepared { name, prepare, execute })
        }
        call => (with_explain(&read.text), call),
    })
}

/// Whether a line of a plan tells of a node, and so of no value.
fn is_node(line: &str) -> bool {
    line.contains("(cost=")
}
