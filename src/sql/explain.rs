//! `pgtandem explain "SQL"`: how each statement of a text would be handled, and why.

mod canary;

use std::fmt;

use serde::Serialize;

pub use self::canary::{CanaryAnswer, CanaryShare};
use super::class::{Class, DdlKind, QualifiedName, ReadFacts, Statement};
use super::comparable::{FunctionCatalog, NotComparable, RelationKind, shadowable, single_read};
use super::lexer::LexSettings;
use super::rehearsable::{Part, Reach, part};
use super::{Script, analyze};
use crate::control::Phase;

/// What an explanation depends on besides the text.
pub struct ExplainContext<'a> {
    pub phase: Phase,
    pub shadow_percent: f64,
    pub canary: CanaryShare,
    /// Of the writes that no rule is about.
    pub rehearse_percent: f64,
    /// What the secondary's functions and tables reach; without it, no write is looked at so closely.
    pub reach: Option<&'a Reach>,
    /// The primary's catalog; without one, functions and views stay unknown.
    pub catalog: Option<&'a dyn FunctionCatalog>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    pub phase: Phase,
    pub statements: Vec<ExplainedStatement>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedStatement {
    pub sql: String,
    pub class: &'static str,
    pub fingerprint: super::FingerprintId,
    /// Tables and views it names, as far as its class is read by names.
    pub tables: Vec<String>,
    pub shadowed: bool,
    /// Whether the secondary may really answer it, and why not.
    pub canary: CanaryAnswer,
    /// Whether it is also tried on the secondary, and why not; absent for what writes nothing.
    pub rehearsed: Option<Rehearsal>,
    pub mirrored: Mirrored,
    pub why: String,
}

/// What `writes.rehearse_percent` does about a statement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rehearsal {
    pub rehearsed: bool,
    pub why: String,
}

fn rehearsal(statement: &Statement, text: &[u8], context: &ExplainContext<'_>) -> Option<Rehearsal> {
    let sql = statement.of(text);
    let no = |why: &str| {
        Some(Rehearsal {
            rehearsed: false,
            why: why.to_owned(),
        })
    };
    match part(&analyze(sql), sql) {
        Part::LeftOut(reason) => return no(reason.explanation()),
        Part::Nothing | Part::Boundary | Part::Control => return None,
        Part::Write { .. } => {}
    }
    let transformed = |word: &str| {
        let name = QualifiedName::new(None, word);
        context
            .catalog
            .is_some_and(|catalog| catalog.relation(&name) == Some(&RelationKind::Transformed))
    };
    if let Some(reason) = context
        .reach
        .and_then(|reach| reach.judge(sql, LexSettings::default(), &[], transformed))
    {
        return no(reason.explanation());
    }
    if !context.phase.mirrors() {
        return no(&format!("it could be rehearsed, but not in phase {}", context.phase));
    }
    if context.rehearse_percent <= 0.0 {
        return no("it could be rehearsed, but writes.rehearse_percent is 0");
    }
    let unknown = if context.reach.is_none() {
        "; what it reaches was not looked up"
    } else {
        ""
    };
    Some(Rehearsal {
        rehearsed: true,
        why: format!(
            "{}% of such writes, rolled back on the secondary{unknown}",
            context.rehearse_percent
        ),
    })
}

/// How a statement's effects reach the secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mirrored {
    /// It has none.
    Nothing,
    /// The rows it changes, by the capture triggers.
    Rows,
    /// The statement itself, recorded in its transaction.
    Statement,
    /// The statement itself, recorded after it succeeded.
    StatementAfterwards,
    /// It stays on the primary.
    Stays,
}

impl Mirrored {
    const fn as_words(self) -> &'static str {
        match self {
            Self::Nothing => "nothing to mirror",
            Self::Rows => "the rows it changes, captured in its transaction",
            Self::Statement => "the statement, recorded in its transaction at its place",
            Self::StatementAfterwards => "the statement, recorded after it succeeded",
            Self::Stays => "no, it stays on the primary",
        }
    }
}

/// Explains a text.
pub fn explain(text: &[u8], context: &ExplainContext<'_>) -> Explanation {
    let script = analyze(text);
    let statements = script
        .statements
        .iter()
        .map(|statement| {
            let sql = statement.of(text);
            let (shadowed, mirrored, why) = judge(&script, &statement.class, context);
            ExplainedStatement {
                sql: String::from_utf8_lossy(sql).into_owned(),
                class: statement.class.name(),
                fingerprint: super::fingerprint(sql).id,
                tables: tables(&statement.class),
                shadowed,
                canary: canary::canary(&script, &statement.class, context),
                rehearsed: rehearsal(statement, text, context),
                mirrored: if context.phase.mirrors() {
                    mirrored
                } else {
                    Mirrored::Nothing
                },
                why,
            }
        })
        .collect();
    Explanation {
        phase: context.phase,
        statements,
    }
}

fn tables(class: &Class) -> Vec<String> {
    match class {
        Class::Read(facts) => facts
            .relations
            .iter()
            .filter(|relation| !relation.perhaps_cte)
            .map(|relation| relation.name.to_string())
            .collect(),
        Class::Ddl(ddl) => ddl.name.iter().map(ToString::to_string).collect(),
        _ => Vec::new(),
    }
}

fn judge(script: &Script, class: &Class, context: &ExplainContext<'_>) -> (bool, Mirrored, String) {
    let not_shadowed = |mirrored, why: &str| (false, mirrored, why.to_owned());
    let read = |facts: &ReadFacts| match judge_read(script, facts, context) {
        Ok(why) => (true, Mirrored::Nothing, why),
        Err(why) => (false, Mirrored::Nothing, why),
    };
    // A statement that another one brings along.
    let within = |text: &[u8], what: &str| {
        let inner = analyze(text);
        match single_read(&inner).map(|facts| judge_read(&inner, facts, context)) {
            Ok(Ok(why)) => (true, Mirrored::Nothing, format!("{what}{why}")),
            Ok(Err(why)) => (false, Mirrored::Nothing, format!("{what}{why}")),
            Err(reason) => (false, Mirrored::Nothing, format!("{what}{}", reason.explanation())),
        }
    };
    match class {
        Class::Read(facts) => read(facts),
        Class::Write => not_shadowed(Mirrored::Rows, "it may write: capture triggers record what it changes"),
        Class::CopyFrom(_) => not_shadowed(Mirrored::Rows, "COPY FROM fires the capture triggers row by row"),
        Class::Truncate => not_shadowed(
            Mirrored::Rows,
            "a TRUNCATE trigger on every table it reaches records it",
        ),
        Class::CopyTo(copy) if copy.may_write => not_shadowed(
            Mirrored::Rows,
            "its query may write: capture triggers record what it changes",
        ),
        Class::CopyTo(_) | Class::Lock => match single_read(script) {
            Ok(facts) => read(facts),
            Err(reason) => not_shadowed(Mirrored::Nothing, reason.explanation()),
        },
        Class::Declare(declare) => within(&declare.query, "the part that is fetched onward: "),
        Class::Prepare(prepare) => within(&prepare.statement, "its EXECUTE: "),
        Class::Fetch(fetch) if fetch.onward.is_none() => {
            not_shadowed(Mirrored::Nothing, NotComparable::CursorMovement.explanation())
        }
        Class::Fetch(_) => not_shadowed(
            Mirrored::Nothing,
            "what it reads was said by DECLARE, and is compared as that",
        ),
        Class::Execute(_) => not_shadowed(
            Mirrored::Rows,
            "what it does was said by its PREPARE: a read is compared as that, and if it writes, capture triggers record it",
        ),
        Class::Ddl(ddl) => match ddl.kind {
            DdlKind::Transactional if ddl.computes_rows => not_shadowed(
                Mirrored::Statement,
                "it is a schema change that computes rows: they are copied after it",
            ),
            DdlKind::Transactional => not_shadowed(
                Mirrored::Statement,
                "it is a schema change: a barrier in the round, run under the client's own role",
            ),
            DdlKind::Outside => not_shadowed(
                Mirrored::StatementAfterwards,
                "it is a schema change that refuses to run in a transaction",
            ),
            DdlKind::Temporary => not_shadowed(Mirrored::Stays, "temporary objects stay on the primary"),
            DdlKind::NotMirrored(reason) => not_shadowed(Mirrored::Stays, reason.explanation()),
        },
        Class::Vacuum | Class::Analyze => not_shadowed(Mirrored::Stays, super::NotMirrored::Maintenance.explanation()),
        Class::Notify => not_shadowed(Mirrored::Stays, "listeners are connected to the primary"),
        Class::Unknown => not_shadowed(
            Mirrored::Rows,
            "it is not understood, so it is taken for a write: capture triggers record what it changes",
        ),
        Class::Transaction(_) => not_shadowed(Mirrored::Nothing, "it begins or ends a transaction on the primary"),
        Class::Empty
        | Class::Set(_)
        | Class::Reset(_)
        | Class::Discard(_)
        | Class::Deallocate(_)
        | Class::Close(_)
        | Class::Listen(_)
        | Class::Unlisten(_)
        | Class::Show
        | Class::Explain { .. }
        | Class::Other => not_shadowed(Mirrored::Nothing, "it concerns the session on the primary only"),
    }
}

fn judge_read(script: &Script, facts: &ReadFacts, context: &ExplainContext<'_>) -> Result<String, String> {
    if script.statements.len() > 1 {
        return Err(NotComparable::SeveralStatements.explanation().to_owned());
    }
    if let Some(catalog) = context.catalog {
        shadowable(facts, catalog).map_err(|reason| reason.explanation().to_owned())?;
    }
    if !context.phase.shadows() {
        return Err(format!("it could be compared, but not in phase {}", context.phase));
    }
    if context.shadow_percent <= 0.0 {
        return Err("it could be compared, but reads.shadow_percent is 0".to_owned());
    }
    let order = match (facts.ordered, facts.unstable) {
        (true, None) => "rows compared in order",
        (false, None) => "rows compared in any order",
        (_, Some(_)) => "rows compared as far as the statement determines them",
    };
    let unknown = if context.catalog.is_none() && !(facts.functions.is_empty() && facts.relations.is_empty()) {
        "; its functions and tables were not looked up"
    } else {
        ""
    };
    Ok(format!("{}% of such reads, {order}{unknown}", context.shadow_percent))
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, statement) in self.statements.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            writeln!(f, "{}", statement.sql)?;
            writeln!(f, "  class     {}", statement.class)?;
            if !statement.tables.is_empty() {
                writeln!(f, "  tables    {}", statement.tables.join(", "))?;
            }
            writeln!(f, "  shadowed  {}", if statement.shadowed { "yes" } else { "no" })?;
            let word = if statement.canary.answers { "yes" } else { "no" };
            writeln!(f, "  canary    {word}: {}", statement.canary.why)?;
            if let Some(rehearsal) = &statement.rehearsed {
                let word = if rehearsal.rehearsed { "yes" } else { "no" };
                writeln!(f, "  rehearsed {word}: {}", rehearsal.why)?;
            }
            writeln!(f, "  mirrored  {}", statement.mirrored.as_words())?;
            writeln!(f, "  why       {}", statement.why)?;
        }
        Ok(())
    }
}
