//! Recognises schema changes by their words and decides how each reaches the secondary.
//!
//! The grammar is PostgreSQL's own (`gram.y`); what refuses to run inside a transaction is what
//! calls `PreventInTransactionBlock` there. Nothing here depends on sqlparser: a schema change
//! it cannot parse is a schema change all the same.

use std::ops::Range;

use super::class::{Ddl, DdlKind, NotMirrored, QualifiedName};
use super::cursor::Cursor;
use super::lexer::{LexSettings, TokenKind};

/// The schema change that begins with `first`, which the cursor stands behind.
pub(super) fn ddl(first: &str, cursor: &mut Cursor<'_>) -> Option<Ddl> {
    let ddl = match first {
        "CREATE" => create(cursor),
        "ALTER" => alter(cursor),
        "DROP" => drop(cursor),
        "COMMENT" | "GRANT" | "REVOKE" => on_object(first, cursor),
        "SECURITY" if cursor.at("LABEL") => on_object("SECURITY LABEL", cursor),
        "REINDEX" | "CLUSTER" => not_mirrored(first, NotMirrored::Maintenance),
        "REFRESH" => {
            for word in ["MATERIALIZED", "VIEW", "CONCURRENTLY"] {
                cursor.eat(word);
            }
            let mut ddl = transactional("REFRESH MATERIALIZED VIEW", cursor.name());
            ddl.computes_rows = true;
            ddl
        }
        "IMPORT" => transactional("IMPORT FOREIGN SCHEMA", None),
        "REASSIGN" => transactional("REASSIGN OWNED", None),
        _ => return None,
    };
    Some(ddl)
}

/// Whether a name lies in the session's schema of temporary objects.
pub(super) fn in_temporary_schema(name: &QualifiedName) -> bool {
    name.schema
        .as_deref()
        .is_some_and(|schema| schema == "pg_temp" || schema.starts_with("pg_temp_"))
}

fn transactional(tag: &str, name: Option<QualifiedName>) -> Ddl {
    let temporary = name.as_ref().is_some_and(in_temporary_schema);
    Ddl {
        kind: if temporary {
            DdlKind::Temporary
        } else {
            DdlKind::Transactional
        },
        tag: tag.to_owned(),
        name,
        computes_rows: false,
        concerns: Vec::new(),
        routes: Vec::new(),
    }
}

fn not_mirrored(tag: &str, reason: NotMirrored) -> Ddl {
    Ddl {
        kind: DdlKind::NotMirrored(reason),
        tag: tag.to_owned(),
        name: None,
        computes_rows: false,
        concerns: Vec::new(),
        routes: Vec::new(),
    }
}

/// The kind of object that CREATE, ALTER and DROP name, as the command tag has it.
fn object(cursor: &mut Cursor<'_>) -> String {
    let Some(first) = cursor.keyword() else {
        return "OBJECT".to_owned();
    };
    let more: &[&str] = match first.as_str() {
        "MATERIALIZED" | "RECURSIVE" => &["VIEW"],
        "FOREIGN" => &["TABLE", "DATA", "WRAPPER"],
        "EVENT" | "CONSTRAINT" => &["TRIGGER"],
        "ACCESS" => &["METHOD"],
        "TEXT" => &["SEARCH", "CONFIGURATION", "DICTIONARY", "PARSER", "TEMPLATE"],
        "USER" => &["MAPPING"],
        "OPERATOR" => &["CLASS", "FAMILY"],
        "DEFAULT" => &["PRIVILEGES", "CONVERSION"],
        "LARGE" => &["OBJECT"],
        "UNIQUE" => &["INDEX"],
        "PROCEDURAL" | "TRUSTED" => &["PROCEDURAL", "LANGUAGE"],
        "OWNED" => &["BY"],
        _ => &[],
    };
    let mut words = vec![first];
    for word in more {
        if cursor.eat(word) {
            words.push((*word).to_owned());
        }
    }
    match words.join(" ").as_str() {
        // Spellings of one kind.
        "UNIQUE INDEX" => "INDEX".to_owned(),
        "RECURSIVE VIEW" => "VIEW".to_owned(),
        "CONSTRAINT TRIGGER" => "TRIGGER".to_owned(),
        "DEFAULT CONVERSION" => "CONVERSION".to_owned(),
        "OWNED BY" => "OWNED".to_owned(),
        "PROCEDURAL LANGUAGE" | "TRUSTED LANGUAGE" | "TRUSTED PROCEDURAL LANGUAGE" => "LANGUAGE".to_owned(),
        other => other.to_owned(),
    }
}

fn create(cursor: &mut Cursor<'_>) -> Ddl {
    if cursor.eat("OR") {
        cursor.eat("REPLACE");
    }
    cursor.eat_any(&["LOCAL", "GLOBAL"]);
    let temporary = cursor.eat_any(&["TEMP", "TEMPORARY"]);
    cursor.eat("UNLOGGED");
    let object = object(cursor);
    let tag = format!("CREATE {object}");
    let concurrently = object == "INDEX" && cursor.eat("CONCURRENTLY");
    if_exists(cursor);
    let name = match object.as_str() {
        // These name no object of their own first, or none with a schema.
        "INDEX" if cursor.at("ON") => None,
        "USER MAPPING" | "CAST" | "TRANSFORM" | "OPERATOR" => None,
        _ => cursor.name(),
    };
    let mut ddl = transactional(&tag, name);
    match object.as_str() {
        "DATABASE" => ddl.kind = DdlKind::Outside,
        "TABLESPACE" => ddl.kind = DdlKind::NotMirrored(NotMirrored::Tablespace),
        "SUBSCRIPTION" => ddl.kind = DdlKind::NotMirrored(NotMirrored::Subscription),
        "INDEX" if concurrently => ddl.kind = DdlKind::Outside,
        "TABLE" => {
            ddl.computes_rows = creates_as(cursor);
            if ddl.computes_rows {
                ddl.tag = "CREATE TABLE AS".to_owned();
            }
        }
        "MATERIALIZED VIEW" => ddl.computes_rows = true,
        "INDEX" | "TRIGGER" | "POLICY" => ddl.concerns = after(cursor, "ON"),
        "RULE" => ddl.concerns = after(cursor, "TO"),
        "STATISTICS" => ddl.concerns = after(cursor, "FROM"),
        _ => {}
    }
    if temporary {
        ddl.kind = DdlKind::Temporary;
    }
    ddl
}

/// CREATE TABLE name [(columns)] [USING …] [WITH (…)] [ON COMMIT …] [TABLESPACE …] AS: an AS at
/// the outermost level that nothing but a query, EXECUTE or a parenthesis follows.
fn creates_as(cursor: &mut Cursor<'_>) -> bool {
    while let Some(kind) = cursor.peek_kind() {
        if kind == TokenKind::OpenParen {
            cursor.skip_parens(|_| {});
        } else if cursor.eat("AS") {
            return cursor.peek_kind() == Some(TokenKind::OpenParen)
                || cursor.at_any(&["SELECT", "WITH", "VALUES", "TABLE", "EXECUTE"]);
        } else {
            cursor.next();
        }
    }
    false
}

fn if_exists(cursor: &mut Cursor<'_>) {
    if cursor.eat("IF") {
        cursor.eat("NOT");
        cursor.eat("EXISTS");
    }
}

fn alter(cursor: &mut Cursor<'_>) -> Ddl {
    let object = object(cursor);
    let tag = format!("ALTER {object}");
    match object.as_str() {
        "SYSTEM" => return not_mirrored(&tag, NotMirrored::ServerConfiguration),
        "TABLESPACE" => return not_mirrored(&tag, NotMirrored::Tablespace),
        "SUBSCRIPTION" => return not_mirrored(&tag, NotMirrored::Subscription),
        "LARGE OBJECT" => return not_mirrored(&tag, NotMirrored::LargeObject),
        "TABLE" | "INDEX" | "MATERIALIZED VIEW" if cursor.at("ALL") => {
            // ALTER TABLE ALL IN TABLESPACE …: `all` is reserved, so it is no name.
            return not_mirrored(&tag, NotMirrored::Tablespace);
        }
        _ => {}
    }
    if_exists(cursor);
    cursor.eat("ONLY");
    let name = match object.as_str() {
        "DEFAULT PRIVILEGES" | "USER MAPPING" | "OPERATOR" => None,
        _ => cursor.name(),
    };
    let mut ddl = transactional(&tag, name);
    if is_relation(&object) {
        ddl.concerns.extend(ddl.name.clone());
    } else if is_on_relation(&object) {
        ddl.concerns = after(cursor, "ON");
    }
    if cursor.peek_kind() == Some(TokenKind::Symbol) {
        cursor.next(); // ALTER TABLE name *
    }
    if cursor.at("SET") {
        cursor.next();
        if cursor.at("TABLESPACE") && !more_actions(cursor) {
            ddl.kind = DdlKind::NotMirrored(NotMirrored::Tablespace);
        }
    } else if cursor.eat("DETACH") {
        cursor.eat("PARTITION");
        cursor.name();
        // FINALIZE completes what CONCURRENTLY began and may run in a transaction.
        if cursor.at("CONCURRENTLY") {
            ddl.kind = DdlKind::Outside;
        }
    } else if object == "TABLE" && cursor.eat("ATTACH") {
        cursor.eat("PARTITION");
        ddl.routes.extend(cursor.name());
    } else if object == "TABLE" && inherits(cursor) {
        ddl.routes.extend(ddl.name.clone());
    }
    ddl
}

/// Whether one of ALTER TABLE's actions is INHERIT. NO INHERIT and a constraint's NO INHERIT count,
/// too: more is no harm.
fn inherits(cursor: &mut Cursor<'_>) -> bool {
    while let Some(kind) = cursor.peek_kind() {
        if kind == TokenKind::OpenParen {
            cursor.skip_parens(|_| {});
        } else if cursor.eat("INHERIT") {
            return true;
        } else {
            cursor.next();
        }
    }
    false
}

/// The relation that is named behind a word at the outermost level.
fn after(cursor: &mut Cursor<'_>, word: &str) -> Vec<QualifiedName> {
    while let Some(kind) = cursor.peek_kind() {
        if kind == TokenKind::OpenParen {
            cursor.skip_parens(|_| {});
        } else if cursor.eat(word) {
            cursor.eat("ONLY");
            return cursor.name().into_iter().collect();
        } else {
            cursor.next();
        }
    }
    Vec::new()
}

/// Kinds of objects that live among relations, and so may be temporary.
fn is_relation(object: &str) -> bool {
    [
        "TABLE",
        "VIEW",
        "MATERIALIZED VIEW",
        "SEQUENCE",
        "INDEX",
        "FOREIGN TABLE",
    ]
    .contains(&object)
}

/// Kinds of objects that are named with the relation that they belong to.
fn is_on_relation(object: &str) -> bool {
    ["TRIGGER", "POLICY", "RULE", "CONSTRAINT"].contains(&object)
}

fn names(cursor: &mut Cursor<'_>) -> Vec<QualifiedName> {
    let mut names: Vec<QualifiedName> = cursor.name().into_iter().collect();
    while cursor.eat_kind(TokenKind::Comma) {
        names.extend(cursor.name());
    }
    names
}

/// How `ALTER TABLE … DETACH PARTITION` is to be done, where it says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detach {
    pub partition: QualifiedName,
    /// `FINALIZE` completes what a `CONCURRENTLY` that was cut short began.
    pub finalizes: bool,
    /// Where that word stands in the text.
    pub word: Range<usize>,
}

/// `None` for any other statement.
pub fn detach(text: &[u8]) -> Option<Detach> {
    let mut cursor = Cursor::new(text, LexSettings::default());
    if !cursor.eat("ALTER") || !cursor.eat("TABLE") {
        return None;
    }
    if_exists(&mut cursor);
    cursor.eat("ONLY");
    cursor.name()?;
    if cursor.peek_kind() == Some(TokenKind::Symbol) {
        cursor.next(); // ALTER TABLE name *
    }
    if !cursor.eat("DETACH") || !cursor.eat("PARTITION") {
        return None;
    }
    let partition = cursor.name()?;
    let finalizes = cursor.at("FINALIZE");
    if !finalizes && !cursor.at("CONCURRENTLY") {
        return None;
    }
    let start = text.len() - cursor.rest().len();
    let length = if finalizes { "FINALIZE" } else { "CONCURRENTLY" }.len();
    Some(Detach {
        partition,
        finalizes,
        word: start..start + length,
    })
}

/// Where IF EXISTS belongs in a DROP INDEX or ALTER INDEX that lacks it, as a byte offset; `None`
/// also where Postgres' grammar has no place for it.
pub fn place_for_if_exists(text: &[u8]) -> Option<usize> {
    let mut cursor = Cursor::new(text, LexSettings::default());
    if !cursor.eat_any(&["DROP", "ALTER"]) || !cursor.eat("INDEX") {
        return None;
    }
    cursor.eat("CONCURRENTLY");
    if cursor.at_any(&["IF", "ALL"]) {
        return None;
    }
    let place = text.len() - cursor.rest().len();
    cursor.name()?;
    let takes_none = cursor.at_any(&["ATTACH", "DEPENDS", "NO"]);
    (!takes_none).then_some(place)
}

/// Whether a comma at the outermost level announces another action of ALTER TABLE.
fn more_actions(cursor: &mut Cursor<'_>) -> bool {
    while let Some(kind) = cursor.peek_kind() {
        match kind {
            TokenKind::Comma => return true,
            TokenKind::OpenParen => cursor.skip_parens(|_| {}),
            _ => {
                cursor.next();
            }
        }
    }
    false
}

fn drop(cursor: &mut Cursor<'_>) -> Ddl {
    let object = object(cursor);
    let tag = format!("DROP {object}");
    let concurrently = object == "INDEX" && cursor.eat("CONCURRENTLY");
    if_exists(cursor);
    let name = match object.as_str() {
        "OWNED" | "USER MAPPING" | "CAST" | "TRANSFORM" | "OPERATOR" => None,
        _ => cursor.name(),
    };
    let mut ddl = transactional(&tag, name);
    if is_relation(&object) {
        ddl.concerns.extend(ddl.name.clone());
        if cursor.eat_kind(TokenKind::Comma) {
            ddl.concerns.extend(names(cursor));
        }
    } else if is_on_relation(&object) {
        ddl.concerns = after(cursor, "ON");
    }
    match object.as_str() {
        "DATABASE" => ddl.kind = DdlKind::Outside,
        "TABLESPACE" => ddl.kind = DdlKind::NotMirrored(NotMirrored::Tablespace),
        "SUBSCRIPTION" => ddl.kind = DdlKind::NotMirrored(NotMirrored::Subscription),
        "INDEX" if concurrently => ddl.kind = DdlKind::Outside,
        _ => {}
    }
    ddl
}

/// COMMENT ON, GRANT … ON, REVOKE … ON, SECURITY LABEL … ON.
fn on_object(tag: &str, cursor: &mut Cursor<'_>) -> Ddl {
    while cursor.peek_kind().is_some() {
        if cursor.peek_kind() == Some(TokenKind::OpenParen) {
            cursor.skip_parens(|_| {});
        } else if cursor.eat("ON") {
            if cursor.eat("LARGE") && cursor.at("OBJECT") {
                return not_mirrored(tag, NotMirrored::LargeObject);
            }
            if cursor.at("TABLESPACE") {
                return not_mirrored(tag, NotMirrored::Tablespace);
            }
            if cursor.at("SUBSCRIPTION") {
                return not_mirrored(tag, NotMirrored::Subscription);
            }
            let mut ddl = transactional(tag, None);
            ddl.concerns = if tag == "COMMENT" {
                commented(cursor)
            } else {
                granted(cursor)
            };
            return ddl;
        } else {
            cursor.next();
        }
    }
    // GRANT role TO role.
    transactional(tag, None)
}

/// The relation of COMMENT ON …
fn commented(cursor: &mut Cursor<'_>) -> Vec<QualifiedName> {
    let object = object(cursor);
    if is_relation(&object) {
        return cursor.name().into_iter().collect();
    }
    if is_on_relation(&object) {
        return after(cursor, "ON");
    }
    if object != "COLUMN" {
        return Vec::new();
    }
    let mut parts: Vec<String> = cursor.identifier().into_iter().collect();
    while cursor.eat_kind(TokenKind::Dot) {
        parts.extend(cursor.identifier());
    }
    parts.pop();
    let name = parts.pop();
    name.map(|name| QualifiedName {
        schema: parts.pop(),
        name,
    })
    .into_iter()
    .collect()
}

/// The relations of GRANT … ON and REVOKE … ON.
fn granted(cursor: &mut Cursor<'_>) -> Vec<QualifiedName> {
    const OTHERS: &[&str] = &[
        "FUNCTION",
        "PROCEDURE",
        "ROUTINE",
        "SCHEMA",
        "DATABASE",
        "TYPE",
        "DOMAIN",
        "LANGUAGE",
        "PARAMETER",
        "FOREIGN",
        "ALL",
    ];
    if !cursor.eat_any(&["TABLE", "SEQUENCE"]) && cursor.at_any(OTHERS) {
        return Vec::new();
    }
    names(cursor)
}
