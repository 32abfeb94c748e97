use serde_json::{Value, json};

use super::*;

/// Kind, name, root, recipe, dependencies.
type Short<'a> = (&'a str, &'a str, &'a str, Value, &'a [(&'a str, &'a str)]);

fn objects(list: &[Short<'_>]) -> Objects {
    let by_key = list.iter().map(|(kind, name, root, recipe, depends)| {
        let object = Object {
            root: (*root).into(),
            owner: "app".into(),
            recipe: recipe.clone(),
            depends: depends
                .iter()
                .map(|(kind, name)| ((*kind).into(), (*name).into()))
                .collect(),
        };
        (((*kind).into(), (*name).into()), object)
    });
    Objects {
        major: 15,
        by_key: by_key.collect(),
    }
}

fn check(primary: &[Short<'_>], secondary: &[Short<'_>], expected: &[&str]) {
    let script = statements(&objects(primary), &objects(secondary), None);
    let found: Vec<String> = script
        .statements
        .iter()
        .map(|statement| statement.sql.clone())
        .chain(script.left.iter().map(|why| format!("left: {why}")))
        .collect();
    assert_eq!(found, expected);
}

fn column<'a>(name: &'a str, recipe: Value) -> Short<'a> {
    let mut recipe = recipe;
    recipe["column"] = json!(name.rsplit('.').next());
    ("column", name, "s.t", recipe, &[])
}

fn table<'a>() -> Short<'a> {
    (
        "table",
        "s.t",
        "s.t",
        json!({"persistence": "p", "replica_identity": "d"}),
        &[],
    )
}

#[test]
fn equal_sides_need_nothing() {
    let list = [table(), column("s.t.a", json!({"type": "integer", "at": 1}))];
    let moved = [table(), column("s.t.a", json!({"type": "integer", "at": 7}))];
    check(&list, &moved, &[]);
}

#[test]
fn a_table_is_made_with_its_columns_in_their_order_and_defaults_after() {
    check(
        &[
            (
                "sequence",
                "s.q",
                "s.q",
                json!({"parameters": "AS bigint", "persistence": "p", "owned_by": "s.t.b"}),
                &[],
            ),
            table(),
            column("s.t.a", json!({"type": "text", "at": 2, "not_null": true})),
            column("s.t.b", json!({"type": "integer", "at": 1})),
            (
                "default",
                "s.t.b",
                "s.t",
                json!({"column": "b", "default": "nextval('s.q')"}),
                &[("sequence", "s.q"), ("column", "s.t.b")],
            ),
        ],
        &[],
        &[
            "CREATE SEQUENCE s.q AS bigint",
            "CREATE TABLE s.t (b integer, a text NOT NULL)",
            "ALTER TABLE ONLY s.t ALTER COLUMN b SET DEFAULT nextval('s.q')",
            "ALTER SEQUENCE s.q OWNED BY s.t.b",
        ],
    );
}

#[test]
fn a_column_that_gets_another_type_takes_views_along() {
    let view = |name, on| {
        (
            "view",
            name,
            name,
            json!({"is": "v", "query": "SELECT 1", "columns": "a"}),
            on,
        )
    };
    let here: &[(&str, &str)] = &[("column", "s.t.a")];
    let above: &[(&str, &str)] = &[("view", "s.v")];
    check(
        &[
            table(),
            column("s.t.a", json!({"type": "bigint"})),
            view("s.v", here),
            view("s.w", above),
        ],
        &[
            table(),
            column("s.t.a", json!({"type": "integer"})),
            view("s.v", here),
            view("s.w", above),
        ],
        &[
            "DROP VIEW IF EXISTS s.w",
            "DROP VIEW IF EXISTS s.v",
            "ALTER TABLE s.t ALTER COLUMN a TYPE bigint USING a::bigint",
            "CREATE VIEW s.v (a) AS SELECT 1",
            "CREATE VIEW s.w (a) AS SELECT 1",
        ],
    );
}

#[test]
fn what_goes_with_its_table_is_not_dropped_by_itself() {
    check(
        &[],
        &[
            table(),
            column("s.t.a", json!({"type": "integer"})),
            (
                "index",
                "s.i",
                "s.t",
                json!({"definition": "CREATE INDEX"}),
                &[("column", "s.t.a")],
            ),
            ("view", "s.v", "s.v", json!({"is": "v"}), &[("column", "s.t.a")]),
            (
                "constraint",
                "s.o.f",
                "s.o",
                json!({"constraint": "f", "form": "f"}),
                &[("table", "s.t")],
            ),
        ],
        &[
            "DROP VIEW IF EXISTS s.v",
            "ALTER TABLE s.o DROP CONSTRAINT IF EXISTS f",
            "DROP TABLE IF EXISTS s.t",
        ],
    );
}

#[test]
fn a_sequence_that_stays_is_set_free_from_a_table_that_goes() {
    let sequence = |owner: &str| {
        let recipe = json!({"parameters": "AS int", "persistence": "p", "owned_by": owner});
        ("sequence", "s.q", "s.q", recipe, &[][..])
    };
    check(
        &[sequence("s.u.a")],
        &[sequence("s.t.a"), table(), column("s.t.a", json!({"type": "integer"}))],
        &[
            "ALTER SEQUENCE s.q OWNED BY NONE",
            "DROP TABLE IF EXISTS s.t",
            "ALTER SEQUENCE s.q OWNED BY s.u.a",
        ],
    );
}

#[test]
fn labels_of_an_enum() {
    for (to, from, expected) in [
        (
            json!(["a", "b"]),
            json!(["b"]),
            vec!["ALTER TYPE s.e ADD VALUE 'a' BEFORE 'b'"],
        ),
        (
            json!(["a", "b"]),
            json!(["a", "c"]),
            vec!["ALTER TYPE s.e RENAME VALUE 'c' TO 'b'"],
        ),
        (
            json!(["a"]),
            json!(["a", "c"]),
            vec!["left: type s.e: is defined otherwise, and in use by tables"],
        ),
        (
            json!(["b", "a"]),
            json!(["a", "b"]),
            vec!["left: type s.e: is defined otherwise, and in use by tables"],
        ),
    ] {
        let side = |labels: Value| {
            [
                ("type", "s.e", "s.e", json!({"form": "e", "labels": labels}), &[][..]),
                (
                    "column",
                    "s.t.a",
                    "s.t",
                    json!({"type": "s.e", "column": "a"}),
                    &[("type", "s.e")][..],
                ),
            ]
        };
        check(&side(to), &side(from), &expected);
    }
}

#[test]
fn a_scope_leaves_the_rest_alone() {
    let schema = |name| ("schema", name, name, json!({}), &[][..]);
    let script = statements(
        &objects(&[schema("a"), schema("b")]),
        &objects(&[schema("c")]),
        Some(&BTreeSet::from(["a".to_owned()])),
    );
    let found: Vec<&str> = script
        .statements
        .iter()
        .map(|statement| statement.sql.as_str())
        .collect();
    assert_eq!(found, ["CREATE SCHEMA a AUTHORIZATION \"app\""]);
}

#[test]
fn the_script_changes_roles_only_where_it_must() {
    let script = statements(
        &objects(&[table(), ("schema", "s", "s", json!({}), &[])]),
        &objects(&[]),
        None,
    );
    assert!(
        script.to_sql().ends_with(
            "CREATE SCHEMA s AUTHORIZATION \"app\";\nSET ROLE \"app\";\nCREATE TABLE s.t ();\nRESET ROLE;\n"
        )
    );
    assert_eq!(script.tables.into_iter().collect::<Vec<_>>(), ["s.t"]);
}
