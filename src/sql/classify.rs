//! One statement's class, by its first words; only what looks like a query goes on to sqlparser.

use std::sync::Arc;

use super::class::{
    Class, CopyFrom, CopyTo, Ddl, DdlKind, Declare, Discard, Execute, Fetch, FetchRows, Prepare, ReadFacts,
    RelationUse, Reset, Set, SetWhat, TransactionControl,
};
use super::cursor::Cursor;
use super::ddl;
use super::lexer::{LexSettings, StringKind, TokenKind};
use super::read::{self, Query};

/// EXPLAIN of EXPLAIN is an error at the server; nothing nests deeper than this.
const NESTING_MAX: usize = 3;

/// The class of one statement (a text without `;` at its end).
pub fn classify(statement: &[u8], settings: LexSettings) -> Class {
    classify_nested(statement, settings, NESTING_MAX)
}

fn classify_nested(statement: &[u8], settings: LexSettings, nesting: usize) -> Class {
    let mut cursor = Cursor::new(statement, settings);
    match cursor.peek_kind() {
        None => return Class::Empty,
        Some(TokenKind::OpenParen) => return query(statement, settings),
        Some(TokenKind::Word) => {}
        Some(_) => return Class::Unknown,
    }
    let Some(first) = cursor.keyword() else {
        return Class::Unknown;
    };
    match first.as_str() {
        "SELECT" | "VALUES" | "TABLE" | "WITH" => query(statement, settings),
        "INSERT" | "UPDATE" | "DELETE" | "MERGE" | "CALL" | "DO" => Class::Write,
        "COPY" => copy(&mut cursor, statement, settings),
        "TRUNCATE" => Class::Truncate,
        "BEGIN" | "START" | "COMMIT" | "END" | "ROLLBACK" | "ABORT" | "SAVEPOINT" | "RELEASE" => {
            transaction_control(&first, &mut cursor)
        }
        "PREPARE" => {
            if cursor.at("TRANSACTION") {
                // PREPARE transaction AS …: a statement of that name.
                let name = cursor.identifier().unwrap_or_default();
                if cursor.at("AS") || cursor.peek_kind() == Some(TokenKind::OpenParen) {
                    return prepare(&mut cursor, name);
                }
                return Class::Transaction(TransactionControl::PrepareTransaction);
            }
            match cursor.identifier() {
                Some(name) => prepare(&mut cursor, name),
                None => Class::Unknown,
            }
        }
        "EXECUTE" => execute(&mut cursor, settings),
        "DEALLOCATE" => {
            cursor.eat("PREPARE");
            one_or_all(&mut cursor).map_or(Class::Unknown, Class::Deallocate)
        }
        "SET" => set(&mut cursor),
        "RESET" => reset(&mut cursor),
        "DISCARD" => match cursor.keyword().as_deref() {
            Some("ALL") => Class::Discard(Discard::All),
            Some("PLANS") => Class::Discard(Discard::Plans),
            Some("SEQUENCES") => Class::Discard(Discard::Sequences),
            Some("TEMP" | "TEMPORARY") => Class::Discard(Discard::Temp),
            _ => Class::Unknown,
        },
        "DECLARE" => declare(&mut cursor),
        "FETCH" | "MOVE" => fetch(&mut cursor, first == "MOVE"),
        "CLOSE" => one_or_all(&mut cursor).map_or(Class::Unknown, Class::Close),
        "LISTEN" => cursor.identifier().map_or(Class::Unknown, Class::Listen),
        "UNLISTEN" => {
            if cursor.peek_kind() == Some(TokenKind::Symbol) {
                return Class::Unlisten(None);
            }
            cursor
                .identifier()
                .map_or(Class::Unknown, |name| Class::Unlisten(Some(name)))
        }
        "NOTIFY" => Class::Notify,
        "SHOW" => Class::Show,
        "EXPLAIN" => explain(&mut cursor, statement, settings, nesting),
        "VACUUM" => Class::Vacuum,
        "ANALYZE" | "ANALYSE" => Class::Analyze,
        "LOCK" => Class::Lock,
        "CHECKPOINT" | "LOAD" => Class::Other,
        _ => ddl::ddl(&first, &mut cursor).map_or(Class::Unknown, Class::Ddl),
    }
}

/// SELECT, VALUES, TABLE, WITH, or any of them in parentheses.
fn query(statement: &[u8], settings: LexSettings) -> Class {
    if let Some(ddl) = select_into(statement, settings) {
        return Class::Ddl(ddl);
    }
    match read::read(statement, settings) {
        Query::Read(facts) => Class::Read(Arc::new(facts)),
        Query::Write => Class::Write,
        Query::Locking(_) => Class::Lock,
        Query::NotUnderstood => Class::Unknown,
    }
}

/// SELECT … INTO, wherever in the leftmost SELECT the INTO stands. INTO is a reserved word:
/// besides, only INSERT and MERGE are followed by it, and AS or a dot make it a mere name.
fn select_into(statement: &[u8], settings: LexSettings) -> Option<Ddl> {
    let mut cursor = Cursor::new(statement, settings);
    let mut previous_makes_it_other = false;
    loop {
        if cursor.at("INTO") && !previous_makes_it_other {
            cursor.next();
            let temporary = {
                cursor.eat_any(&["LOCAL", "GLOBAL"]);
                cursor.eat_any(&["TEMP", "TEMPORARY"])
            };
            cursor.eat("UNLOGGED");
            cursor.eat("TABLE");
            let name = cursor.name();
            let temporary = temporary || name.as_ref().is_some_and(ddl::in_temporary_schema);
            return Some(Ddl {
                kind: if temporary {
                    DdlKind::Temporary
                } else {
                    DdlKind::Transactional
                },
                tag: "SELECT INTO".to_owned(),
                name,
                computes_rows: true,
                concerns: Vec::new(),
                routes: Vec::new(),
            });
        }
        previous_makes_it_other =
            cursor.at_any(&["INSERT", "MERGE", "AS"]) || cursor.peek_kind() == Some(TokenKind::Dot);
        cursor.next()?;
    }
}

fn transaction_control(first: &str, cursor: &mut Cursor<'_>) -> Class {
    use TransactionControl as Control;
    let control = match first {
        "BEGIN" | "START" => {
            let mut read_only = false;
            while cursor.peek_kind().is_some() {
                if cursor.eat("READ") {
                    // The last of several modes holds, as with the server.
                    read_only = cursor.at("ONLY");
                }
                cursor.next();
            }
            Control::Begin { read_only }
        }
        "COMMIT" if cursor.at("PREPARED") => Control::CommitPrepared,
        "ROLLBACK" if cursor.at("PREPARED") => Control::RollbackPrepared,
        "SAVEPOINT" => Control::Savepoint,
        "RELEASE" => Control::Release,
        _ => {
            cursor.eat_any(&["WORK", "TRANSACTION"]);
            if matches!(first, "ROLLBACK") && cursor.at("TO") {
                Control::RollbackTo
            } else {
                let chain = cursor.eat("AND") && cursor.eat("CHAIN");
                match first {
                    "COMMIT" | "END" => Control::Commit { chain },
                    _ => Control::Rollback { chain },
                }
            }
        }
    };
    Class::Transaction(control)
}

fn one_or_all(cursor: &mut Cursor<'_>) -> Option<Option<String>> {
    if cursor.at("ALL") {
        return Some(None);
    }
    cursor.identifier().map(Some)
}

fn set(cursor: &mut Cursor<'_>) -> Class {
    let mut local = false;
    if cursor.eat("CONSTRAINTS") {
        return Class::Set(Set {
            what: SetWhat::Constraints,
            local: true,
        });
    }
    let first = cursor.rest();
    if cursor.eat("LOCAL") {
        local = true;
    } else if cursor.eat("SESSION") && cursor.eat("CHARACTERISTICS") {
        let what = SetWhat::SessionCharacteristics;
        return Class::Set(Set { what, local: false });
    }
    if cursor.peek_kind() == Some(TokenKind::Dot) {
        // A custom setting of the class `session` or `local`.
        let name = setting_name(&mut Cursor::new(first, LexSettings::default()));
        return name.map_or(Class::Unknown, |name| {
            let what = SetWhat::Setting(name);
            Class::Set(Set { what, local: false })
        });
    }
    // SET SESSION AUTHORIZATION names an authorization, SET [SESSION | LOCAL] SESSION
    // AUTHORIZATION one for that long; `authorization` is reserved, so it is no setting.
    let what = if cursor.eat("AUTHORIZATION") {
        SetWhat::SessionAuthorization
    } else if cursor.eat("SESSION") {
        match cursor.keyword().as_deref() {
            Some("AUTHORIZATION") => SetWhat::SessionAuthorization,
            _ => return Class::Unknown,
        }
    } else if cursor.eat("TRANSACTION") {
        local = true;
        let mut read_write = false;
        while cursor.peek_kind().is_some() {
            read_write |= cursor.at("WRITE");
            cursor.next();
        }
        SetWhat::Transaction { read_write }
    } else {
        let Some(name) = setting_name(cursor) else {
            return Class::Unknown;
        };
        match name.as_str() {
            "role" => SetWhat::Role,
            "time" if cursor.at("ZONE") => SetWhat::Setting("timezone".to_owned()),
            "names" => SetWhat::Setting("client_encoding".to_owned()),
            "schema" => SetWhat::Setting("search_path".to_owned()),
            "xml" if cursor.at("OPTION") => SetWhat::Setting("xmloption".to_owned()),
            _ => SetWhat::Setting(name),
        }
    };
    Class::Set(Set { what, local })
}

fn reset(cursor: &mut Cursor<'_>) -> Class {
    if cursor.eat("ALL") {
        return Class::Reset(Reset::All);
    }
    if cursor.eat("SESSION") {
        return match cursor.keyword().as_deref() {
            Some("AUTHORIZATION") => Class::Reset(Reset::SessionAuthorization),
            _ => Class::Unknown,
        };
    }
    match setting_name(cursor) {
        None => Class::Unknown,
        Some(name) if name == "role" => Class::Reset(Reset::Role),
        Some(name) if name == "time" && cursor.at("ZONE") => Class::Reset(Reset::Setting("timezone".to_owned())),
        Some(name) if name == "transaction" => Class::Reset(Reset::Setting("transaction_isolation".to_owned())),
        Some(name) => Class::Reset(Reset::Setting(name)),
    }
}

/// A setting's name with all its dots; settings are found without regard to case.
fn setting_name(cursor: &mut Cursor<'_>) -> Option<String> {
    let mut name = cursor.identifier()?;
    while cursor.eat_kind(TokenKind::Dot) {
        name.push('.');
        name.push_str(&cursor.identifier()?);
    }
    Some(name.to_ascii_lowercase())
}

fn declare(cursor: &mut Cursor<'_>) -> Class {
    let Some(name) = cursor.identifier() else {
        return Class::Unknown;
    };
    // BINARY INSENSITIVE NO SCROLL CURSOR {WITH | WITHOUT} HOLD FOR query
    let (mut hold, mut binary) = (false, false);
    while cursor.peek_kind().is_some() && !cursor.at("FOR") {
        if cursor.eat("WITH") {
            hold = cursor.at("HOLD");
        }
        binary |= cursor.at("BINARY");
        cursor.next();
    }
    cursor.eat("FOR");
    Class::Declare(Declare {
        name,
        hold,
        binary,
        query: cursor.rest().into(),
    })
}

/// PREPARE name [(types)] AS statement, from behind the name.
fn prepare(cursor: &mut Cursor<'_>, name: String) -> Class {
    cursor.skip_parens(|_| {});
    cursor.eat("AS");
    Class::Prepare(Prepare {
        name,
        statement: cursor.rest().into(),
    })
}

/// EXECUTE name [(arguments)]
fn execute(cursor: &mut Cursor<'_>, settings: LexSettings) -> Class {
    let Some(name) = cursor.identifier() else {
        return Class::Unknown;
    };
    let arguments = if cursor.peek_kind() == Some(TokenKind::OpenParen) {
        let values = [b"VALUES ", cursor.rest()].concat();
        match classify(&values, settings) {
            Class::Read(facts) => Some(facts),
            _ => None,
        }
    } else {
        Some(Arc::default())
    };
    Class::Execute(Execute { name, arguments })
}

/// FETCH [direction] [FROM | IN] name: the name is the last word.
fn fetch(cursor: &mut Cursor<'_>, moves: bool) -> Class {
    let onward = onward(cursor);
    let mut name = None;
    while cursor.peek_kind().is_some() {
        match cursor.peek_kind() {
            Some(TokenKind::Word | TokenKind::QuotedWord) => name = cursor.identifier(),
            _ => {
                cursor.next();
            }
        }
    }
    name.map_or(Class::Unknown, |cursor| {
        Class::Fetch(Fetch {
            cursor,
            onward: onward.filter(|_| !moves),
        })
    })
}

/// Takes a direction; says how many rows onward it asks for, where it does.
fn onward(cursor: &mut Cursor<'_>) -> Option<FetchRows> {
    // A cursor may have a direction's name: `FETCH next` fetches from it.
    let (before, first) = (cursor.clone(), cursor.peek_kind());
    let forward = cursor.eat("FORWARD");
    let rows = if cursor.eat("ALL") {
        Some(FetchRows::All)
    } else if cursor.peek_kind() == Some(TokenKind::Number) {
        let number = cursor.next()?;
        let digits = std::str::from_utf8(cursor.bytes(&number)).ok()?;
        Some(FetchRows::Count(digits.parse().ok()?))
    } else if forward || cursor.eat("NEXT") || cursor.at("FROM") || cursor.at("IN") {
        Some(FetchRows::Count(1))
    } else if cursor.at_any(&["PRIOR", "FIRST", "LAST", "ABSOLUTE", "RELATIVE", "BACKWARD"])
        || !matches!(first, Some(TokenKind::Word | TokenKind::QuotedWord))
    {
        None
    } else {
        // Nothing but the cursor's name.
        Some(FetchRows::Count(1))
    };
    if cursor.peek_kind().is_none() {
        *cursor = before;
        return Some(FetchRows::Count(1));
    }
    // FETCH 0 gives the current row again.
    rows.filter(|rows| *rows != FetchRows::Count(0))
}

/// COPY {table [(columns)] | (query)} {FROM | TO} …
fn copy(cursor: &mut Cursor<'_>, statement: &[u8], settings: LexSettings) -> Class {
    let mut may_write = false;
    let read: Option<Arc<ReadFacts>>;
    cursor.eat("BINARY");
    if cursor.peek_kind() == Some(TokenKind::OpenParen) {
        let mut inner: Option<std::ops::Range<usize>> = None;
        cursor.skip_parens(|token| {
            let start = inner.as_ref().map_or(token.span.start, |inner| inner.start);
            inner = Some(start..token.span.end);
        });
        let inner = inner.map_or(&[][..], |span| &statement[span]);
        read = match classify_nested(inner, settings, 0) {
            Class::Read(facts) => Some(facts),
            _ => None,
        };
        may_write = read.is_none();
    } else {
        let Some(name) = cursor.name() else {
            return Class::Unknown;
        };
        cursor.skip_parens(|_| {});
        read = Some(Arc::new(ReadFacts {
            relations: vec![RelationUse {
                name,
                perhaps_cte: false,
            }],
            ..ReadFacts::default()
        }));
    }
    let from = cursor.eat("FROM");
    if !from && !cursor.eat("TO") {
        return Class::Unknown;
    }
    cursor.eat("PROGRAM");
    let client = cursor.peek_kind() == Some(TokenKind::Word);
    if from {
        Class::CopyFrom(CopyFrom { stdin: client })
    } else {
        Class::CopyTo(CopyTo {
            stdout: client,
            may_write,
            read,
        })
    }
}

/// EXPLAIN executes nothing, EXPLAIN ANALYZE executes its statement.
fn explain(cursor: &mut Cursor<'_>, statement: &[u8], settings: LexSettings, nesting: usize) -> Class {
    let mut analyze = false;
    if cursor.peek_kind() == Some(TokenKind::OpenParen) {
        // Of a repeated option the last value holds; any `analyze` but one followed by a
        // negation counts here, so that at worst a harmless EXPLAIN is taken for a write.
        let mut named = false;
        let mut query = false;
        cursor.skip_parens(|token| {
            let token = &statement[token.span.clone()];
            let is = |word: &str| token.eq_ignore_ascii_case(word.as_bytes());
            query |= is("SELECT") || is("WITH") || is("VALUES") || is("TABLE");
            if is("ANALYZE") || is("ANALYSE") {
                named = true;
                analyze = true;
            } else {
                if named && (is("OFF") || is("FALSE") || is("0") || is("'off'") || is("'false'")) {
                    analyze = false;
                }
                named = false;
            }
        });
        if query {
            // EXPLAIN (SELECT …): the parentheses were the query's own.
            return Class::Explain { analyze: false };
        }
    } else {
        while cursor.at_any(&["ANALYZE", "ANALYSE", "VERBOSE"]) {
            analyze |= !cursor.at("VERBOSE");
            cursor.next();
        }
    }
    if !analyze {
        return Class::Explain { analyze: false };
    }
    let rest = cursor.rest();
    match nesting
        .checked_sub(1)
        .map(|nesting| classify_nested(rest, settings, nesting))
    {
        Some(Class::Read(_) | Class::Declare(_)) => Class::Explain { analyze: true },
        Some(Class::Ddl(ddl)) => Class::Ddl(ddl),
        // What an EXECUTE does was said by a PREPARE: here it is taken for the worst.
        Some(Class::Write | Class::Execute(_)) => Class::Write,
        _ => Class::Unknown,
    }
}

/// Whether a token is a string constant whose value is plain to see, and the value.
pub(super) fn plain_string(kind: TokenKind, bytes: &[u8]) -> Option<String> {
    match (kind, bytes) {
        (TokenKind::String(StringKind::Plain), [b'\'', inner @ .., b'\'']) => {
            Some(String::from_utf8_lossy(inner).replace("''", "'"))
        }
        (TokenKind::String(StringKind::Escape), [_, b'\'', inner @ .., b'\'']) if !inner.contains(&b'\\') => {
            Some(String::from_utf8_lossy(inner).replace("''", "'"))
        }
        (TokenKind::String(StringKind::Dollar), body) => {
            let tag = body[1..].iter().position(|&byte| byte == b'$')? + 2;
            Some(String::from_utf8_lossy(body.get(tag..body.len().checked_sub(tag)?)?).into_owned())
        }
        _ => None,
    }
}
