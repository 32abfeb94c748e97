//! The statements that make and drop an object.

use serde_json::Value;

use super::change::word;
use crate::catalog::objects::{Key, Object, Objects};
use crate::catalog::quote::{identifier, literal};

/// The statements for a new object.
pub(super) struct Made {
    pub at_once: Vec<String>,
    /// Once everything else is there: what an object belongs to.
    pub late: Vec<String>,
}

pub(super) fn text<'a>(object: &'a Object, field: &str) -> Option<&'a str> {
    object.recipe[field].as_str()
}

pub(super) fn list(object: &Object, field: &str) -> Vec<String> {
    serde_json::from_value(object.recipe[field].clone()).unwrap_or_default()
}

/// The role to make or alter it as: it may run code of its owner's (defaults, casts, queries).
pub(super) fn role(kind: &str, object: &Object) -> Option<String> {
    (kind != "schema" && kind != "extension").then(|| object.owner.clone())
}

pub(super) fn create(key: &Key, object: &Object, objects: &Objects) -> Result<Made, String> {
    let (kind, name) = (key.0.as_str(), key.1.as_str());
    let field = |field| text(object, field).unwrap_or_default();
    let mut late = Vec::new();
    let at_once = match kind {
        "schema" => vec![format!(
            "CREATE SCHEMA {name} AUTHORIZATION {}",
            identifier(&object.owner)
        )],
        "extension" => vec![format!("CREATE EXTENSION {name} SCHEMA {}", field("schema"))],
        "type" => vec![create_type(name, object)],
        "sequence" => {
            late.extend(text(object, "owned_by").map(|column| format!("ALTER SEQUENCE {name} OWNED BY {column}")));
            let unlogged = if field("persistence") == "u" { "UNLOGGED " } else { "" };
            vec![format!("CREATE {unlogged}SEQUENCE {name} {}", field("parameters"))]
        }
        "function" => vec![field("create").trim_end().to_owned()],
        "aggregate" if object.recipe["ordinary"] == true => {
            let signature = name
                .strip_suffix("()")
                .map_or_else(|| name.to_owned(), |bare| format!("{bare}(*)"));
            vec![format!("CREATE AGGREGATE {signature} ({})", field("parts"))]
        }
        "aggregate" => return Err("an ordered-set or moving aggregate has to be made by hand".into()),
        "table" => {
            late.extend(replica_identity(name, object).filter(|_| field("replica_identity") != "d"));
            late.extend(text(object, "clustered").map(|index| format!("ALTER TABLE {name} CLUSTER ON {index}")));
            create_table(name, object, objects)
        }
        "column" if object.recipe["inherited"] == true => Vec::new(),
        "column" => {
            let default = objects
                .get("default", name)
                .and_then(|default| text(default, "default"));
            let mut statements = vec![format!(
                "ALTER TABLE {} ADD COLUMN {}",
                object.root,
                column(object, default)
            )];
            statements.extend(column_settings(object));
            statements
        }
        "default" => vec![format!(
            "ALTER TABLE ONLY {} ALTER COLUMN {} SET DEFAULT {}",
            object.root,
            field("column"),
            field("default")
        )],
        "constraint" => vec![format!(
            "ALTER {} {} ADD CONSTRAINT {} {}",
            if object.recipe["of_domain"] == true {
                "DOMAIN"
            } else {
                "TABLE"
            },
            object.root,
            field("constraint"),
            field("definition")
        )],
        "index" if object.recipe["invalid"] == true => return Err("the index is not valid on the primary".into()),
        // The partitions' own indexes come with it.
        "index" => vec![field("definition").replacen(" ON ONLY ", " ON ", 1)],
        "view" => vec![create_view(name, object)],
        "rule" | "trigger" => std::iter::once(field("definition").trim_end_matches(';').to_owned())
            .chain(enabled(kind, object).filter(|_| field("enabled") != "O"))
            .collect(),
        "policy" => vec![format!(
            "CREATE POLICY {} ON {} {}",
            field("policy"),
            object.root,
            field("definition")
        )],
        "statistics" => vec![field("definition").to_owned()],
        other => return Err(format!("pgtandem knows no statement for a {other}")),
    };
    Ok(Made { at_once, late })
}

fn create_type(name: &str, object: &Object) -> String {
    let labels: Vec<String> = list(object, "labels").iter().map(|label| literal(label)).collect();
    match text(object, "form") {
        Some("d") => {
            let mut sql = format!("CREATE DOMAIN {name} AS {}", text(object, "base").unwrap_or_default());
            for (field, word) in [("collation", "COLLATE"), ("default", "DEFAULT")] {
                if let Some(value) = text(object, field) {
                    sql.push_str(&format!(" {word} {value}"));
                }
            }
            if object.recipe["not_null"] == true {
                sql.push_str(" NOT NULL");
            }
            sql
        }
        Some("r") => format!(
            "CREATE TYPE {name} AS RANGE ({})",
            text(object, "range").unwrap_or_default()
        ),
        Some("c") => {
            let attributes: Vec<(String, String)> =
                serde_json::from_value(object.recipe["attributes"].clone()).unwrap_or_default();
            let attributes: Vec<String> = attributes
                .iter()
                .map(|(name, written)| format!("{name} {written}"))
                .collect();
            format!("CREATE TYPE {name} AS ({})", attributes.join(", "))
        }
        _ => format!("CREATE TYPE {name} AS ENUM ({})", labels.join(", ")),
    }
}

/// Without its defaults, which come once what they need is there.
fn create_table(name: &str, object: &Object, objects: &Objects) -> Vec<String> {
    let mut columns: Vec<&Object> = objects.columns_of(name).collect();
    columns.sort_by_key(|column| column.recipe["at"].as_i64());
    let own = columns.iter().filter(|column| column.recipe["inherited"] != true);
    let written: Vec<String> = own.map(|of| column(of, None)).collect();
    let parents = list(object, "parents").join(", ");
    let unlogged = if text(object, "persistence") == Some("u") {
        "UNLOGGED "
    } else {
        ""
    };
    let mut sql = format!("CREATE {unlogged}TABLE {name}");
    match (text(object, "bound"), text(object, "of_type")) {
        (Some(bound), _) => sql.push_str(&format!(" PARTITION OF {parents} {bound}")),
        (None, Some(of)) => sql.push_str(&format!(" OF {of}")),
        (None, None) => {
            sql.push_str(&format!(" ({})", written.join(", ")));
            if !parents.is_empty() {
                sql.push_str(&format!(" INHERITS ({parents})"));
            }
        }
    }
    if let Some(key) = text(object, "partition_by") {
        sql.push_str(&format!(" PARTITION BY {key}"));
    }
    if let Some(method) = text(object, "method").filter(|method| *method != "heap") {
        sql.push_str(&format!(" USING {}", identifier(method)));
    }
    let mut statements = vec![sql];
    statements.extend(options(&format!("ALTER TABLE {name}"), &nothing(), object));
    for (field, action) in [("row_security", "ENABLE"), ("forced", "FORCE")] {
        if object.recipe[field] == true {
            statements.push(format!("ALTER TABLE ONLY {name} {action} ROW LEVEL SECURITY"));
        }
    }
    statements.extend(columns.into_iter().flat_map(column_settings));
    statements
}

fn nothing() -> Object {
    Object {
        root: String::new(),
        owner: String::new(),
        recipe: Value::Null,
        depends: Vec::new(),
    }
}

fn column(object: &Object, default: Option<&str>) -> String {
    let mut sql = format!(
        "{} {}",
        text(object, "column").unwrap_or_default(),
        text(object, "type").unwrap_or_default()
    );
    if let Some(collation) = text(object, "collation") {
        sql.push_str(&format!(" COLLATE {collation}"));
    }
    if let Some(generated) = text(object, "generated") {
        sql.push_str(&format!(" {generated}"));
    } else if object.recipe["identity"].is_string() {
        sql.push_str(&format!(" {}", identity(object)));
    } else if let Some(default) = default {
        sql.push_str(&format!(" DEFAULT {default}"));
    }
    if object.recipe["not_null"] == true {
        sql.push_str(" NOT NULL");
    }
    sql
}

fn column_settings(object: &Object) -> Vec<String> {
    let alter = format!(
        "ALTER TABLE ONLY {} ALTER COLUMN {}",
        object.root,
        text(object, "column").unwrap_or_default()
    );
    let mut statements = Vec::new();
    // LIKE … INCLUDING IDENTITY makes a bigint's sequence for any column.
    let sequence = &object.recipe["identity_sequence"];
    if let (Some(name), Some(kind), Some(parameters)) = (
        sequence["name"].as_str(),
        sequence["type"].as_str(),
        sequence["parameters"].as_str(),
    ) && text(object, "type") != Some(kind)
    {
        statements.push(format!("ALTER SEQUENCE {name} AS {kind} {parameters}"));
    }
    if let (Some(storage), false) = (text(object, "storage"), object.recipe["storage_usual"] == true) {
        statements.push(format!("{alter} SET STORAGE {storage}"));
    }
    if let Some(compression) = text(object, "compression") {
        statements.push(format!("{alter} SET COMPRESSION {compression}"));
    }
    if let Some(target) = object.recipe["statistics"].as_i64() {
        statements.push(format!("{alter} SET STATISTICS {target}"));
    }
    statements.extend(options(&alter, &nothing(), object));
    statements
}

/// GENERATED … AS IDENTITY with its sequence's name and parameters.
pub(super) fn identity(object: &Object) -> String {
    let sequence = &object.recipe["identity_sequence"];
    format!(
        "GENERATED {} AS IDENTITY (SEQUENCE NAME {} {})",
        text(object, "identity").unwrap_or_default(),
        sequence["name"].as_str().unwrap_or_default(),
        sequence["parameters"].as_str().unwrap_or_default()
    )
}

pub(super) fn logged(object: &Object) -> &'static str {
    if text(object, "persistence") == Some("u") {
        "UNLOGGED"
    } else {
        "LOGGED"
    }
}

pub(super) fn replica_identity(name: &str, object: &Object) -> Option<String> {
    let identity = match (text(object, "replica_identity")?, text(object, "identity_index")) {
        ("n", _) => "NOTHING".to_owned(),
        ("f", _) => "FULL".to_owned(),
        ("i", Some(index)) => format!("USING INDEX {index}"),
        _ => "DEFAULT".to_owned(),
    };
    Some(format!("ALTER TABLE ONLY {name} REPLICA IDENTITY {identity}"))
}

/// SET and RESET of storage options after `alter`.
pub(super) fn options(alter: &str, from: &Object, to: &Object) -> Vec<String> {
    let (from, to) = (list(from, "options"), list(to, "options"));
    let name = |option: &String| option.split('=').next().unwrap_or_default().to_owned();
    let added: Vec<&String> = to.iter().filter(|option| !from.contains(option)).collect();
    let gone: Vec<String> = from
        .iter()
        .map(name)
        .filter(|old| !to.iter().any(|option| name(option) == *old))
        .collect();
    let mut statements = Vec::new();
    if !added.is_empty() {
        statements.push(format!("{} SET ({})", alter.trim_end(), written_options(&added)));
    }
    if !gone.is_empty() {
        statements.push(format!("{} RESET ({})", alter.trim_end(), gone.join(", ")));
    }
    statements
}

fn written_options(options: &[&String]) -> String {
    let written: Vec<String> = options
        .iter()
        .map(|option| match option.split_once('=') {
            Some((name, value)) => format!("{name} = {}", literal(value)),
            None => (*option).clone(),
        })
        .collect();
    written.join(", ")
}

fn create_view(name: &str, object: &Object) -> String {
    let options = list(object, "options");
    let with = if options.is_empty() {
        String::new()
    } else {
        format!(" WITH ({})", written_options(&options.iter().collect::<Vec<_>>()))
    };
    let columns = text(object, "columns").unwrap_or_default();
    let columns = if columns.is_empty() {
        String::new()
    } else {
        format!(" ({columns})")
    };
    let query = text(object, "query").unwrap_or_default();
    if text(object, "is") == Some("m") {
        let data = if object.recipe["unpopulated"] == true {
            " WITH NO DATA"
        } else {
            ""
        };
        format!("CREATE MATERIALIZED VIEW {name}{columns}{with} AS {query}{data}")
    } else {
        format!("CREATE VIEW {name}{columns}{with} AS {query}")
    }
}

/// When a trigger or rule fires.
pub(super) fn enabled(kind: &str, object: &Object) -> Option<String> {
    let state = match text(object, "enabled")? {
        "A" => "ENABLE ALWAYS",
        "R" => "ENABLE REPLICA",
        "D" => "DISABLE",
        _ => "ENABLE",
    };
    let name = text(object, kind)?;
    Some(format!(
        "ALTER TABLE {} {state} {} {name}",
        object.root,
        kind.to_uppercase()
    ))
}

pub(super) fn drop(key: &Key, object: &Object) -> String {
    let (kind, name) = (key.0.as_str(), key.1.as_str());
    let of_root = |field| text(object, field).unwrap_or_default();
    match kind {
        "column" => format!(
            "ALTER TABLE {} DROP COLUMN IF EXISTS {}",
            object.root,
            of_root("column")
        ),
        "default" => format!(
            "ALTER TABLE ONLY {} ALTER COLUMN {} DROP DEFAULT",
            object.root,
            of_root("column")
        ),
        "constraint" => format!(
            "ALTER {} {} DROP CONSTRAINT IF EXISTS {}",
            if object.recipe["of_domain"] == true {
                "DOMAIN"
            } else {
                "TABLE"
            },
            object.root,
            of_root("constraint")
        ),
        "rule" | "trigger" | "policy" => format!(
            "DROP {} IF EXISTS {} ON {}",
            kind.to_uppercase(),
            of_root(kind),
            object.root
        ),
        _ => format!("DROP {} IF EXISTS {name}", word(kind, object)),
    }
}

/// A grant or comment as it shall be (`None`: no more), from how it is (`None`: as on a new
/// object).
pub(super) fn words(key: &Key, to: Option<&Object>, from: Option<&Object>) -> Vec<String> {
    let Some(any) = to.or(from) else { return Vec::new() };
    if key.0 == "comment" {
        let value = to
            .and_then(|to| text(to, "text"))
            .map_or_else(|| "NULL".to_owned(), literal);
        return vec![format!("COMMENT ON {} IS {value}", described(any))];
    }
    let acl = |object: Option<&Object>, field: &str| -> Vec<(String, String, bool)> {
        object
            .and_then(|object| serde_json::from_value(object.recipe[field].clone()).ok())
            .unwrap_or_default()
    };
    let (wanted, there) = (
        if to.is_some() {
            acl(to, "acl")
        } else {
            acl(Some(any), "usual")
        },
        if from.is_some() {
            acl(from, "acl")
        } else {
            acl(Some(any), "usual")
        },
    );
    let privilege = |written: &str| match key.1.strip_prefix("COLUMN ") {
        Some(rest) => format!("{written} ({}) ON TABLE {}", column_of(rest, &any.root), any.root),
        None => format!("{written} ON {}", key.1),
    };
    let mut statements = Vec::new();
    for (grantee, written, _) in there.iter().filter(|grant| !wanted.contains(grant)) {
        statements.push(format!("REVOKE {} FROM {grantee}", privilege(written)));
    }
    for (grantee, written, grantable) in wanted.iter().filter(|grant| !there.contains(grant)) {
        let option = if *grantable { " WITH GRANT OPTION" } else { "" };
        statements.push(format!("GRANT {} TO {grantee}{option}", privilege(written)));
    }
    statements
}

/// The column in `c s.t`.
fn column_of<'a>(text: &'a str, table: &str) -> &'a str {
    text.strip_suffix(table).unwrap_or(text).trim_end()
}

/// What COMMENT ON calls it.
fn described(object: &Object) -> String {
    let (kind, identity) = (
        text(object, "type").unwrap_or_default(),
        text(object, "identity").unwrap_or_default(),
    );
    if kind.ends_with(" column") {
        return format!("COLUMN {identity}");
    }
    match kind {
        "table constraint" => format!("CONSTRAINT {identity}"),
        "domain constraint" => format!("CONSTRAINT {}", identity.replacen(" on ", " ON DOMAIN ", 1)),
        "composite type" => format!("TYPE {identity}"),
        "statistics object" => format!("STATISTICS {identity}"),
        _ => format!("{} {identity}", kind.to_uppercase()),
    }
}
