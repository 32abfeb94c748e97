//! Whether the secondary can be expected to answer a read as the primary did.
//!
//! Syntax gives the facts of the statement, the catalog the volatility of its functions and the
//! queries behind its views. Anything unknown is not comparable: a shadow read that proves
//! nothing costs trust. Not seen here: volatile functions behind operators, casts, defaults of
//! row security and inside stable functions; the confirmation at a cut asks the primary twice,
//! in two transactions, and finds what disagrees with itself.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;

use super::class::{Class, QualifiedName, ReadFacts, Script};
use super::lexer::LexSettings;
use super::read::{Query, read};

/// Why a read is not compared. The names are those of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NotComparable {
    /// More than one statement in one simple query.
    SeveralStatements,
    /// A write, a setting, …: never meant to be compared, and not counted.
    NotARead,
    /// Perhaps a read, but of a syntax that is not understood.
    NotUnderstood,
    VolatileFunction,
    UnknownFunction,
    UnknownRelation,
    /// A table it names has another shape on the secondary (`transform:`).
    Transformed,
    /// now(), CURRENT_DATE, 'today', …
    Clock,
    /// Who asks, with which settings: current_user, current_setting(), …
    Session,
    /// System catalogs, system columns, version(), pg_… functions: about this server.
    ServerSpecific,
    /// Temporary tables live on the primary only.
    TemporaryTable,
    /// FOR UPDATE and its like.
    Locking,
    /// A name that could not be read in the client's encoding.
    Encoding,
    /// A parameter of a type whose OID differs between the servers.
    ParameterType,
    /// The answer came in pieces (portal suspension) or as COPY.
    PartialAnswer,
    /// Found out by comparing: the answers differ where the statement leaves them open.
    LimitWithoutOrder,
    OrderDependentFunction,
    DistinctOn,
    Sample,
    /// Its transaction wrote before it: the secondary cannot know that yet.
    EarlierWrite,
    /// The session's settings cannot be told in full.
    UnknownSettings,
    /// Found out by asking: the primary disagrees with itself.
    NonDeterministic,
}

impl NotComparable {
    pub const ALL: [Self; 22] = [
        Self::SeveralStatements,
        Self::NotARead,
        Self::NotUnderstood,
        Self::VolatileFunction,
        Self::UnknownFunction,
        Self::UnknownRelation,
        Self::Transformed,
        Self::Clock,
        Self::Session,
        Self::ServerSpecific,
        Self::TemporaryTable,
        Self::Locking,
        Self::Encoding,
        Self::ParameterType,
        Self::PartialAnswer,
        Self::LimitWithoutOrder,
        Self::OrderDependentFunction,
        Self::DistinctOn,
        Self::Sample,
        Self::EarlierWrite,
        Self::UnknownSettings,
        Self::NonDeterministic,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SeveralStatements => "several_statements",
            Self::NotARead => "not_a_read",
            Self::NotUnderstood => "not_understood",
            Self::VolatileFunction => "volatile_function",
            Self::UnknownFunction => "unknown_function",
            Self::UnknownRelation => "unknown_relation",
            Self::Transformed => "transformed",
            Self::Clock => "clock",
            Self::Session => "session",
            Self::ServerSpecific => "server_specific",
            Self::TemporaryTable => "temporary_table",
            Self::Locking => "locking",
            Self::Encoding => "encoding",
            Self::ParameterType => "parameter_type",
            Self::PartialAnswer => "partial_answer",
            Self::LimitWithoutOrder => "limit_without_order",
            Self::OrderDependentFunction => "order_dependent_function",
            Self::DistinctOn => "distinct_on",
            Self::Sample => "sample",
            Self::EarlierWrite => "earlier_write",
            Self::UnknownSettings => "unknown_settings",
            Self::NonDeterministic => "non_deterministic",
        }
    }

    /// For people, in `explain`.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::SeveralStatements => "several statements share one query string",
            Self::NotARead => "it is not a read",
            Self::NotUnderstood => "its syntax is not understood",
            Self::VolatileFunction => "a function it calls is volatile",
            Self::UnknownFunction => "a function it calls is not in the primary's catalog",
            Self::UnknownRelation => "a table or view it names is not in the primary's catalog",
            Self::Transformed => "a table it names has another shape on the secondary",
            Self::Clock => "it depends on the clock",
            Self::Session => "it depends on who asks or on the session's settings",
            Self::ServerSpecific => "it asks about the server itself",
            Self::TemporaryTable => "it reads a temporary table, which only the primary has",
            Self::Locking => "it locks rows",
            Self::Encoding => "a name in it could not be read in the client's encoding",
            Self::ParameterType => "a parameter's type has another OID on each server",
            Self::PartialAnswer => "only a part of the answer was fetched",
            Self::LimitWithoutOrder => "LIMIT without ORDER BY leaves open which rows come",
            Self::OrderDependentFunction => "an aggregate or window shows an order that is left open",
            Self::DistinctOn => "DISTINCT ON leaves open which row of a group comes",
            Self::Sample => "TABLESAMPLE chooses rows at random",
            Self::EarlierWrite => "its transaction wrote before it",
            Self::UnknownSettings => "the session's settings are not known in full",
            Self::NonDeterministic => "the primary disagrees with itself",
        }
    }
}

impl std::fmt::Display for NotComparable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `pg_proc.provolatile`, in order of concern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Volatility {
    Immutable,
    Stable,
    Volatile,
}

/// What a relation is to a read.
#[derive(Debug, Clone, PartialEq)]
pub enum RelationKind {
    /// Table, partitioned table, materialized view, sequence, foreign table.
    Stored,
    /// A view and what its query uses; `None` where it could not be understood.
    View(Option<Arc<ReadFacts>>),
    /// A table that has another shape or name on the secondary.
    Transformed,
}

/// Answers from the primary's catalog. A name without a schema stands for every object of that
/// name: the search path is the session's, and the worst of them decides.
pub trait FunctionCatalog {
    fn volatility(&self, function: &QualifiedName) -> Option<Volatility>;
    fn relation(&self, relation: &QualifiedName) -> Option<&RelationKind>;
}

/// The read that a text is, if it is one: what [`shadowable`] is to be asked about.
///
/// # Errors
/// Why the text's answer is not that of one read; [`NotComparable::NotARead`] for all that was
/// never meant to be one.
pub fn single_read(script: &Script) -> Result<&ReadFacts, NotComparable> {
    match (
        &script.statements[..],
        script.single().map(|statement| &statement.class),
    ) {
        (_, Some(Class::Read(facts))) => Ok(facts),
        (_, Some(Class::Lock)) => Err(NotComparable::Locking),
        (_, Some(Class::Unknown)) => Err(NotComparable::NotUnderstood),
        ([_, _, ..], _)
            if script
                .statements
                .iter()
                .all(|statement| matches!(statement.class, Class::Read(_))) =>
        {
            Err(NotComparable::SeveralStatements)
        }
        _ => Err(NotComparable::NotARead),
    }
}

/// Whether a read's answers can be compared, as far as is known beforehand.
///
/// # Errors
/// The first reason found against it.
pub fn shadowable(facts: &ReadFacts, catalog: &dyn FunctionCatalog) -> Result<(), NotComparable> {
    check(facts, catalog, VIEW_DEPTH_MAX)
}

/// Views on views beyond this are taken for not understood.
const VIEW_DEPTH_MAX: usize = 16;

fn check(facts: &ReadFacts, catalog: &dyn FunctionCatalog, depth: usize) -> Result<(), NotComparable> {
    if facts.undecoded_names {
        return Err(NotComparable::Encoding);
    }
    if facts.locks {
        return Err(NotComparable::Locking);
    }
    if facts.clock {
        return Err(NotComparable::Clock);
    }
    if facts.session {
        return Err(NotComparable::Session);
    }
    if facts.system_columns {
        return Err(NotComparable::ServerSpecific);
    }
    for function in &facts.functions {
        check_function(&function.name, function.arguments, catalog)?;
    }
    for relation in &facts.relations {
        let name = &relation.name;
        match name.schema.as_deref() {
            Some("pg_catalog" | "information_schema" | "pg_toast") => return Err(NotComparable::ServerSpecific),
            Some(schema) if schema.starts_with("pg_temp") => return Err(NotComparable::TemporaryTable),
            Some(_) => {}
            // pg_catalog is searched first unless the path says otherwise.
            None if name.name.starts_with("pg_") => return Err(NotComparable::ServerSpecific),
            None => {}
        }
        match catalog.relation(name) {
            Some(RelationKind::Stored) => {}
            Some(RelationKind::View(Some(facts))) if depth > 0 => check(facts, catalog, depth - 1)?,
            Some(RelationKind::View(_)) => return Err(NotComparable::UnknownRelation),
            Some(RelationKind::Transformed) => return Err(NotComparable::Transformed),
            None if relation.perhaps_cte => {}
            None => return Err(NotComparable::UnknownRelation),
        }
    }
    Ok(())
}

fn check_function(
    function: &QualifiedName,
    arguments: usize,
    catalog: &dyn FunctionCatalog,
) -> Result<(), NotComparable> {
    let builtin = function
        .schema
        .as_deref()
        .is_none_or(|schema| schema == "pg_catalog" || schema == "information_schema");
    let name = function.name.as_str();
    if builtin {
        if GRAMMAR_FUNCTIONS.contains(&name) {
            return Ok(());
        }
        if CLOCK_FUNCTIONS.contains(&name) || name == "age" && arguments == 1 {
            return Err(NotComparable::Clock);
        }
        if SESSION_FUNCTIONS.contains(&name) {
            return Err(NotComparable::Session);
        }
    }
    match catalog.volatility(function) {
        None => Err(NotComparable::UnknownFunction),
        Some(Volatility::Volatile) => Err(NotComparable::VolatileFunction),
        Some(Volatility::Immutable | Volatility::Stable)
            if builtin && (SERVER_FUNCTIONS.contains(&name) || name.starts_with("pg_") && name != "pg_typeof") =>
        {
            Err(NotComparable::ServerSpecific)
        }
        Some(Volatility::Immutable | Volatility::Stable) => Ok(()),
    }
}

/// Looks like a function call but is grammar; in no catalog, and pure.
pub(super) const GRAMMAR_FUNCTIONS: &[&str] = &[
    "coalesce",
    "nullif",
    "greatest",
    "least",
    "grouping",
    "row",
    "array",
    "unnest",
    "exists",
    "any",
    "all",
    "some",
    "overlay",
    "trim",
    "extract",
    "position",
    "substring",
    "cast",
    "treat",
    "normalize",
    "xmlconcat",
    "xmlelement",
    "xmlforest",
    "xmlpi",
    "json_array",
    "json_object",
    "json_scalar",
    "json_serialize",
    "json_value",
    "json_query",
    "json_exists",
    "json_arrayagg",
    "json_objectagg",
    "merge_action",
];

/// Stable by the catalog, but they read the clock or the transaction's start.
const CLOCK_FUNCTIONS: &[&str] = &[
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "clock_timestamp",
    "timeofday",
];

const SESSION_FUNCTIONS: &[&str] = &[
    "current_setting",
    "current_database",
    "current_schema",
    "current_schemas",
    "current_query",
    "getpgusername",
    "has_any_column_privilege",
    "has_column_privilege",
    "has_schema_privilege",
    "has_sequence_privilege",
    "has_table_privilege",
    "lastval",
    "currval",
];

/// Not volatile, yet about this server: its version, its addresses, its transactions, its OIDs.
const SERVER_FUNCTIONS: &[&str] = &[
    "version",
    "inet_client_addr",
    "inet_client_port",
    "inet_server_addr",
    "inet_server_port",
    "txid_current",
    "txid_current_if_assigned",
    "txid_current_snapshot",
    "txid_status",
    "txid_visible_in_snapshot",
    "row_security_active",
    "to_regclass",
    "to_regtype",
    "to_regproc",
    "to_regrole",
    "to_regnamespace",
    "obj_description",
    "col_description",
    "shobj_description",
    "database_to_xml",
    "schema_to_xml",
    "getdatabaseencoding",
];

/// Rows of schema, name, worst volatility (`i`, `s`, `v`) for [`FunctionVolatility`].
pub const FUNCTIONS_QUERY: &str = "select n.nspname::text, p.proname::text, max(p.provolatile::text) \
     from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace group by 1, 2";

/// Rows of schema, name, and for views the query (else null) for [`FunctionVolatility`].
/// System views are left out: reads that name them are never compared.
pub const RELATIONS_QUERY: &str = "select n.nspname::text, c.relname::text, \
     case when c.relkind = 'v' then pg_catalog.pg_get_viewdef(c.oid) end \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S') and c.relpersistence <> 't' \
     and n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast')";

/// The catalog as a control connection read it.
#[derive(Debug, Default)]
pub struct FunctionVolatility {
    functions: HashMap<String, Vec<(String, Volatility)>>,
    relations: HashMap<String, Vec<(String, RelationKind)>>,
}

impl FunctionVolatility {
    /// From the rows of [`FUNCTIONS_QUERY`].
    pub fn add_function(&mut self, schema: String, name: String, volatility: &str) {
        // The letters sort as the concern does: i, s, v.
        let volatility = match volatility {
            "i" => Volatility::Immutable,
            "s" => Volatility::Stable,
            _ => Volatility::Volatile,
        };
        self.functions.entry(name).or_default().push((schema, volatility));
    }

    /// From the rows of [`RELATIONS_QUERY`].
    pub fn add_relation(&mut self, schema: String, name: String, view: Option<&str>) {
        let kind = match view {
            None => RelationKind::Stored,
            Some(query) => {
                let query = query.trim_end().trim_end_matches(';').as_bytes();
                RelationKind::View(match read(query, LexSettings::default()) {
                    Query::Read(facts) | Query::Locking(facts) => Some(Arc::new(facts)),
                    Query::Write | Query::NotUnderstood => None,
                })
            }
        };
        self.relations.entry(name).or_default().push((schema, kind));
    }

    /// Marks the tables for which `is_transformed(schema, name)` holds.
    pub fn transform(&mut self, is_transformed: impl Fn(&str, &str) -> bool) {
        for (name, found) in &mut self.relations {
            for (schema, kind) in found.iter_mut().filter(|(_, kind)| *kind == RelationKind::Stored) {
                if is_transformed(schema, name) {
                    *kind = RelationKind::Transformed;
                }
            }
        }
    }
}

impl FunctionCatalog for FunctionVolatility {
    fn volatility(&self, function: &QualifiedName) -> Option<Volatility> {
        self.functions
            .get(&function.name)?
            .iter()
            .filter(|(schema, _)| function.schema.as_ref().is_none_or(|wanted| wanted == schema))
            .map(|&(_, volatility)| volatility)
            .max()
    }

    fn relation(&self, relation: &QualifiedName) -> Option<&RelationKind> {
        let mut found = self
            .relations
            .get(&relation.name)?
            .iter()
            .filter(|(schema, _)| relation.schema.as_ref().is_none_or(|wanted| wanted == schema))
            .map(|(_, kind)| kind);
        let first = found.next()?;
        // A view is the greater concern than a table of the same name in another schema.
        Some(found.fold(first, |worst, kind| match (worst, kind) {
            (RelationKind::Stored, RelationKind::View(_) | RelationKind::Transformed)
            | (_, RelationKind::View(None)) => kind,
            _ => worst,
        }))
    }
}
