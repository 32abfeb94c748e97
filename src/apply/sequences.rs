//! Sequences are not transactional, so no trigger and no snapshot shows them: the primary's
//! values are copied, exactly (also backwards: setval may go back).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage, Statement};

use super::session::Session;
use super::{ApplyError, doing};
use crate::catalog::quote::{literal, qualified};
use crate::transform::sequences::renamed;

/// At most this often, unless asked for.
const INTERVAL: Duration = Duration::from_millis(500);

/// Sequences read by one statement.
const CHUNK: usize = 500;

/// One statement takes the locks of all its sequences one after another, as a client's DDL does, and
/// not in the same order. It gives up long before Postgres looks for a deadlock, whose victim may
/// be the client.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '20ms'; ";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    last: i64,
    called: bool,
}

/// What is known of the sequences between two copies.
#[derive(Default)]
pub(super) struct Sequences {
    /// `(schema, name)`, as of the last look at the primary's catalog.
    names: Vec<(String, String)>,
    /// What they are called on the secondary, where that is otherwise.
    renamed: HashMap<(String, String), (String, String)>,
    /// What the secondary does not take.
    refused: Values,
    next: Option<Instant>,
    pub errors: Vec<String>,
}

impl Sequences {
    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// The catalog changed: which ones there are must be asked again, and whether the secondary
    /// has them.
    pub(super) fn forget(&mut self) {
        self.names.clear();
        self.refused.clear();
        self.next = None;
    }
}

const LIST: &str = "\
SELECT n.nspname::text, c.relname::text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pgtandem', 'information_schema')
   AND n.nspname NOT LIKE 'pg\\_%' ORDER BY 1, 2";

impl Session {
    /// Copies what changed, if it is time or `now`. False where that was not all: it was not time,
    /// or one could not be read.
    pub(super) async fn copy_sequences(&mut self, now: bool) -> Result<bool, ApplyError> {
        let started = Instant::now();
        if !now && self.sequences.next.is_some_and(|next| started < next) {
            return Ok(false);
        }
        if self.sequences.names.is_empty() {
            let listed = list(&self.aside).await?;
            let here: HashSet<(String, String)> = list(&self.secondary).await?.into_iter().collect();
            self.sequences.renamed = renamed(&self.aside, &self.secondary)
                .await
                .map_err(doing("look for sequences of transformed tables"))?;
            let there = |name: &(String, String)| self.sequences.renamed.get(name).unwrap_or(name).clone();
            self.sequences.errors = listed
                .iter()
                .filter(|name| !here.contains(&there(name)))
                .map(|name| {
                    let (schema, name) = there(name);
                    format!("{schema}.{name}: the secondary has no such sequence")
                })
                .collect();
            let names: Vec<(String, String)> = listed.into_iter().filter(|name| here.contains(&there(name))).collect();
            self.sequences.names = names;
        }
        let values = match read(&self.aside, &self.sequences.names).await {
            Ok(values) => values,
            // One was dropped since the last look; the next one lists them anew.
            Err(ApplyError::Postgres { source, .. }) if source.code() == Some(&SqlState::UNDEFINED_TABLE) => {
                self.sequences.forget();
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        // The secondary's as well: whatever rehearses there, of any proxy, draws from them.
        let there = |name: &(String, String)| self.sequences.renamed.get(name).unwrap_or(name).clone();
        let theirs: Vec<(String, String)> = self.sequences.names.iter().map(there).collect();
        let found = match read(&self.secondary, &theirs).await {
            Ok(found) => found,
            Err(ApplyError::Postgres { source, .. }) if source.code() == Some(&SqlState::UNDEFINED_TABLE) => {
                self.sequences.forget();
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let complete = values.len() == self.sequences.names.len();
        for (name, value) in values {
            let there = self.sequences.renamed.get(&name).unwrap_or(&name);
            if found.get(there) == Some(&value) || self.sequences.refused.get(&name) == Some(&value) {
                continue;
            }
            let sql = format!(
                "SELECT setval({}::regclass, {}, {})",
                literal(&qualified(&there.0, &there.1)),
                value.last,
                value.called
            );
            match self.secondary.batch_execute(&sql).await {
                Ok(()) => {}
                Err(error) if error.code().is_some() && !self.secondary.is_closed() => {
                    // Out of the bounds that it has here, or gone: said, and tried again when
                    // the catalog changes.
                    let text = format!(
                        "{}.{}: {}",
                        name.0,
                        name.1,
                        crate::upstream::control::error_chain(&error)
                    );
                    tracing::warn!(sequence = text, "a sequence cannot be brought forward");
                    self.sequences.errors.push(text);
                    self.sequences.refused.insert(name, value);
                }
                Err(error) => return Err(doing("bring a sequence forward")(error)),
            }
        }
        // A database with very many sequences is not read all the time.
        self.sequences.next = Some(Instant::now() + INTERVAL.max(started.elapsed() * 20));
        Ok(complete)
    }
}

/// Makes the secondary's sequences equal to the primary's. For a flip, which cannot rely on the
/// applier: another proxy's copies only now and then.
///
/// # Errors
/// A server failed, the secondary refuses a value, or a client's open DDL has locked a sequence (for
/// longer than the connections' lock_timeout). Sequences that the secondary has not are left out.
pub async fn copy_sequences(primary: &Client, secondary: &Client) -> Result<usize, SequenceError> {
    let names = on_both(primary, secondary).await?;
    let (wanted, found) = tokio::try_join!(read(primary, &names), read(secondary, &names))?;
    if let Some((schema, name)) = names
        .iter()
        .find(|name| !wanted.contains_key(*name) || !found.contains_key(*name))
    {
        return Err(SequenceError(format!(
            "{schema}.{name} is locked by somebody's open transaction"
        )));
    }
    bring_forward(secondary, &wanted, &found).await
}

/// Returns how many were not as they should be.
async fn bring_forward(secondary: &Client, wanted: &Values, found: &Values) -> Result<usize, SequenceError> {
    let changes: Vec<String> = wanted
        .iter()
        .filter(|(name, value)| found.get(name) != Some(value))
        .map(|(name, value)| {
            format!(
                "SELECT setval({}::regclass, {}, {})",
                literal(&qualified(&name.0, &name.1)),
                value.last,
                value.called
            )
        })
        .collect();
    if !changes.is_empty() {
        secondary
            .batch_execute(&changes.join("; "))
            .await
            .map_err(doing("bring sequences forward"))?;
    }
    Ok(changes.len())
}

/// Statements that read all sequences of both sides, planned while nobody waits: planning takes many
/// times as long as running them.
pub struct PreparedSequences {
    names: Vec<(String, String)>,
    primary: Vec<Statement>,
    secondary: Vec<Statement>,
}

impl PreparedSequences {
    /// # Errors
    /// A server failed, or one was dropped meanwhile.
    pub async fn prepare(primary: &Client, secondary: &Client) -> Result<Self, SequenceError> {
        let names = on_both(primary, secondary).await?;
        let (primary, secondary) = tokio::try_join!(prepare(primary, &names), prepare(secondary, &names))?;
        let prepared = Self {
            names,
            primary,
            secondary,
        };
        Ok(prepared)
    }

    /// As [`copy_sequences`], which takes longer, and is needed where there are other sequences now.
    ///
    /// # Errors
    /// As there; also where a client's DDL holds one just now, or one is gone.
    pub async fn copy(&self, primary: &Client, secondary: &Client) -> Result<usize, SequenceError> {
        let (wanted, found) = tokio::try_join!(self.run(primary, &self.primary), self.run(secondary, &self.secondary))?;
        bring_forward(secondary, &wanted, &found).await
    }

    async fn run(&self, client: &Client, statements: &[Statement]) -> Result<Values, ApplyError> {
        let mut values = HashMap::with_capacity(self.names.len());
        for (statement, chunk) in statements.iter().zip(self.names.chunks(CHUNK)) {
            let rows = client.query(statement, &[]).await.map_err(doing("read sequences"))?;
            for row in rows {
                let index: i32 = row.get(0);
                if let Some(name) = usize::try_from(index).ok().and_then(|index| chunk.get(index)) {
                    let (last, called) = (row.get(1), row.get(2));
                    values.insert(name.clone(), Value { last, called });
                }
            }
        }
        Ok(values)
    }
}

async fn prepare(client: &Client, names: &[(String, String)]) -> Result<Vec<Statement>, ApplyError> {
    let mut statements = Vec::new();
    for chunk in names.chunks(CHUNK) {
        let statement = client.prepare(&chunk_sql(chunk)).await;
        let statement = statement.map_err(doing("prepare to read sequences"))?;
        // Planned by its first run, not before.
        client.query(&statement, &[]).await.map_err(doing("read sequences"))?;
        statements.push(statement);
    }
    Ok(statements)
}

/// Those of the primary that the secondary has, too.
async fn on_both(primary: &Client, secondary: &Client) -> Result<Vec<(String, String)>, ApplyError> {
    let (mut names, here) = tokio::try_join!(list(primary), list(secondary))?;
    let here: HashSet<(String, String)> = here.into_iter().collect();
    names.retain(|name| here.contains(name));
    Ok(names)
}

/// Why sequences could not be made equal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SequenceError(String);

impl From<ApplyError> for SequenceError {
    fn from(error: ApplyError) -> Self {
        Self(error.to_string())
    }
}

async fn list(client: &Client) -> Result<Vec<(String, String)>, ApplyError> {
    let rows = client.query(LIST, &[]).await.map_err(doing("list sequences"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

type Values = HashMap<(String, String), Value>;

/// Without those that a client's open DDL has locked.
async fn read(client: &Client, names: &[(String, String)]) -> Result<Values, ApplyError> {
    let mut values = HashMap::with_capacity(names.len());
    for chunk in names.chunks(CHUNK) {
        match read_chunk(client, chunk).await {
            Ok(found) => values.extend(found),
            Err(error) if is_locked(&error) => {
                for name in chunk {
                    match read_chunk(client, std::slice::from_ref(name)).await {
                        Ok(found) => values.extend(found),
                        Err(error) if is_locked(&error) => {}
                        Err(error) => return Err(doing("read a sequence")(error)),
                    }
                }
            }
            Err(error) => return Err(doing("read sequences")(error)),
        }
    }
    Ok(values)
}

fn is_locked(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
}

/// Each row with its place in the chunk.
fn chunk_sql(chunk: &[(String, String)]) -> String {
    let arms: Vec<String> = chunk
        .iter()
        .enumerate()
        .map(|(index, (schema, name))| {
            format!("SELECT {index}, last_value, is_called FROM {}", qualified(schema, name))
        })
        .collect();
    arms.join(" UNION ALL ")
}

async fn read_chunk(client: &Client, chunk: &[(String, String)]) -> Result<Values, tokio_postgres::Error> {
    let messages = client
        .simple_query(&format!("{LOCK_TIMEOUT}{}", chunk_sql(chunk)))
        .await?;
    let mut values = HashMap::with_capacity(chunk.len());
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message
            && let (Some(index), Some(last), Some(called)) = (row.get(0), row.get(1), row.get(2))
            && let (Ok(index), Ok(last)) = (index.parse::<usize>(), last.parse())
            && let Some(name) = chunk.get(index)
        {
            let called = called == "t";
            values.insert(name.clone(), Value { last, called });
        }
    }
    Ok(values)
}
