//! What a statement is to the proxy: the classes and the facts that come with them.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use serde::Serialize;

use super::fingerprint::{Fingerprint, fingerprint};

/// One simple query string or one Parse text, split and classified.
#[derive(Debug, Default)]
pub struct Script {
    /// In the order of the text. Empty statements (`;;`) are left out; a text without any
    /// statement has none.
    pub statements: Vec<Statement>,
    /// The text ends inside a string, quoted name or comment: the server will refuse it whole.
    pub unterminated: bool,
    fingerprint: OnceLock<Fingerprint>,
}

impl Script {
    pub(super) fn new(statements: Vec<Statement>, unterminated: bool) -> Self {
        Self {
            statements,
            unterminated,
            fingerprint: OnceLock::new(),
        }
    }

    /// The one statement of a text that has exactly one.
    pub fn single(&self) -> Option<&Statement> {
        match &self.statements[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    /// Whether anything in the text is DDL that the proxy must act on.
    pub fn has_ddl(&self) -> bool {
        self.statements
            .iter()
            .any(|statement| matches!(statement.class, Class::Ddl(_)))
    }

    /// The fingerprint of the whole text, computed once; `text` is the text this was made from.
    pub fn fingerprint(&self, text: &[u8]) -> &Fingerprint {
        self.fingerprint.get_or_init(|| fingerprint(text))
    }
}

/// One statement of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    /// Bytes of the text, exact, without the `;` and without blanks and comments around it.
    pub span: Range<usize>,
    pub class: Class,
}

impl Statement {
    /// The statement's own bytes.
    pub fn of<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        &text[self.span.clone()]
    }
}

/// What a statement is.
#[derive(Debug, Clone, PartialEq)]
pub enum Class {
    /// No statement at all (only [`super::classify`] on a blank text says so).
    Empty,
    /// Cannot write as far as syntax tells: SELECT, VALUES, TABLE, WITH without DML or INTO.
    /// Whether its functions write is for [`super::shadowable`] and the catalog.
    Read(Arc<ReadFacts>),
    /// INSERT, UPDATE, DELETE, MERGE, CALL, DO, and EXPLAIN ANALYZE of one of these.
    Write,
    CopyTo(CopyTo),
    CopyFrom(CopyFrom),
    Ddl(Ddl),
    /// Captured by triggers: nothing for the proxy to do.
    Truncate,
    Transaction(TransactionControl),
    Set(Set),
    Reset(Reset),
    Discard(Discard),
    /// `PREPARE name AS …`
    Prepare(Prepare),
    /// `EXECUTE name`: what it does was said by PREPARE.
    Execute(Execute),
    /// `DEALLOCATE name`, or of all.
    Deallocate(Option<String>),
    Declare(Declare),
    /// FETCH and MOVE.
    Fetch(Fetch),
    /// `CLOSE name`, or of all.
    Close(Option<String>),
    Listen(String),
    /// `UNLISTEN name`, or of all.
    Unlisten(Option<String>),
    Notify,
    Show,
    /// EXPLAIN that executes nothing, or executes a read.
    Explain {
        analyze: bool,
    },
    Vacuum,
    Analyze,
    /// LOCK, and reads that lock rows (FOR UPDATE, FOR SHARE, …): changes nothing, but not a read.
    Lock,
    /// CHECKPOINT, LOAD, …: of no consequence for rows or the session's carrying over.
    Other,
    /// Not understood. Never taken for a read.
    Unknown,
}

impl Class {
    /// A stable word for metrics, logs and `explain`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Read(_) => "read",
            Self::Write => "write",
            Self::CopyTo(_) => "copy_to",
            Self::CopyFrom(_) => "copy_from",
            Self::Ddl(_) => "ddl",
            Self::Truncate => "truncate",
            Self::Transaction(_) => "transaction",
            Self::Set(_) => "set",
            Self::Reset(_) => "reset",
            Self::Discard(_) => "discard",
            Self::Prepare(_) => "prepare",
            Self::Execute(_) => "execute",
            Self::Deallocate(_) => "deallocate",
            Self::Declare(_) => "declare",
            Self::Fetch(_) => "fetch",
            Self::Close(_) => "close",
            Self::Listen(_) => "listen",
            Self::Unlisten(_) => "unlisten",
            Self::Notify => "notify",
            Self::Show => "show",
            Self::Explain { .. } => "explain",
            Self::Vacuum => "vacuum",
            Self::Analyze => "analyze",
            Self::Lock => "lock",
            Self::Other => "other",
            Self::Unknown => "unknown",
        }
    }
}

/// A name, with its schema where one was written; folded to lower case unless quoted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct QualifiedName {
    pub schema: Option<String>,
    pub name: String,
}

impl QualifiedName {
    /// As SQL.
    pub fn quoted(&self) -> String {
        let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        match &self.schema {
            Some(schema) => format!("{}.{}", quote(schema), quote(&self.name)),
            None => quote(&self.name),
        }
    }

    pub fn new(schema: Option<&str>, name: &str) -> Self {
        Self {
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
        }
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schema {
            Some(schema) => write!(f, "{schema}.{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What syntax says about a read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReadFacts {
    /// Tables and views named, and names that may be those of the statement's own CTEs.
    pub relations: Vec<RelationUse>,
    pub functions: Vec<FunctionUse>,
    /// A top-level ORDER BY: the rows must come in order.
    pub ordered: bool,
    /// The keys of that ORDER BY, where all of them are plain output columns: what may differ
    /// among rows of equal keys is left open.
    pub order_keys: Option<Vec<OrderKey>>,
    /// A top-level LIMIT, OFFSET or FETCH FIRST.
    pub limited: bool,
    /// FOR UPDATE, FOR SHARE, …
    pub locks: bool,
    /// Words and constants that stand for the time: CURRENT_TIMESTAMP, 'now', 'today'.
    pub clock: bool,
    /// Words that stand for who and where: CURRENT_USER, CURRENT_CATALOG.
    pub session: bool,
    /// ctid, xmin, tableoid, …: where a row lies on this server.
    pub system_columns: bool,
    /// The answer depends on the order or choice of rows that the statement leaves open.
    pub unstable: Option<Unstable>,
    /// Operators written, and types of no keyword that values are cast to: functions may be behind
    /// them.
    pub operators: Vec<String>,
    pub casts: Vec<String>,
    /// Some name could not be read in this encoding, or is written as `U&"…"`.
    pub undecoded_names: bool,
}

impl ReadFacts {
    /// Whether it names one of these relations without a schema, so that a temporary one of that
    /// name is meant.
    pub fn uses_any(&self, names: &[String]) -> bool {
        let plain = |relation: &&RelationUse| relation.name.schema.is_none();
        !names.is_empty()
            && self
                .relations
                .iter()
                .filter(plain)
                .any(|relation| names.contains(&relation.name.name))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelationUse {
    pub name: QualifiedName,
    /// A CTE of the statement has this name; the table may still be meant inside that CTE.
    pub perhaps_cte: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FunctionUse {
    pub name: QualifiedName,
    pub arguments: usize,
}

/// An output column as ORDER BY names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderKey {
    Name(String),
    /// From 1.
    Position(usize),
}

/// Shapes whose answer two equal databases may give differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unstable {
    /// LIMIT or OFFSET without ORDER BY: which rows is left open.
    LimitWithoutOrder,
    /// array_agg(x) and its like, or row_number() OVER (), without an ORDER BY of their own.
    OrderDependentFunction,
    /// DISTINCT ON without ORDER BY.
    DistinctOnWithoutOrder,
    Sample,
}

/// COPY … TO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyTo {
    /// To the client, not to a file or program of the server.
    pub stdout: bool,
    /// `COPY (INSERT … RETURNING …) TO`, or a query that is not understood.
    pub may_write: bool,
    /// What it reads, where it is known to do no more.
    pub read: Option<Arc<ReadFacts>>,
}

/// COPY … FROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyFrom {
    /// From the client, not from a file or program of the server.
    pub stdin: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionControl {
    /// BEGIN, START TRANSACTION.
    Begin {
        read_only: bool,
    },
    /// COMMIT, END; with AND CHAIN a new transaction begins at once.
    Commit {
        chain: bool,
    },
    /// ROLLBACK, ABORT.
    Rollback {
        chain: bool,
    },
    Savepoint,
    Release,
    RollbackTo,
    PrepareTransaction,
    CommitPrepared,
    RollbackPrepared,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub what: SetWhat,
    /// SET LOCAL, and what is always local: gone with the transaction.
    pub local: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetWhat {
    /// A setting by its name in lower case; SET TIME ZONE, NAMES, SCHEMA and XML OPTION under
    /// the names of the settings that they change.
    Setting(String),
    Role,
    SessionAuthorization,
    /// SET TRANSACTION; whether it says READ WRITE
    Transaction {
        read_write: bool,
    },
    /// SET SESSION CHARACTERISTICS AS TRANSACTION
    SessionCharacteristics,
    /// SET CONSTRAINTS
    Constraints,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reset {
    Setting(String),
    All,
    Role,
    SessionAuthorization,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    All,
    Plans,
    Sequences,
    Temp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declare {
    pub name: String,
    /// WITH HOLD: outlives its transaction.
    pub hold: bool,
    pub binary: bool,
    /// Its query.
    pub query: Arc<[u8]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    pub name: String,
    /// The statement behind AS.
    pub statement: Arc<[u8]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execute {
    pub name: String,
    /// What its arguments use, as if they were read; `None` where that cannot be told.
    pub arguments: Option<Arc<ReadFacts>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    pub cursor: String,
    /// How many rows onward; `None` for any other direction, and for MOVE.
    pub onward: Option<FetchRows>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchRows {
    Count(u64),
    All,
}

/// A schema change, or something that is handled like one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ddl {
    pub kind: DdlKind,
    /// As in the server's command tag, without OR REPLACE and the like: `CREATE TABLE`.
    pub tag: String,
    /// The object's name, as far as tokens tell.
    pub name: Option<QualifiedName>,
    /// The statement computes rows (CREATE TABLE AS, SELECT INTO, REFRESH): they are copied
    /// after it, not computed again.
    pub computes_rows: bool,
    /// The existing relations that it changes or drops: only the session can tell which of them
    /// are temporary.
    pub concerns: Vec<QualifiedName>,
    /// The tables that it makes partitions or inheritance children of others.
    pub routes: Vec<QualifiedName>,
}

impl Ddl {
    /// Whether the journal hears of it after it has succeeded, and not in its transaction: what
    /// cannot run in one, and REINDEX, which often cannot and changes a schema only where it
    /// completes an unfinished index.
    pub fn is_recorded_afterwards(&self) -> bool {
        self.kind == DdlKind::Outside || self.tag == "REINDEX"
    }

    /// What the journal's hook has to know before the statement runs, as JSON.
    pub fn facts(&self) -> String {
        let from_query = ["CREATE TABLE AS", "SELECT INTO"].contains(&self.tag.as_str());
        let creates_relation = from_query
            || [
                "CREATE TABLE",
                "CREATE VIEW",
                "CREATE SEQUENCE",
                "CREATE MATERIALIZED VIEW",
            ]
            .contains(&self.tag.as_str());
        let creates = self.name.as_ref().filter(|_| creates_relation);
        serde_json::json!({
            "tag": self.tag,
            "from_query": from_query,
            "creates": creates.map(|name| name.name.as_str()),
            "concerns": self.concerns.iter().map(QualifiedName::quoted).collect::<Vec<_>>(),
            "routes": self.routes.iter().map(QualifiedName::quoted).collect::<Vec<_>>(),
        })
        .to_string()
    }
}

/// How a schema change reaches the secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DdlKind {
    /// Runs in a transaction: recorded in it, at its place.
    Transactional,
    /// Refuses to run in a transaction: recorded after it succeeded, then run on the secondary.
    Outside,
    /// Temporary objects stay on the primary.
    Temporary,
    NotMirrored(NotMirrored),
}

/// Why a schema change stays on the server it was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NotMirrored {
    /// REINDEX, CLUSTER: care for one server's own files; rows and schema stay as they are, but
    /// for an unfinished index that REINDEX completes.
    Maintenance,
    /// ALTER SYSTEM: one server's own configuration.
    ServerConfiguration,
    /// A path on one machine.
    Tablespace,
    /// A second subscriber would apply the publisher's rows a second time.
    Subscription,
    /// Large objects are not mirrored.
    LargeObject,
}

impl NotMirrored {
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Maintenance => "it cares for one server's own files and changes neither rows nor schema",
            Self::ServerConfiguration => "it is one server's own configuration",
            Self::Tablespace => "tablespaces are paths on one machine",
            Self::Subscription => "a second subscriber would apply the publisher's rows twice",
            Self::LargeObject => "large objects are not mirrored",
        }
    }
}
