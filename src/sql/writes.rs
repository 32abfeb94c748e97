//! Whether a text may write: asked where a commit is acknowledged by both sides, so that reads
//! need not wait. Everything that is not known to write nothing may.

use super::class::{Class, QualifiedName, ReadFacts, Script, TransactionControl};
use super::comparable::{FunctionCatalog, GRAMMAR_FUNCTIONS, RelationKind, Volatility};

/// Views on views beyond this are taken for writers.
const VIEW_DEPTH_MAX: usize = 16;

/// What is known of a text's effect on rows, in order of concern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writes {
    Nothing,
    /// It names what the catalog does not hold, perhaps because it is new.
    Unknown,
    Perhaps,
}

/// Whether anything in the text may change a row. `catalog` is the primary's. A volatile function
/// of a view that was redefined a moment ago is not seen until the catalog is read again.
pub fn may_write(script: &Script, catalog: &dyn FunctionCatalog) -> Writes {
    let writes = script.statements.iter().map(|statement| match &statement.class {
        Class::Read(facts) => read_may_write(facts, catalog, VIEW_DEPTH_MAX),
        Class::Transaction(TransactionControl::CommitPrepared) => Writes::Perhaps,
        Class::Transaction(_)
        | Class::Empty
        | Class::Set(_)
        | Class::Reset(_)
        | Class::Discard(_)
        | Class::Show
        | Class::Prepare(_)
        | Class::Deallocate(_)
        | Class::Close(_)
        | Class::Listen(_)
        | Class::Unlisten(_)
        | Class::Notify
        | Class::Explain { analyze: false } => Writes::Nothing,
        // A cursor's query runs when it is fetched from; LOCK stands for SELECT … FOR UPDATE too.
        Class::Write
        | Class::CopyTo(_)
        | Class::CopyFrom(_)
        | Class::Ddl(_)
        | Class::Truncate
        | Class::Execute(_)
        | Class::Declare(_)
        | Class::Fetch(_)
        | Class::Explain { analyze: true }
        | Class::Vacuum
        | Class::Analyze
        | Class::Lock
        | Class::Other
        | Class::Unknown => Writes::Perhaps,
    });
    writes.max().unwrap_or(Writes::Nothing)
}

fn read_may_write(facts: &ReadFacts, catalog: &dyn FunctionCatalog, depth: usize) -> Writes {
    if facts.undecoded_names {
        return Writes::Perhaps;
    }
    let functions = facts
        .functions
        .iter()
        .map(|function| function_may_write(&function.name, catalog));
    let relations = facts
        .relations
        .iter()
        .map(|relation| match catalog.relation(&relation.name) {
            Some(RelationKind::Stored | RelationKind::Transformed) => Writes::Nothing,
            Some(RelationKind::View(Some(facts))) if depth > 0 => read_may_write(facts, catalog, depth - 1),
            Some(RelationKind::View(_)) => Writes::Perhaps,
            None if relation.perhaps_cte || is_system(&relation.name) => Writes::Nothing,
            None => Writes::Unknown,
        });
    functions.chain(relations).max().unwrap_or(Writes::Nothing)
}

fn is_system(relation: &QualifiedName) -> bool {
    relation.schema.as_deref().map_or_else(
        || relation.name.starts_with("pg_"),
        |schema| matches!(schema, "pg_catalog" | "information_schema" | "pg_toast"),
    )
}

fn function_may_write(function: &QualifiedName, catalog: &dyn FunctionCatalog) -> Writes {
    let builtin = function.schema.as_deref().is_none_or(|schema| schema == "pg_catalog");
    if builtin && GRAMMAR_FUNCTIONS.contains(&function.name.as_str()) {
        return Writes::Nothing;
    }
    match catalog.volatility(function) {
        // These are not allowed to write (CREATE FUNCTION).
        Some(Volatility::Immutable | Volatility::Stable) => Writes::Nothing,
        Some(Volatility::Volatile) => Writes::Perhaps,
        None => Writes::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FunctionVolatility, analyze};
    use super::Writes::{Nothing, Perhaps, Unknown};
    use super::*;

    #[test]
    fn what_may_write() {
        let mut catalog = FunctionVolatility::default();
        for (schema, name, volatility) in [
            ("pg_catalog", "lower", "i"),
            ("pg_catalog", "now", "s"),
            ("pg_catalog", "nextval", "v"),
            ("public", "audit", "v"),
        ] {
            catalog.add_function(schema.into(), name.into(), volatility);
        }
        catalog.add_relation("public".into(), "t".into(), None);
        catalog.add_relation("public".into(), "plain".into(), Some("SELECT lower(x) FROM t"));
        catalog.add_relation("public".into(), "audited".into(), Some("SELECT audit(x) FROM t"));
        for (text, expected) in [
            ("", Nothing),
            ("select 1", Nothing),
            ("select lower(x), coalesce(x, 'a'), now() from t", Nothing),
            ("select * from plain", Nothing),
            ("select * from audited", Perhaps),
            ("select * from unknown", Unknown),
            ("with c as (select 1) select * from c", Nothing),
            ("select * from pg_class", Nothing),
            ("select audit(1)", Perhaps),
            ("select nextval('s')", Perhaps),
            ("select unknown(1)", Unknown),
            ("select * from t for update", Perhaps),
            ("insert into t values (1)", Perhaps),
            ("with d as (delete from t returning *) select * from d", Perhaps),
            ("begin; set x.y = 1; show x.y; commit", Nothing),
            ("begin; update t set x = 1; commit", Perhaps),
            ("commit prepared 'p'", Perhaps),
            ("explain insert into t values (1)", Nothing),
            ("explain analyze insert into t values (1)", Perhaps),
            ("do $$ begin end $$", Perhaps),
            ("create table n ()", Perhaps),
            ("execute p", Perhaps),
            ("copy t from stdin", Perhaps),
            ("gibberish", Perhaps),
        ] {
            assert_eq!(may_write(&analyze(text.as_bytes()), &catalog), expected, "{text}");
        }
    }
}
