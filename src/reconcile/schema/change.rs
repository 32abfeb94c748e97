//! What is to be done with an object that both sides have and define differently.

use serde_json::Value;

use super::make::{list, options, text};
use crate::catalog::definitions::unqualified;
use crate::catalog::objects::{Key, Object, Objects};
use crate::catalog::quote::{identifier, literal};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Create,
    Drop,
    /// Dropped and made again.
    Replace,
    Alter {
        statements: Vec<String>,
        /// Committed before what follows.
        apart: bool,
        /// What rests on a column's type must make way.
        retypes: bool,
        /// Run last.
        owner: Vec<String>,
    },
    /// Says why.
    Cannot(String),
}

impl Verdict {
    const fn alter(statements: Vec<String>) -> Self {
        Self::Alter {
            statements,
            apart: false,
            retypes: false,
            owner: Vec::new(),
        }
    }
}

/// What may be dropped and made again without a row being lost.
pub(super) fn may_be_made_again(kind: &str) -> bool {
    [
        "view",
        "rule",
        "trigger",
        "policy",
        "default",
        "constraint",
        "index",
        "statistics",
        "function",
        "aggregate",
    ]
    .contains(&kind)
}

/// Kinds with an owner of their own.
fn has_owner(kind: &str) -> bool {
    [
        "schema",
        "type",
        "sequence",
        "function",
        "aggregate",
        "table",
        "view",
        "statistics",
    ]
    .contains(&kind)
}

/// Whether the two are defined alike, but for what only the server's version writes otherwise.
pub(super) fn alike(kind: &str, one: &Object, other: &Object, same_version: bool) -> bool {
    (!has_owner(kind) || one.owner == other.owner)
        && neutral(kind, &one.recipe, same_version) == neutral(kind, &other.recipe, same_version)
}

fn neutral(kind: &str, recipe: &Value, same_version: bool) -> Value {
    let mut recipe = recipe.clone();
    let Some(fields) = recipe.as_object_mut() else {
        return recipe;
    };
    for position in ["at", "storage_usual", "usual"] {
        fields.remove(position);
    }
    if same_version {
        return recipe;
    }
    for written in ["create", "definition", "query", "default", "generated"] {
        if let Some(Value::String(text)) = fields.get_mut(written)
            && ["view", "rule", "function"].contains(&kind)
        {
            *text = unqualified(text);
        }
    }
    if let Some(Value::Array(acl)) = fields.get_mut("acl") {
        acl.retain(|grant| grant[1] != "MAINTAIN");
    }
    recipe
}

/// How the secondary's object becomes like the primary's.
pub(super) fn between(key: &Key, to: &Object, from: &Object, primary: &Objects, secondary: &Objects) -> Verdict {
    let (kind, name) = (key.0.as_str(), key.1.as_str());
    let mut verdict = match kind {
        "extension" => Verdict::alter(vec![format!(
            "ALTER EXTENSION {name} SET SCHEMA {}",
            text(to, "schema").unwrap_or_default()
        )]),
        "type" => of_type(name, to, from),
        "sequence" => of_sequence(name, to, from),
        "function" if to.recipe["result"] == from.recipe["result"] && to.recipe["is"] == from.recipe["is"] => {
            Verdict::alter(vec![text(to, "create").unwrap_or_default().trim_end().to_owned()])
        }
        "table" => of_table(name, to, from),
        "column" => of_column(to, from, primary.get("default", name), secondary.get("default", name)),
        "default" => Verdict::alter(vec![format!(
            "ALTER TABLE ONLY {} ALTER COLUMN {} SET DEFAULT {}",
            to.root,
            text(to, "column").unwrap_or_default(),
            text(to, "default").unwrap_or_default()
        )]),
        "constraint"
            if text(to, "definition") == text(from, "definition").map(|of| of.trim_end_matches(" NOT VALID")) =>
        {
            Verdict::alter(vec![format!(
                "ALTER {} {} VALIDATE CONSTRAINT {}",
                if to.recipe["of_domain"] == true {
                    "DOMAIN"
                } else {
                    "TABLE"
                },
                to.root,
                text(to, "constraint").unwrap_or_default()
            )])
        }
        "trigger" | "rule" if to.recipe["definition"] == from.recipe["definition"] => {
            Verdict::alter(super::make::enabled(kind, to).into_iter().collect())
        }
        "view"
            if to.recipe["query"] == from.recipe["query"]
                && to.recipe["columns"] == from.recipe["columns"]
                && to.recipe["is"] == from.recipe["is"] =>
        {
            let mut statements = options(&format!("ALTER {} {name}", view_word(to)), from, to);
            if to.recipe["unpopulated"] != from.recipe["unpopulated"] {
                let with = if to.recipe["unpopulated"] == true { "NO " } else { "" };
                statements.push(format!("REFRESH MATERIALIZED VIEW {name} WITH {with}DATA"));
            }
            Verdict::alter(statements)
        }
        "schema" | "grant" | "comment" => Verdict::alter(Vec::new()),
        _ => Verdict::Replace,
    };
    if has_owner(kind)
        && to.owner != from.owner
        && let Verdict::Alter { owner, .. } = &mut verdict
    {
        owner.push(format!(
            "ALTER {} {name} OWNER TO {}",
            word(kind, to),
            identifier(&to.owner)
        ));
    }
    verdict
}

/// What a kind is called in ALTER and DROP.
pub(super) fn word(kind: &str, object: &Object) -> &'static str {
    match kind {
        "schema" => "SCHEMA",
        "extension" => "EXTENSION",
        "type" if object.recipe["form"] == "d" => "DOMAIN",
        "type" => "TYPE",
        "sequence" => "SEQUENCE",
        "function" => "ROUTINE",
        "aggregate" => "AGGREGATE",
        "index" => "INDEX",
        "view" => view_word(object),
        "statistics" => "STATISTICS",
        _ => "TABLE",
    }
}

fn view_word(object: &Object) -> &'static str {
    if object.recipe["is"] == "m" {
        "MATERIALIZED VIEW"
    } else {
        "VIEW"
    }
}

fn of_type(name: &str, to: &Object, from: &Object) -> Verdict {
    if to.recipe["form"] != from.recipe["form"] {
        return Verdict::Replace;
    }
    match text(to, "form") {
        Some("e") => of_enum(name, &list(to, "labels"), &list(from, "labels")),
        Some("d") if to.recipe["base"] == from.recipe["base"] && to.recipe["collation"] == from.recipe["collation"] => {
            let mut statements = Vec::new();
            if to.recipe["default"] != from.recipe["default"] {
                statements.push(match text(to, "default") {
                    Some(default) => format!("ALTER DOMAIN {name} SET DEFAULT {default}"),
                    None => format!("ALTER DOMAIN {name} DROP DEFAULT"),
                });
            }
            if to.recipe["not_null"] != from.recipe["not_null"] {
                let set = if to.recipe["not_null"] == true { "SET" } else { "DROP" };
                statements.push(format!("ALTER DOMAIN {name} {set} NOT NULL"));
            }
            Verdict::alter(statements)
        }
        Some("c") => of_composite(name, to, from),
        _ if to.recipe == from.recipe => Verdict::alter(Vec::new()),
        _ => Verdict::Replace,
    }
}

/// Labels can be added and renamed, never removed or moved.
fn of_enum(name: &str, to: &[String], from: &[String]) -> Verdict {
    if to.len() == from.len() {
        let renamed = from.iter().zip(to).filter(|(old, new)| old != new);
        let statements: Vec<String> = renamed
            .clone()
            .map(|(old, new)| format!("ALTER TYPE {name} RENAME VALUE {} TO {}", literal(old), literal(new)))
            .collect();
        let moved = renamed.clone().any(|(_, new)| from.contains(new));
        return if moved {
            Verdict::Replace
        } else {
            Verdict::alter(statements)
        };
    }
    let mut here = from.iter().peekable();
    let mut statements = Vec::new();
    for label in to {
        if here.peek() == Some(&label) {
            here.next();
        } else {
            let place = here
                .peek()
                .map_or_else(String::new, |next| format!(" BEFORE {}", literal(next)));
            statements.push(format!("ALTER TYPE {name} ADD VALUE {}{place}", literal(label)));
        }
    }
    if here.peek().is_some() {
        return Verdict::Replace;
    }
    Verdict::Alter {
        statements,
        apart: true,
        retypes: false,
        owner: Vec::new(),
    }
}

fn of_composite(name: &str, to: &Object, from: &Object) -> Verdict {
    let attributes = |object: &Object| -> Vec<(String, String)> {
        serde_json::from_value(object.recipe["attributes"].clone()).unwrap_or_default()
    };
    let (to, from) = (attributes(to), attributes(from));
    let mut statements = Vec::new();
    for (attribute, _) in from.iter().filter(|(old, _)| !to.iter().any(|(new, _)| new == old)) {
        statements.push(format!("ALTER TYPE {name} DROP ATTRIBUTE {attribute}"));
    }
    for (attribute, written) in &to {
        match from.iter().find(|(old, _)| old == attribute) {
            None => statements.push(format!("ALTER TYPE {name} ADD ATTRIBUTE {attribute} {written}")),
            Some((_, before)) if before != written => {
                statements.push(format!("ALTER TYPE {name} ALTER ATTRIBUTE {attribute} TYPE {written}"));
            }
            Some(_) => {}
        }
    }
    Verdict::alter(statements)
}

fn of_sequence(name: &str, to: &Object, from: &Object) -> Verdict {
    let mut statements = Vec::new();
    if to.recipe["parameters"] != from.recipe["parameters"] {
        statements.push(format!(
            "ALTER SEQUENCE {name} {}",
            text(to, "parameters").unwrap_or_default()
        ));
    }
    if to.recipe["persistence"] != from.recipe["persistence"] {
        statements.push(format!("ALTER SEQUENCE {name} SET {}", super::make::logged(to)));
    }
    let mut verdict = Verdict::alter(statements);
    if to.recipe["owned_by"] != from.recipe["owned_by"]
        && let Verdict::Alter { owner, .. } = &mut verdict
    {
        owner.push(format!(
            "ALTER SEQUENCE {name} OWNED BY {}",
            text(to, "owned_by").unwrap_or("NONE")
        ));
    }
    verdict
}

fn of_table(name: &str, to: &Object, from: &Object) -> Verdict {
    for (fixed, what) in [
        ("partition_by", "partition key"),
        ("of_type", "type"),
        ("method", "access method"),
    ] {
        if to.recipe[fixed] != from.recipe[fixed] {
            return Verdict::Cannot(format!("the {what} differs; the table has to be made anew"));
        }
    }
    let mut statements = Vec::new();
    if to.recipe["parents"] != from.recipe["parents"] || to.recipe["bound"] != from.recipe["bound"] {
        for parent in list(from, "parents") {
            statements.push(match text(from, "bound") {
                Some(_) => format!("ALTER TABLE {parent} DETACH PARTITION {name}"),
                None => format!("ALTER TABLE {name} NO INHERIT {parent}"),
            });
        }
        for parent in list(to, "parents") {
            statements.push(match text(to, "bound") {
                Some(bound) => format!("ALTER TABLE {parent} ATTACH PARTITION {name} {bound}"),
                None => format!("ALTER TABLE {name} INHERIT {parent}"),
            });
        }
    }
    if to.recipe["persistence"] != from.recipe["persistence"] {
        statements.push(format!("ALTER TABLE {name} SET {}", super::make::logged(to)));
    }
    statements.extend(options(&format!("ALTER TABLE {name}"), from, to));
    for (field, on, off) in [
        (
            "row_security",
            "ENABLE ROW LEVEL SECURITY",
            "DISABLE ROW LEVEL SECURITY",
        ),
        ("forced", "FORCE ROW LEVEL SECURITY", "NO FORCE ROW LEVEL SECURITY"),
    ] {
        if to.recipe[field] != from.recipe[field] {
            let action = if to.recipe[field] == true { on } else { off };
            statements.push(format!("ALTER TABLE ONLY {name} {action}"));
        }
    }
    let mut verdict = Verdict::alter(statements);
    if let Verdict::Alter { owner, .. } = &mut verdict {
        if to.recipe["replica_identity"] != from.recipe["replica_identity"]
            || to.recipe["identity_index"] != from.recipe["identity_index"]
        {
            owner.extend(super::make::replica_identity(name, to));
        }
        if to.recipe["clustered"] != from.recipe["clustered"] {
            owner.push(match text(to, "clustered") {
                Some(index) => format!("ALTER TABLE {name} CLUSTER ON {index}"),
                None => format!("ALTER TABLE {name} SET WITHOUT CLUSTER"),
            });
        }
    }
    verdict
}

fn of_column(to: &Object, from: &Object, default: Option<&Object>, old_default: Option<&Object>) -> Verdict {
    // What is computed is computed anew.
    if to.recipe["generated"] != from.recipe["generated"] {
        return Verdict::Replace;
    }
    if to.recipe["inherited"] == true {
        return Verdict::alter(Vec::new());
    }
    let column = text(to, "column").unwrap_or_default();
    let alter = |action: String| format!("ALTER TABLE {} ALTER COLUMN {column} {action}", to.root);
    let mut statements = Vec::new();
    let retypes = to.recipe["type"] != from.recipe["type"] || to.recipe["collation"] != from.recipe["collation"];
    if to.recipe["identity"] != from.recipe["identity"]
        && from.recipe["identity"].is_string()
        && !to.recipe["identity"].is_string()
    {
        statements.push(alter("DROP IDENTITY".into()));
    }
    if retypes {
        let written = text(to, "type").unwrap_or_default();
        let collation = text(to, "collation").map_or_else(String::new, |collation| format!(" COLLATE {collation}"));
        if old_default.is_some() {
            statements.push(alter("DROP DEFAULT".into()));
        }
        // Between types of the application's own there is no cast but by way of text.
        let own = [to, from]
            .iter()
            .any(|of| text(of, "type").is_some_and(|of| of.contains('.')));
        let by_way = if own { "::text" } else { "" };
        statements.push(alter(format!(
            "TYPE {written}{collation} USING {column}{by_way}::{written}"
        )));
        if let Some(default) = default {
            statements.push(alter(format!(
                "SET DEFAULT {}",
                text(default, "default").unwrap_or_default()
            )));
        }
    }
    if to.recipe["not_null"] != from.recipe["not_null"] {
        let set = if to.recipe["not_null"] == true { "SET" } else { "DROP" };
        statements.push(alter(format!("{set} NOT NULL")));
    }
    if let (Some(identity), true) = (text(to, "identity"), to.recipe["identity"] != from.recipe["identity"]) {
        if from.recipe["identity"].is_string() {
            statements.push(alter(format!("SET GENERATED {identity}")));
        } else {
            if old_default.is_some() && default.is_none() {
                statements.push(alter("DROP DEFAULT".into()));
            }
            statements.push(alter(format!("ADD {}", super::make::identity(to))));
        }
    } else if ["type", "parameters"]
        .iter()
        .any(|field| to.recipe["identity_sequence"][field] != from.recipe["identity_sequence"][field])
        && let Some(sequence) = from.recipe["identity_sequence"]["name"].as_str()
        && let Some(kind) = to.recipe["identity_sequence"]["type"].as_str()
        && let Some(parameters) = to.recipe["identity_sequence"]["parameters"].as_str()
    {
        statements.push(format!("ALTER SEQUENCE {sequence} AS {kind} {parameters}"));
    }
    if to.recipe["storage"] != from.recipe["storage"] {
        statements.push(alter(format!(
            "SET STORAGE {}",
            text(to, "storage").unwrap_or_default()
        )));
    }
    if to.recipe["compression"] != from.recipe["compression"] {
        statements.push(alter(format!(
            "SET COMPRESSION {}",
            text(to, "compression").unwrap_or("default")
        )));
    }
    if to.recipe["statistics"] != from.recipe["statistics"] {
        statements.push(alter(format!(
            "SET STATISTICS {}",
            to.recipe["statistics"].as_i64().unwrap_or(-1)
        )));
    }
    statements.extend(options(&alter(String::new()), from, to));
    Verdict::Alter {
        statements,
        apart: false,
        retypes,
        owner: Vec::new(),
    }
}
