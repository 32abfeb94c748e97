//! What of a client's transaction is tried on the secondary (`writes.rehearse_percent`), and what
//! cannot be: a rehearsal is rolled back, so everything it does must go with its transaction.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::class::{Class, DdlKind, QualifiedName, Script, TransactionControl};
use super::comparable::{FunctionCatalog, Volatility};
use super::cursor::{Cursor, is_word};
use super::lexer::{LexSettings, Lexer, TokenKind};
use super::writes::Writes;

/// Why a write is not rehearsed. The names are those of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOut {
    /// More than one transaction in one simple query.
    SeveralStatements,
    NotUnderstood,
    Ddl,
    /// It would lock the whole table, and the applier out.
    Truncate,
    /// COPY FROM, and COPY of a query that writes.
    Copy,
    /// CALL and DO, which may commit.
    Procedure,
    /// SQL's EXECUTE of a write.
    SqlExecute,
    TemporaryTable,
    /// It calls what does not go with its transaction: dblink, setval, advisory locks, …; perhaps in
    /// a trigger, a default or a rule.
    ReachesOutside,
    /// A read of its transaction may write, by a volatile function.
    VolatileRead,
    /// A table it names has another shape on the secondary (`transform:`).
    Transformed,
    TwoPhase,
    /// The session's settings cannot be told in full.
    UnknownSettings,
    /// A parameter of a type that the secondary has not.
    ParameterType,
    /// More statements or bytes than are kept of one transaction.
    TooLong,
    /// What the secondary's functions do has not been read yet.
    CatalogUnknown,
}

impl LeftOut {
    pub const ALL: [Self; 16] = [
        Self::SeveralStatements,
        Self::NotUnderstood,
        Self::Ddl,
        Self::Truncate,
        Self::Copy,
        Self::Procedure,
        Self::SqlExecute,
        Self::TemporaryTable,
        Self::ReachesOutside,
        Self::VolatileRead,
        Self::Transformed,
        Self::TwoPhase,
        Self::UnknownSettings,
        Self::ParameterType,
        Self::TooLong,
        Self::CatalogUnknown,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SeveralStatements => "several_statements",
            Self::NotUnderstood => "not_understood",
            Self::Ddl => "ddl",
            Self::Truncate => "truncate",
            Self::Copy => "copy",
            Self::Procedure => "procedure",
            Self::SqlExecute => "sql_execute",
            Self::TemporaryTable => "temporary_table",
            Self::ReachesOutside => "reaches_outside",
            Self::VolatileRead => "volatile_read",
            Self::Transformed => "transformed",
            Self::TwoPhase => "two_phase",
            Self::UnknownSettings => "unknown_settings",
            Self::ParameterType => "parameter_type",
            Self::TooLong => "too_long",
            Self::CatalogUnknown => "catalog_unknown",
        }
    }

    /// For people, in `explain`.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::SeveralStatements => "several transactions share one query string",
            Self::NotUnderstood => "its syntax is not understood",
            Self::Ddl => "it is a schema change",
            Self::Truncate => "it would lock the whole table on the secondary",
            Self::Copy => "the rows of a COPY are not kept",
            Self::Procedure => "a procedure or DO block may commit",
            Self::SqlExecute => "it executes what SQL's PREPARE said",
            Self::TemporaryTable => "it writes a temporary table, which only the primary has",
            Self::ReachesOutside => "it calls what a rollback does not undo",
            Self::VolatileRead => "it reads by a function that may write",
            Self::Transformed => "a table it names has another shape on the secondary",
            Self::TwoPhase => "its transaction is prepared for a two-phase commit, or chained",
            Self::UnknownSettings => "the session's settings are not known in full",
            Self::ParameterType => "a parameter is of a type that the secondary has not",
            Self::TooLong => "its transaction has more statements or bytes than are kept",
            Self::CatalogUnknown => "what the secondary's functions do has not been read yet",
        }
    }
}

/// What a text is to the rehearsal of its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// INSERT, UPDATE, DELETE or MERGE, also in WITH. `inserts`: what it draws from sequences may
    /// come again in later statements.
    Write { inserts: bool },
    /// SAVEPOINT, SET and their like: repeated, so that what follows runs as it did.
    Control,
    /// Nothing that later statements rest on.
    Nothing,
    /// BEGIN, COMMIT, ROLLBACK.
    Boundary,
    /// The whole transaction is not rehearsed.
    LeftOut(LeftOut),
}

/// What a text is, by its words. A read may write all the same; the catalog knows.
pub fn part(script: &Script, text: &[u8]) -> Part {
    let [statement] = &script.statements[..] else {
        let harmless = script.statements.iter().all(|statement| {
            matches!(
                class_part(&statement.class, statement.of(text)),
                Part::Nothing | Part::Boundary
            )
        });
        return if harmless && script.statements.len() < 2 {
            Part::Nothing
        } else {
            Part::LeftOut(LeftOut::SeveralStatements)
        };
    };
    class_part(&statement.class, statement.of(text))
}

fn class_part(class: &Class, text: &[u8]) -> Part {
    match class {
        Class::Write => write_part(text),
        Class::Transaction(control) => match control {
            TransactionControl::Begin { .. }
            | TransactionControl::Commit { chain: false }
            | TransactionControl::Rollback { chain: false } => Part::Boundary,
            TransactionControl::Commit { chain: true }
            | TransactionControl::Rollback { chain: true }
            | TransactionControl::PrepareTransaction => Part::LeftOut(LeftOut::TwoPhase),
            TransactionControl::Savepoint | TransactionControl::Release | TransactionControl::RollbackTo => {
                Part::Control
            }
            TransactionControl::CommitPrepared | TransactionControl::RollbackPrepared => Part::Nothing,
        },
        Class::Set(_) | Class::Reset(_) => Part::Control,
        Class::Execute(_) => Part::LeftOut(LeftOut::SqlExecute),
        Class::CopyFrom(_) => Part::LeftOut(LeftOut::Copy),
        Class::CopyTo(copy) if copy.may_write => Part::LeftOut(LeftOut::Copy),
        Class::Truncate => Part::LeftOut(LeftOut::Truncate),
        Class::Ddl(ddl) if ddl.kind == DdlKind::Temporary => Part::LeftOut(LeftOut::TemporaryTable),
        Class::Ddl(_) => Part::LeftOut(LeftOut::Ddl),
        Class::Unknown => Part::LeftOut(LeftOut::NotUnderstood),
        // What it sets holds for what follows.
        Class::Read(facts)
            if facts
                .functions
                .iter()
                .any(|function| function.name.name == "set_config") =>
        {
            Part::Control
        }
        Class::Empty
        | Class::Read(_)
        | Class::CopyTo(_)
        | Class::Lock
        | Class::Discard(_)
        | Class::Prepare(_)
        | Class::Deallocate(_)
        | Class::Declare(_)
        | Class::Fetch(_)
        | Class::Close(_)
        | Class::Listen(_)
        | Class::Unlisten(_)
        | Class::Notify
        | Class::Show
        | Class::Explain { .. }
        | Class::Vacuum
        | Class::Analyze
        | Class::Other => Part::Nothing,
    }
}

fn write_part(text: &[u8]) -> Part {
    let mut cursor = Cursor::new(text, LexSettings::default());
    while cursor.eat_kind(TokenKind::OpenParen) {}
    if cursor.at_any(&["CALL", "DO"]) {
        return Part::LeftOut(LeftOut::Procedure);
    }
    if !cursor.at_any(&["INSERT", "UPDATE", "DELETE", "MERGE", "WITH", "SELECT", "VALUES"]) {
        return Part::LeftOut(LeftOut::NotUnderstood);
    }
    let inserts = Lexer::new(text, LexSettings::default())
        .any(|token| is_word(text, &token, "INSERT") || is_word(text, &token, "MERGE"));
    Part::Write { inserts }
}

/// What of the secondary's catalog a rehearsal must not touch, and what it may.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// Names, without schemas, of functions, tables and views by which something outside of the
    /// transaction is reached.
    outside: HashSet<String>,
    known: bool,
}

/// Functions, tables and views of this server: name, whether it reaches outside by itself, and the
/// words of what it is made of (bodies, triggers, defaults, rules, what a cascade goes on to).
pub const REACH_QUERY: &str = "\
SELECT p.proname::text, NOT l.lanpltrusted AND l.lanname NOT IN ('internal', 'c')
       OR l.lanname = 'c' AND p.provolatile = 'v' AND NOT EXISTS (
          SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND d.refclassid = 'pg_catalog.pg_extension'::regclass
           WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
             AND e.extname IN ('pgcrypto', 'uuid-ossp', 'hstore', 'citext', 'ltree', 'pg_trgm', 'intarray', 'postgis', 'vector', 'btree_gin', 'btree_gist', 'unaccent', 'tsm_system_rows', 'insert_username', 'moddatetime', 'autoinc', 'refint')),
       CASE WHEN l.lanname IN ('internal', 'c') THEN ''
            WHEN p.prosrc = '' AND p.prokind IN ('f', 'p') THEN pg_catalog.pg_get_functiondef(p.oid) ELSE p.prosrc END
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 WHERE p.oid >= 16384 AND n.nspname <> 'pgtandem'
UNION ALL
SELECT c.relname::text, c.relkind = 'f',
       pg_catalog.concat_ws(' ',
         (SELECT pg_catalog.string_agg(p.proname, ' ') FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
           WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgname NOT LIKE 'zzz\\_pgtandem\\_%' AND t.tgenabled IN ('O', 'A')),
         (SELECT pg_catalog.string_agg(pg_catalog.pg_get_expr(a.adbin, a.adrelid), ' ') FROM pg_catalog.pg_attrdef a WHERE a.adrelid = c.oid),
         (SELECT pg_catalog.string_agg(pg_catalog.pg_get_constraintdef(k.oid), ' ') FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'c'),
         (SELECT pg_catalog.string_agg(pg_catalog.pg_get_ruledef(r.oid), ' ') FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid AND c.relkind <> 'm'),
         (SELECT pg_catalog.string_agg(o.relname, ' ') FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class o ON o.oid = k.conrelid
           WHERE k.confrelid = c.oid AND k.contype = 'f' AND (k.confdeltype IN ('c', 'n', 'd') OR k.confupdtype IN ('c', 'n', 'd'))),
         (SELECT pg_catalog.string_agg(o.relname, ' ') FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class o ON o.oid = i.inhrelid WHERE i.inhparent = c.oid))
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'f') AND c.oid >= 16384 AND c.relpersistence <> 't' AND n.nspname <> 'pgtandem'";

/// Postgres' own functions whose effects a rollback leaves, or that wait, or that stop others. By
/// their beginnings.
const OUTSIDE: &[&str] = &[
    "setval",
    "dblink",
    "lo_",
    "lowrite",
    "loread",
    "pg_advisory_",
    "pg_try_advisory_",
    "pg_sleep",
    "pg_terminate_backend",
    "pg_cancel_backend",
    "pg_reload_conf",
    "pg_rotate_logfile",
    "pg_logical_",
    "pg_replication_",
    "pg_create_",
    "pg_drop_replication_slot",
    "pg_promote",
    "pg_switch_wal",
    "pg_file_",
    "pg_read_",
    "pg_write_",
    "pg_ls_",
    "pg_export_snapshot",
    "pg_stat_reset",
    "pg_start_backup",
    "pg_backup_",
    "pg_import_system_collations",
    "query_to_xml",
    "txid_",
    "http",
    "pgtandem",
];

/// Words of a body that stand for the same.
const OUTSIDE_WORDS: &[&str] = &["copy", "commit", "truncate", "vacuum", "lock"];

impl Reach {
    /// `objects`: what [`REACH_QUERY`] says.
    pub fn new(objects: Vec<(String, bool, String)>) -> Self {
        let mut outside = HashSet::new();
        // Who mentions a name.
        let mut users: HashMap<String, Vec<String>> = HashMap::new();
        let mut found = Vec::new();
        for (name, by_itself, made_of) in objects {
            let mut reaches = by_itself;
            let statements = names(made_of.as_bytes(), LexSettings::default());
            reaches |= { statements }.any(|word| OUTSIDE_WORDS.contains(&word.as_str()));
            // Also inside strings, which may be executed.
            for word in made_of
                .split(|at: char| !at.is_alphanumeric() && at != '_')
                .filter(|word| !word.is_empty())
            {
                let word = word.to_lowercase();
                reaches |= is_outside(&word);
                users.entry(word).or_default().push(name.clone());
            }
            if reaches {
                found.push(name);
            }
        }
        while let Some(name) = found.pop() {
            if let Some(users) = users.get(&name) {
                found.extend(users.iter().filter(|user| !outside.contains(*user)).cloned());
            }
            outside.insert(name);
        }
        Self { outside, known: true }
    }

    /// Why a write cannot be rehearsed. `temporary`: relations of the session.
    pub fn judge(
        &self,
        text: &[u8],
        lex: LexSettings,
        temporary: &[String],
        transformed: impl Fn(&str) -> bool,
    ) -> Option<LeftOut> {
        if !self.known {
            return Some(LeftOut::CatalogUnknown);
        }
        names(text, lex).find_map(|word| {
            if temporary.contains(&word) || word.starts_with("pg_temp") {
                Some(LeftOut::TemporaryTable)
            } else if is_outside(&word) || self.outside.contains(&word) {
                Some(LeftOut::ReachesOutside)
            } else {
                transformed(&word).then_some(LeftOut::Transformed)
            }
        })
    }
}

fn is_outside(word: &str) -> bool {
    OUTSIDE.iter().any(|beginning| word.starts_with(beginning))
}

/// Every word and quoted name.
fn names(text: &[u8], lex: LexSettings) -> impl Iterator<Item = String> {
    Lexer::new(text, lex).filter_map(move |token| match token.kind {
        TokenKind::Word | TokenKind::QuotedWord => Some(super::cursor::identifier(&text[token.span])),
        // Not decoded: it may be anything.
        TokenKind::UnicodeQuotedWord => Some("pgtandem".into()),
        _ => None,
    })
}

/// Volatile functions whose answers no later statement rests on, but as the client repeats them.
const HARMLESS: &[&str] = &[
    "nextval",
    "currval",
    "lastval",
    "random",
    "gen_random_uuid",
    "uuid_generate_v4",
    "clock_timestamp",
    "timeofday",
    "pg_notify",
    "set_config",
    "pg_sleep",
    "pg_sleep_for",
    "pg_sleep_until",
];

/// What a read of a transaction may do that its rehearsal would lack.
pub fn read_may_matter(script: &Script, catalog: &dyn FunctionCatalog) -> Writes {
    let Ok(facts) = super::single_read(script) else {
        return Writes::Nothing;
    };
    let mut facts = facts.clone();
    facts
        .functions
        .retain(|function| !HARMLESS.contains(&function.name.name.as_str()));
    super::facts_may_write(&facts, catalog)
}

/// Words that stand for the time.
const CLOCK_WORDS: &[&str] = &[
    "current_timestamp",
    "current_date",
    "current_time",
    "localtime",
    "localtimestamp",
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "timeofday",
    "age",
    "today",
];

/// Words that stand for where rows lie on a server, and which of them are left open.
const PLACE_WORDS: &[&str] = &[
    "ctid",
    "xmin",
    "xmax",
    "cmin",
    "cmax",
    "tableoid",
    "limit",
    "fetch",
    "offset",
    "tablesample",
    "skip",
    "distinct",
];

/// Whether two servers in one state must come to the same: no clock, no chance, nothing of the
/// server itself.
pub fn is_steady(text: &[u8], lex: LexSettings, catalog: &dyn FunctionCatalog) -> bool {
    !names(text, lex).any(|word| {
        CLOCK_WORDS.contains(&word.as_str())
            || PLACE_WORDS.contains(&word.as_str())
            || word.starts_with("pg_")
            || word.starts_with("inet_")
            || word == "version"
            || catalog.volatility(&QualifiedName::new(None, &word)) == Some(Volatility::Volatile)
    }) && !text.windows(5).any(|part| part.eq_ignore_ascii_case(b"'now'"))
}

#[cfg(test)]
mod tests {
    use super::super::analyze;
    use super::*;

    #[test]
    fn what_texts_are_to_a_rehearsal() {
        use Part::{Boundary, Control, Nothing, Write};
        let out = Part::LeftOut;
        for (text, expected) in [
            ("insert into t values (1)", Write { inserts: true }),
            ("update t set a = 1;", Write { inserts: false }),
            ("delete from t", Write { inserts: false }),
            (
                "with d as (delete from t returning *) select * from d",
                Write { inserts: false },
            ),
            (
                "with s as (select 1) insert into t select * from s",
                Write { inserts: true },
            ),
            (
                "merge into t using s on true when not matched then insert default values",
                Write { inserts: true },
            ),
            ("begin", Boundary),
            ("commit", Boundary),
            ("rollback", Boundary),
            ("rollback and chain", out(LeftOut::TwoPhase)),
            ("prepare transaction 'a'", out(LeftOut::TwoPhase)),
            ("savepoint a", Control),
            ("rollback to a", Control),
            ("set local work_mem = '1MB'", Control),
            ("select set_config('app.tenant', $1, true)", Control),
            ("select 1", Nothing),
            ("select * from t for update", Nothing),
            ("", Nothing),
            ("notify a", Nothing),
            ("call p()", out(LeftOut::Procedure)),
            ("do $$ begin end $$", out(LeftOut::Procedure)),
            ("explain analyze insert into t values (1)", out(LeftOut::NotUnderstood)),
            (
                "insert into t values (1); insert into t values (2)",
                out(LeftOut::SeveralStatements),
            ),
            ("copy t from stdin", out(LeftOut::Copy)),
            ("copy (delete from t returning *) to stdout", out(LeftOut::Copy)),
            ("truncate t", out(LeftOut::Truncate)),
            ("create table t ()", out(LeftOut::Ddl)),
            ("create temp table t ()", out(LeftOut::TemporaryTable)),
            ("execute p", out(LeftOut::SqlExecute)),
        ] {
            assert_eq!(part(&analyze(text.as_bytes()), text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn what_must_come_to_the_same() {
        let mut catalog = super::super::FunctionVolatility::default();
        catalog.add_function("pg_catalog".into(), "random".into(), "v");
        catalog.add_function("pg_catalog".into(), "lower".into(), "i");
        for (text, expected) in [
            ("update t set a = lower(b) where c = 5", true),
            ("insert into t values ('limit')", true),
            ("update t set a = random()", false),
            ("delete from t where at < now()", false),
            ("delete from t where at < 'now'", false),
            ("delete from t where at < current_date", false),
            ("delete from t where ctid = '(0,1)'", false),
            ("delete from t where id in (select id from t limit 1)", false),
            ("delete from t where a = pg_backend_pid()", false),
        ] {
            assert_eq!(
                is_steady(text.as_bytes(), LexSettings::default(), &catalog),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn what_reaches_outside() {
        let object = |name: &str, outside: bool, made_of: &str| (name.to_owned(), outside, made_of.to_owned());
        let reach = Reach::new(vec![
            object("far", true, ""),
            object("calls_far", false, "begin perform Far(1); end"),
            object("counted", false, "calls_far nextval('s'::regclass)"),
            object("parent", false, "counted"),
            object("plain", false, "touch nextval('s'::regclass)"),
            object(
                "touch",
                false,
                "begin new.at := now(); perform pg_notify('a', 'b'); return new; end",
            ),
            object("moves", false, "begin perform setval('s', 1); end"),
        ]);
        for (text, expected) in [
            ("insert into plain values (nextval('s'))", None),
            ("insert into plain select pg_notify('a', 'dblink')", None),
            ("insert into counted values (1)", Some(LeftOut::ReachesOutside)),
            ("delete from parent", Some(LeftOut::ReachesOutside)),
            ("insert into plain select setval('s', 1)", Some(LeftOut::ReachesOutside)),
            ("insert into plain select public.moves()", Some(LeftOut::ReachesOutside)),
            (
                "insert into plain select dblink_exec('x', 'y')",
                Some(LeftOut::ReachesOutside),
            ),
            (
                "insert into plain select pg_advisory_lock(1)",
                Some(LeftOut::ReachesOutside),
            ),
            ("insert into plain select lo_creat(1)", Some(LeftOut::ReachesOutside)),
            ("insert into scratch values (1)", Some(LeftOut::TemporaryTable)),
            ("insert into other_shape values (1)", Some(LeftOut::Transformed)),
        ] {
            let found = reach.judge(text.as_bytes(), LexSettings::default(), &["scratch".into()], |word| {
                word == "other_shape"
            });
            assert_eq!(found, expected, "{text}");
        }
        let nothing = Reach::default().judge(b"delete from t", LexSettings::default(), &[], |_| false);
        assert_eq!(nothing, Some(LeftOut::CatalogUnknown));
    }
}
