//! Whether a canary read could answer a statement: what the secondary may run at all, and whether
//! any is sent there now.

use serde::Serialize;

use super::ExplainContext;
use crate::sql::Script;
use crate::sql::class::{Class, SetWhat, TransactionControl};
use crate::sql::comparable::{NotComparable, shadowable, single_read};

/// Canary reads where the text would run.
#[derive(Debug, Clone, PartialEq)]
pub struct CanaryShare {
    /// Of the reads that no rule is about.
    pub percent: f64,
    /// Rules that decide for some reads before that.
    pub rules: usize,
    /// Why none is sent to the secondary now, where none is.
    pub off_because: Option<String>,
}

/// What canary reads do about a statement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CanaryAnswer {
    /// Whether the secondary may answer it.
    pub answers: bool,
    pub why: String,
}

/// Where the secondary may run a statement.
enum Place {
    Anywhere,
    /// In a transaction that the secondary runs from its beginning.
    Within(&'static str),
    /// It is such a transaction's beginning.
    Begins,
}

const ONLY_READS: &str = "only reads are answered by the secondary";

pub(super) fn canary(script: &Script, class: &Class, context: &ExplainContext<'_>) -> CanaryAnswer {
    let (share, no) = (&context.canary, |why: String| CanaryAnswer { answers: false, why });
    let place = match place(script, class, context) {
        Ok(place) => place,
        Err(why) => return no(why.to_owned()),
    };
    if let Some(why) = &share.off_because {
        return no(format!("it could be answered by the secondary, but {why}"));
    }
    let rules = match share.rules {
        0 => String::new(),
        rules => format!(" beside {rules} rules"),
    };
    let of = |what: &str| format!("{}% of such {what}{rules}", share.percent);
    let why = match place {
        Place::Anywhere => format!("{}, where the session's own writes have arrived", of("reads")),
        Place::Within("") => format!("within a transaction that only reads: {}", of("transactions")),
        Place::Within(why) => format!(
            "{why}: only within a transaction that only reads, {}",
            of("transactions")
        ),
        Place::Begins => format!("with all that the transaction reads: {}", of("transactions")),
    };
    CanaryAnswer { answers: true, why }
}

fn place(script: &Script, class: &Class, context: &ExplainContext<'_>) -> Result<Place, &'static str> {
    const MAY_WRITE: &str = "from there on the transaction may write";
    match class {
        Class::Transaction(TransactionControl::Begin { read_only: true }) => Ok(Place::Begins),
        Class::Transaction(TransactionControl::Begin { read_only: false }) => {
            Err("the transaction may write, unless it says READ ONLY")
        }
        Class::Transaction(_) => Err("it ends or divides a transaction where that runs"),
        Class::Read(_) | Class::CopyTo(_) | Class::Lock | Class::Unknown => place_of_read(script, context),
        Class::Declare(declare) if declare.hold => Err("a cursor WITH HOLD outlives the transaction"),
        Class::Declare(declare) => {
            place_of_read(&crate::sql::analyze(&declare.query), context).map(|_| Place::Within(""))
        }
        Class::Fetch(_) | Class::Close(_) | Class::Show => Ok(Place::Within("")),
        Class::Set(set) => match &set.what {
            SetWhat::SessionAuthorization | SetWhat::SessionCharacteristics => Err(ONLY_READS),
            SetWhat::Transaction { read_write: true } => Err(MAY_WRITE),
            SetWhat::Setting(name) if name == "transaction_read_only" => Err(MAY_WRITE),
            _ if set.local => Ok(Place::Within("")),
            _ => Err(ONLY_READS),
        },
        Class::Execute(_) => Err("what SQL's EXECUTE runs is prepared on the primary only"),
        _ => Err(ONLY_READS),
    }
}

fn place_of_read(script: &Script, context: &ExplainContext<'_>) -> Result<Place, &'static str> {
    let facts = match single_read(script) {
        Ok(facts) => facts,
        Err(NotComparable::NotARead) => return Err(ONLY_READS),
        Err(reason) => return Err(reason.explanation()),
    };
    let Some(catalog) = context.catalog else {
        return Ok(Place::Anywhere);
    };
    match shadowable(facts, catalog) {
        Ok(_) => Ok(Place::Anywhere),
        Err(reason @ (NotComparable::Clock | NotComparable::Session)) => Ok(Place::Within(reason.explanation())),
        Err(reason) => Err(reason.explanation()),
    }
}
