use proptest::prelude::*;

use super::*;
use crate::transform::Missing;

fn of(name: &str, type_name: &str) -> Column {
    Column {
        name: name.into(),
        type_name: type_name.into(),
        kind: if type_name.contains("mood") { "e" } else { "b" }.into(),
        built_in: !type_name.contains('.'),
        not_null: false,
        generated: String::new(),
    }
}

fn table(name: &str, columns: &[(&str, &str)], keys: &[&[&str]]) -> TableFacts {
    TableFacts {
        name: name.parse().unwrap(),
        oid: 7,
        kind: "r".into(),
        partition: false,
        unlogged: false,
        columns: columns.iter().map(|(name, type_name)| of(name, type_name)).collect(),
        keys: keys
            .iter()
            .map(|key| key.iter().map(|&name| name.into()).collect())
            .collect(),
    }
}

fn side(tables: Vec<TableFacts>) -> Catalog {
    Catalog {
        tables: tables.into_iter().map(|table| (table.name.clone(), table)).collect(),
        types: BTreeSet::new(),
    }
}

fn map(to: &[(&str, &[(&str, Origin)])], drop: &[&str], inverse: &[(&str, &str)]) -> TableMap {
    let part = |(to, columns): &(&str, &[(&str, Origin)])| Part {
        to: to.parse().unwrap(),
        columns: columns
            .iter()
            .map(|(name, origin)| ((*name).to_owned(), origin.clone()))
            .collect(),
        missing: None,
    };
    TableMap {
        parts: to.iter().map(part).collect(),
        drop: drop.iter().map(|&name| name.into()).collect(),
        inverse: inverse.iter().map(|&(name, sql)| (name.into(), sql.into())).collect(),
    }
}

fn column(name: &str) -> Origin {
    Origin::Column(name.into())
}

fn sql(text: &str) -> Origin {
    Origin::Sql(text.into())
}

fn planned(maps: &[(&str, TableMap)], legacy: Vec<TableFacts>, new: Vec<TableFacts>) -> Plan {
    let transform = Transform {
        schemas: BTreeMap::new(),
        tables: maps
            .iter()
            .map(|(name, map)| (name.parse().unwrap(), map.clone()))
            .collect(),
    };
    plan(&transform, &side(legacy), &side(new))
}

fn legacy() -> TableFacts {
    table(
        "t",
        &[("id", "integer"), ("v", "text"), ("n", "numeric(10,2)")],
        &[&["id"]],
    )
}

#[test]
fn every_fault_of_a_mapping() {
    let same: &[(&str, Origin)] = &[];
    let new = |columns: &[(&str, &str)]| vec![table("t", columns, &[&["id"]])];
    let all = [("id", "integer"), ("v", "text"), ("n", "numeric(10,2)")];
    let cases: Vec<(&str, Plan)> = vec![
        (
            "legacy has no such table",
            planned(&[("nothing", map(&[("t", same)], &[], &[]))], vec![], new(&all)),
        ),
        (
            "new has no such table",
            planned(&[("t", map(&[("u", same)], &[], &[]))], vec![legacy()], new(&all)),
        ),
        (
            "new has no such column",
            planned(
                &[("t", map(&[("t", &[("x", sql("1"))])], &[], &[]))],
                vec![legacy()],
                new(&all),
            ),
        ),
        (
            "legacy has no such column, from which",
            planned(
                &[("t", map(&[("t", &[("v", column("x"))])], &["v"], &[]))],
                vec![legacy()],
                new(&all),
            ),
        ),
        (
            "it goes to a and b",
            planned(
                &[("t", map(&[("t", &[("a", column("v")), ("b", column("v"))])], &[], &[]))],
                vec![legacy()],
                new(&[("id", "integer"), ("a", "text"), ("b", "text"), ("n", "numeric(10,2)")]),
            ),
        ),
        (
            "a column without a source",
            planned(
                &[("t", map(&[("t", same)], &[], &[]))],
                vec![legacy()],
                new(&[
                    ("id", "integer"),
                    ("v", "text"),
                    ("n", "numeric(10,2)"),
                    ("extra", "text"),
                ]),
            ),
        ),
        (
            "it goes nowhere",
            planned(&[("t", map(&[("t", same)], &[], &[]))], vec![legacy()], new(&all[..2])),
        ),
        (
            "it is dropped, and comes to new all the same",
            planned(&[("t", map(&[("t", same)], &["v"], &[]))], vec![legacy()], new(&all)),
        ),
        (
            "legacy has no such column",
            planned(&[("t", map(&[("t", same)], &["x"], &[]))], vec![legacy()], new(&all)),
        ),
        (
            "numeric(10,2) does not become numeric(10,1) without loss",
            planned(
                &[("t", map(&[("t", same)], &[], &[]))],
                vec![legacy()],
                new(&[("id", "integer"), ("v", "text"), ("n", "numeric(10,1)")]),
            ),
        ),
        (
            "the key is lost",
            planned(
                &[("t", map(&[("t", &[("id", sql("id + 1"))])], &[], &[]))],
                vec![legacy()],
                new(&all),
            ),
        ),
        (
            "the key is lost",
            planned(
                &[("t", map(&[("a", same), ("b", same)], &["n"], &[]))],
                vec![legacy()],
                vec![
                    table("a", &[("id", "integer"), ("v", "text")], &[&["id"]]),
                    table("b", &[("v", "text")], &[]),
                ],
            ),
        ),
        (
            "both public.other and public.t go to it",
            planned(
                &[
                    ("t", map(&[("u", same)], &[], &[])),
                    ("other", map(&[("u", same)], &[], &[])),
                ],
                vec![legacy(), table("other", &all, &[&["id"]])],
                vec![table("u", &all, &[&["id"]])],
            ),
        ),
        (
            "both public.t and public.u go to it",
            planned(
                &[("t", map(&[("u", same)], &[], &[]))],
                vec![legacy(), table("u", &all, &[&["id"]])],
                vec![table("u", &all, &[&["id"]])],
            ),
        ),
    ];
    for (expected, plan) in cases {
        assert!(
            plan.faults
                .iter()
                .any(|fault| fault.fact.contains(expected) && !fault.advice.is_empty() && !fault.subject.is_empty()),
            "{expected}: {:#?}",
            plan.faults
        );
    }
    let mut required = new(&[
        ("id", "integer"),
        ("v", "text"),
        ("n", "numeric(10,2)"),
        ("extra", "text"),
    ]);
    required[0].columns[3].not_null = true;
    let plan = planned(&[("t", map(&[("t", same)], &[], &[]))], vec![legacy()], required);
    assert!(
        plan.faults[0].fact.contains("NOT NULL column without a source"),
        "{:?}",
        plan.faults
    );
}

#[test]
fn the_way_back() {
    let new = || vec![table("u", &[("key", "bigint"), ("v", "text")], &[&["key"]])];
    let columns: &[(&str, Origin)] = &[("key", column("id"))];
    // Dropped without an inverse: mirrored, and no way back.
    let plan = planned(&[("t", map(&[("u", columns)], &["n"], &[]))], vec![legacy()], new());
    assert_eq!(plan.faults, []);
    assert_eq!((plan.forward.len(), plan.reverse.len()), (1, 0));
    assert!(plan.one_way[0].subject.ends_with("t.n"), "{:?}", plan.one_way);
    let plan = planned(
        &[("t", map(&[("u", columns)], &["n"], &[("n", "0.00")]))],
        vec![legacy()],
        new(),
    );
    assert_eq!((plan.faults.len(), plan.one_way.len()), (0, 0));
    assert_eq!(
        plan.forward[0].select_list(),
        "(\"t\".\"id\")::bigint AS \"key\", \"t\".\"v\" AS \"v\""
    );
    assert_eq!(
        plan.reverse[0].select_list(),
        "(\"u\".\"key\")::integer AS \"id\", \"u\".\"v\" AS \"v\", (0.00)::numeric(10,2) AS \"n\""
    );
    assert!(plan.forward[0].exact && !plan.reverse[0].exact);
}

#[test]
fn types_that_lose_nothing() {
    for (from, to, expected) in [
        ("integer", "bigint", true),
        ("bigint", "integer", true),
        ("integer", "numeric(12,2)", true),
        ("numeric(12,2)", "integer", false),
        ("numeric(12,2)", "numeric", true),
        ("numeric", "numeric(12,2)", false),
        ("numeric(12,2)", "numeric(8,3)", true),
        ("character varying(10)", "text", true),
        ("text", "character varying(10)", true),
        ("text", "public.mood", true),
        ("public.mood", "text", true),
        ("text", "integer", false),
        ("real", "double precision", false),
        ("date", "timestamp without time zone", false),
        ("character varying(10)[]", "text", false),
        ("character(3)", "text", false),
    ] {
        assert_eq!(fits(&of("a", from), &of("a", to)), expected, "{from} {to}");
    }
}

#[test]
fn words_in_expressions() {
    for (sql, column, expected) in [
        ("upper(name)", "name", true),
        ("upper(\"Name\")", "Name", true),
        ("upper(surname)", "name", false),
        ("name_2 || name2", "name", false),
        ("t.name", "name", true),
    ] {
        assert_eq!(mentions(sql, column), expected, "{sql}");
    }
}

/// A type and one that takes all its values.
const TYPES: [(&str, &str); 4] = [
    ("integer", "bigint"),
    ("text", "text"),
    ("numeric(8,2)", "numeric(12,4)"),
    ("character varying(9)", "text"),
];

proptest! {
    /// Whatever columns are renamed, dropped and added: each of new's columns has one source, each of
    /// legacy's reaches new or is dropped, and the way back gives legacy's columns.
    #[test]
    fn columns_are_mapped_one_to_one(
        fates in prop::collection::vec((0_usize..4, 0_u8..4), 1..12),
        added in 0_usize..3,
    ) {
        let mut here = vec![("id".to_owned(), "bigint".to_owned())];
        let mut there = here.clone();
        let mut columns: Vec<(String, Origin)> = Vec::new();
        let (mut drop, mut inverse) = (Vec::new(), Vec::new());
        for (at, (kind, fate)) in fates.iter().enumerate() {
            let (one, other) = TYPES[*kind];
            let name = format!("c{at}");
            here.push((name.clone(), one.to_owned()));
            match fate {
                0 => there.push((name, other.to_owned())),
                1 => {
                    there.push((format!("r{at}"), one.to_owned()));
                    columns.push((format!("r{at}"), Origin::Column(name)));
                }
                2 => {
                    drop.push(name.clone());
                    inverse.push((name, "NULL".to_owned()));
                }
                _ => {
                    there.push((format!("e{at}"), "text".to_owned()));
                    columns.push((format!("e{at}"), Origin::Sql(format!("{name}::text"))));
                    inverse.push((name, format!("e{at}")));
                }
            }
        }
        for at in 0..added {
            there.push((format!("a{at}"), "integer".to_owned()));
            columns.push((format!("a{at}"), Origin::Sql("7".to_owned())));
        }
        // A numeric of more digits does not come back by itself.
        for (at, (kind, fate)) in fates.iter().enumerate() {
            if *fate == 0 && TYPES[*kind].0.starts_with("numeric") {
                inverse.push((format!("c{at}"), format!("round(c{at}, 2)")));
            }
        }
        let facts = |name: &str, columns: &[(String, String)]| {
            let columns: Vec<(&str, &str)> = columns.iter().map(|(name, kind)| (name.as_str(), kind.as_str())).collect();
            table(name, &columns, &[&["id"]])
        };
        let columns: Vec<(&str, Origin)> = columns.iter().map(|(name, origin)| (name.as_str(), origin.clone())).collect();
        let drop: Vec<&str> = drop.iter().map(String::as_str).collect();
        let inverse: Vec<(&str, &str)> = inverse.iter().map(|(name, sql)| (name.as_str(), sql.as_str())).collect();
        let plan = planned(&[("t", map(&[("u", &columns)], &drop, &inverse))], vec![facts("t", &here)], vec![facts("u", &there)]);
        prop_assert_eq!(&plan.faults, &vec![]);
        prop_assert_eq!(&plan.one_way, &vec![]);
        let names = |face: &Face| face.columns.iter().map(|column| column.name.clone()).collect::<Vec<_>>();
        prop_assert_eq!(names(&plan.forward[0]), there.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        prop_assert_eq!(names(&plan.reverse[0]), here.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        let parsed: Vec<(String, String, String)> = serde_json::from_str(&plan.forward[0].columns_json()).unwrap();
        prop_assert_eq!(parsed.len(), there.len());
    }
}

fn halves(missing: [Option<Missing>; 2], columns: &[(&str, Origin)], inverse: &[(&str, &str)]) -> TableMap {
    let mut map = map(&[("t", &[]), ("u", columns)], &[], inverse);
    for (part, missing) in map.parts.iter_mut().zip(missing) {
        part.missing = missing;
    }
    map
}

fn split_into(map: TableMap, first: TableFacts, second: TableFacts) -> Plan {
    let mut here = legacy();
    here.columns[2].not_null = true;
    planned(&[("t", map)], vec![here], vec![first, second])
}

#[test]
fn a_split_goes_back_by_the_key_of_its_parts() {
    let first = table("t", &[("id", "integer"), ("n", "numeric(10,2)")], &[&["id"]]);
    let second = table("u", &[("w", "text"), ("number", "integer")], &[&["number"]]);
    let columns = [("number", column("id")), ("w", column("v"))];
    let plan = split_into(halves([None, Some(Missing::Nulls)], &columns, &[]), first, second);
    assert_eq!((&plan.faults, &plan.one_way), (&vec![], &vec![]));
    let conditions: Vec<Option<&str>> = plan.forward.iter().map(|face| face.only_where.as_deref()).collect();
    assert_eq!(conditions, [None, Some("num_nonnulls(\"t\".\"v\") > 0")]);
    let [face] = &plan.reverse[..] else { panic!("{plan:#?}") };
    assert_eq!(
        face.from_tables(),
        "FROM ONLY \"public\".\"t\" AS \"t\" LEFT JOIN ONLY \"public\".\"u\" AS \"u\" ON \"u\".\"number\" = \"t\".\"id\""
    );
    assert_eq!(
        face.select_list(),
        "\"t\".\"id\" AS \"id\", \"u\".\"w\" AS \"v\", \"t\".\"n\" AS \"n\""
    );
    assert_eq!((face.exact, face.required_images()), (true, vec![1]));
    // Rows of one part alone are on new only, so a flip back is followed by a comparison.
    assert!(plan.forward.iter().all(|face| !face.exact));
}

#[test]
fn a_split_without_a_clear_way_back_has_none() {
    let first = || table("t", &[("id", "integer"), ("n", "numeric(10,2)")], &[&["id"]]);
    let second = || table("u", &[("id", "integer"), ("v", "text")], &[&["id"]]);
    let nulls = Some(Missing::Nulls);
    let unlogged = TableFacts {
        unlogged: true,
        ..second()
    };
    let both = table(
        "u",
        &[("id", "integer"), ("v", "text"), ("n", "numeric(10,2)")],
        &[&["id"]],
    );
    let cases = [
        ("only one part has", halves([None, None], &[], &[]), first(), second()),
        (
            "every part may be missing",
            halves([nulls, nulls], &[], &[]),
            first(),
            second(),
        ),
        ("is unlogged", halves([None, nulls], &[], &[]), first(), unlogged),
        (
            "several parts have it",
            halves([None, nulls], &[], &[]),
            first(),
            both.clone(),
        ),
        // The same key with more columns under it is no key of its rows.
        (
            "no key in common",
            halves([None, nulls], &[], &[]),
            first(),
            table("u", &[("id", "integer"), ("v", "text")], &[&["id", "v"]]),
        ),
        (
            "no key in common",
            halves([None, nulls], &[], &[]),
            first(),
            table("u", &[("id", "bigint"), ("v", "text")], &[&["id"]]),
        ),
        // Legacy's n takes no NULL, and has it wherever the part is missing.
        (
            "NULL where public.u has no row",
            halves([None, nulls], &[], &[]),
            table("t", &[("id", "integer"), ("v", "text")], &[&["id"]]),
            table("u", &[("id", "integer"), ("n", "numeric(10,2)")], &[&["id"]]),
        ),
        (
            "it has no inverse",
            halves([None, nulls], &[("v", column("v")), ("n", sql("n::text"))], &[]),
            table("t", &[("id", "integer")], &[&["id"]]),
            table("u", &[("id", "integer"), ("v", "text"), ("n", "text")], &[&["id"]]),
        ),
    ];
    for (expected, map, one, other) in cases {
        let plan = split_into(map, one, other);
        assert_eq!(plan.faults, [], "{expected}");
        assert_eq!((plan.forward.len(), plan.reverse.len()), (2, 0), "{expected}");
        let [fault] = &plan.one_way[..] else {
            panic!("{expected}: {plan:#?}")
        };
        assert!(fault.fact.contains(expected), "{expected}: {fault}");
        assert!(!fault.advice.is_empty());
    }
    // What stands for a missing part must be seen in legacy's row.
    let bare = table("u", &[("id", "integer"), ("c", "text")], &[&["id"]]);
    let whole = table(
        "t",
        &[("id", "integer"), ("v", "text"), ("n", "numeric(10,2)")],
        &[&["id"]],
    );
    let plan = split_into(halves([None, nulls], &[("c", sql("'c'"))], &[]), whole, bare);
    assert_eq!(plan.faults.len(), 1, "{plan:#?}");
    assert!(plan.faults[0].fact.contains("no column of its own"), "{plan:#?}");
}
