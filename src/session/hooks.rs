//! What other parts ask of a session: to follow DDL in mirroring phases, and to show reads to the
//! shadow. Whoever wires the proxy fills these in; with none of them the proxy only relays.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use crate::control::Control;
pub use crate::shadow::Asked;
use crate::shadow::rehearsal::Transaction;
use crate::shadow::{CanaryEvent, Outcome, Timing};
use crate::sql::{ReadFacts, Script, StatementCache};
use crate::upstream::Login;

/// All hooks. `Default` has none.
#[derive(Default, Clone)]
pub struct Hooks {
    /// Shared by all sessions.
    pub statements: Arc<StatementCache>,
    pub ddl: Option<DdlHooks>,
    pub shadow: Option<Arc<dyn Shadow>>,
    pub acknowledge: Option<Arc<dyn Acknowledge>>,
    pub rehearse: Option<Arc<dyn Rehearse>>,
    pub canary: Option<Arc<dyn Canary>>,
    pub connections: Option<Arc<dyn OwnConnections>>,
    pub mirrored: Option<Mirrored>,
}

/// The databases whose writes are captured in mirroring phases. Under `"*"` one may have been
/// created a moment ago: its first session waits until it is among them, so that no write of its
/// goes uncaptured.
#[derive(Debug, Clone)]
pub struct Mirrored {
    /// Names as clients say them.
    pub names: watch::Receiver<Arc<HashSet<String>>>,
    /// Asks for a look at which databases there are.
    pub look: Arc<Notify>,
}

impl Mirrored {
    /// Returns when the database is among them, or false after `patience`.
    pub(super) async fn wait_for(&self, database: &str, patience: Duration) -> bool {
        let mut names = self.names.clone();
        if names.borrow().contains(database) {
            return true;
        }
        self.look.notify_one();
        let seen = names.wait_for(|names| names.contains(database));
        matches!(tokio::time::timeout(patience, seen).await, Ok(Ok(_)))
    }
}

/// The proxy's own connections to a database, which a client's DROP DATABASE would find in its
/// way.
pub trait OwnConnections: Send + Sync {
    /// A client is about to drop the database (its name on the servers). Must not wait: the
    /// server gives other connections five seconds to go.
    fn leave(&self, dbname: &str);
}

/// SQL that a client's own session runs around its DDL in mirroring phases, with the exact
/// statement as `$1` of what comes after it.
#[derive(Debug, Clone)]
pub struct DdlHooks {
    /// Right before the statement, in its transaction; `$1` is what is known of it
    /// ([`Ddl::facts`](crate::sql::Ddl::facts)).
    pub before: Option<String>,
    /// Right after the statement, in its transaction.
    pub in_transaction: String,
    /// After a statement that cannot run in a transaction has succeeded.
    pub outside: String,
}

/// What `writes.acknowledge: both` asks of a session.
pub trait Acknowledge: Send + Sync {
    /// Whether commits wait for both sides now. Asked for every statement: one load.
    fn wanted(&self) -> bool;

    /// Whether a text may change rows of a database, so that its commit has to wait.
    fn may_write(&self, database: &str, script: &Script) -> bool;

    /// Done when a round that began after this call has been applied; an error, for the client's
    /// eyes, says why the commit must not be called acknowledged.
    fn applied(&self, database: &str) -> Applied;
}

pub type Applied = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// Where transactions are left that are to be rehearsed on the secondary.
pub trait Rehearse: Send + Sync {
    /// Whether any write of any database is wanted now. Asked for every statement: one load.
    fn wanted(&self) -> bool;

    /// Whether a transaction whose first write this is is in the sample.
    fn sampled(&self, asked: &Asked<'_>, script: &Script) -> bool;

    /// A write of a transaction that is not.
    fn pass_over(&self, database: &str, script: &Script, text: &[u8]);

    /// Whether a read may do what its transaction's rehearsal would lack.
    fn may_write(&self, database: &str, script: &Script) -> bool;

    /// A schema change has been committed, or may have been.
    fn schema_changed(&self, database: &str);

    /// The last round that is known to be applied.
    fn applied_round(&self, database: &str) -> u64;

    /// A transaction is over. Must be quick, and never waits.
    fn offer(&self, database: &str, transaction: Transaction);
}

/// Where reads are shown to.
pub trait Shadow: Send + Sync {
    /// Whether any read of any database is wanted now. Asked for every statement: one load.
    fn wanted(&self) -> bool;

    /// Whether what begins like a read is in the sample. Asked in shadowing phases before anything
    /// is analyzed.
    fn sampled(&self, asked: &Asked<'_>) -> bool;

    /// Asked before a read of the sample is sent. `None`: it cannot be compared. Must be quick, and
    /// never waits.
    fn observe(&self, read: &Read<'_>) -> Option<Box<dyn Observer>>;

    /// A read of the sample cannot even be shown.
    fn passed_over(&self, database: &str, script: &Script, text: &[u8], why: Outcome);

    /// Whether a read may write all the same, by a volatile function. What is no read may.
    fn may_write(&self, database: &str, text: &[u8]) -> bool;
}

/// A read about to be sent to the primary, as it is to be repeated.
#[derive(Debug, Clone, Copy)]
pub struct Read<'a> {
    pub control: Control,
    pub login: &'a Arc<Login>,
    /// As the client named it.
    pub database: &'a str,
    pub text: &'a [u8],
    /// `None`: it has not been analysed (under default settings), and is observed only if its kind
    /// tells enough.
    pub script: Option<&'a Arc<Script>>,
    pub call: Call<'a>,
    /// What the arguments of an EXECUTE use.
    pub arguments: Option<&'a ReadFacts>,
    /// Temporary relations that the session made.
    pub temporary: &'a [String],
    /// Inside BEGIN … COMMIT, or behind other statements of a pipeline without Sync.
    pub in_transaction: bool,
    /// Something that may write ran before it in the same transaction.
    pub after_write: bool,
    /// Statements that bring a fresh connection to the session's settings, in order; `None` where
    /// they are not known in full.
    pub settings: Option<&'a Arc<[Bytes]>>,
    /// The secondary answers it, and the primary is to be asked for comparison.
    pub canary: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Call<'a> {
    Simple,
    /// `types`: four bytes for each parameter type of the Parse; `values`: a Bind's body behind
    /// its two names.
    Extended {
        types: &'a [u8],
        values: &'a [u8],
    },
    /// SQL's EXECUTE of a statement; the read's text is that statement.
    Prepared {
        name: &'a str,
        prepare: &'a [u8],
        execute: &'a [u8],
    },
}

/// Sees the primary's answer, in any pieces. Dropped where the answer was cut off. A frame
/// PortalSuspended says that so far only a part has been fetched.
pub trait Observer {
    /// A frame begins: RowDescription, DataRow, CommandComplete, ErrorResponse, ….
    fn begin(&mut self, kind: u8);
    /// The next bytes of its body.
    fn piece(&mut self, body: &[u8]);
    /// Its body is through.
    fn end(&mut self);
    /// A frame whose body lies whole before the caller: nearly all of them.
    fn frame(&mut self, kind: u8, body: &[u8]) {
        self.begin(kind);
        self.piece(body);
        self.end();
    }
    /// The answer is complete.
    fn complete(self: Box<Self>, timing: Timing);
    /// It turns out that it cannot be compared.
    fn give_up(self: Box<Self>, why: Outcome);
    /// The client gets another answer in its place, which is shown as a read of its own.
    fn forget(self: Box<Self>) {}
}

/// What decides about reads that the secondary really answers, and counts them.
pub trait Canary: Send + Sync {
    /// Whether there may be any, of any database. Asked for every transaction: one load.
    fn wanted(&self) -> bool;

    /// Whether a database's secondary may answer reads now.
    fn on(&self, database: &str) -> bool;

    /// Whether a read is in the share, and the secondary can answer it.
    fn chooses(&self, asked: &Asked<'_>, read: &CanaryRead<'_>) -> bool;

    /// Whether a transaction is in the share that says that it only reads; `drawn` tells it from
    /// others.
    fn chooses_transaction(&self, asked: &Asked<'_>, drawn: u64) -> bool;

    /// Whether the secondary can answer a read: one by itself, or inside a transaction that reads
    /// only there.
    fn servable(&self, read: &CanaryRead<'_>, inside: bool) -> bool;

    /// The secondary's OIDs for those that a Parse gave; `None` where one has no counterpart.
    fn types(&self, database: &str, types: &[u8]) -> Option<Vec<u8>>;

    /// Done when a round that began after this call has been applied.
    fn arrived(&self, database: &str) -> Applied;

    /// How long a read may wait for that.
    fn wait(&self) -> Duration;

    /// A read has waited.
    fn waited(&self, database: &str, time: Duration);

    fn count(&self, database: &str, text: &[u8], event: CanaryEvent);
}

/// A read that the secondary may answer.
#[derive(Debug, Clone, Copy)]
pub struct CanaryRead<'a> {
    /// As the client named it.
    pub database: &'a str,
    pub text: &'a [u8],
    pub script: &'a Script,
    /// Temporary relations that the session made.
    pub temporary: &'a [String],
}
