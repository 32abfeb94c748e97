//! Random values of every type, under random settings of the client, in both protocols; both
//! sides are compared bit by bit. Seeded: a failure repeats.

use futures_util::{StreamExt, pin_mut};
use pgtandem::catalog::PINNED_SETTINGS;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::{Binaries, SUPERUSER};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tokio_postgres::Client;

use crate::bench::assert_identical;
use crate::rig::Rig;

const SEED: &[u8; 32] = b"every value of every type, 26-11";
const BATCHES: usize = 24;
const ROWS: usize = 8;

/// A column's type and SQL expressions for its values.
struct Column {
    kind: &'static str,
    values: BoxedStrategy<String>,
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Values from a list of extremes and oddities.
fn listed(kind: &'static str, values: &'static [&'static str]) -> Column {
    Column {
        kind,
        values: select(values).prop_map(literal).boxed(),
    }
}

/// Values from a list and from a generator.
fn mixed(
    kind: &'static str,
    values: &'static [&'static str],
    random: impl Strategy<Value = String> + 'static,
) -> Column {
    let one = prop_oneof![select(values).prop_map(str::to_owned), random];
    Column {
        kind,
        values: one.prop_map(|text| literal(&text)).boxed(),
    }
}

fn text() -> impl Strategy<Value = String> {
    "[ -~éß漢\t\n\r\u{1}\u{7f}\u{10ffff}]{0,12}"
}

fn array_of(kind: &'static str, elements: &'static [&'static str]) -> Column {
    let element = select(elements).prop_map(|text| {
        if text == "NULL" {
            text.to_owned()
        } else {
            format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
        }
    });
    let shaped = (vec(element, 0..7), -3..4_i32, 0..3_u8).prop_map(|(elements, low, shape)| {
        let half = elements.len() / 2;
        match shape {
            _ if elements.is_empty() => "{}".to_owned(),
            0 => format!("{{{}}}", elements.join(",")),
            1 => format!("[{low}:{}]={{{}}}", low + elements.len() as i32 - 1, elements.join(",")),
            _ if half == 0 => format!("{{{{{}}}}}", elements.join(",")),
            _ => format!(
                "[{low}:{}][0:{}]={{{{{}}},{{{}}}}}",
                low + 1,
                half - 1,
                elements[..half].join(","),
                elements[half..half * 2].join(",")
            ),
        }
    });
    Column {
        kind,
        values: shaped.prop_map(|text| literal(&text)).boxed(),
    }
}

/// Types whose binary form is the same on every server.
fn built_in() -> Vec<Column> {
    const STAMPS: &[&str] = &[
        "infinity",
        "-infinity",
        "4713-01-01 00:00:00+00 BC",
        "294276-12-31 23:59:59.999999+00",
        "0001-01-01 BC",
        "1999-12-31 23:59:60",
        "2000-02-29 12:00:00.000001",
        "1883-11-18 12:03:58",
        "1970-01-01 00:00:00-12:34:56",
        "2026-03-29 02:30:00 Europe/Berlin",
    ];
    vec![
        listed("bool", &["t", "f"]),
        mixed(
            "bytea",
            &["", "\\x00", "\\xff00ff5c27"],
            vec(any::<u8>(), 0..20).prop_map(|bytes| {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("\\x{hex}")
            }),
        ),
        listed("\"char\"", &["a", "", "\\", "'", "\\377"]),
        mixed("name", &["", "pg_class"], "[a-z \"']{0,63}"),
        mixed(
            "int2",
            &["-32768", "32767", "0"],
            any::<i16>().prop_map(|n| n.to_string()),
        ),
        mixed(
            "int4",
            &["-2147483648", "2147483647"],
            any::<i32>().prop_map(|n| n.to_string()),
        ),
        mixed(
            "int8",
            &["-9223372036854775808", "9223372036854775807"],
            any::<i64>().prop_map(|n| n.to_string()),
        ),
        mixed(
            "text",
            &[
                "", "NULL", "null", "\\N", "\\.", "(,)", "{}", "\"", "\"\"", "\\\\", "  ",
            ],
            text(),
        ),
        mixed("varchar(20)", &["", " "], text()),
        mixed("bpchar(5)", &["", "a", "a    "], "[a-zé ]{0,5}"),
        mixed("oid", &["0", "4294967295"], any::<u32>().prop_map(|n| n.to_string())),
        listed(
            "json",
            &[
                "null",
                "{\"a\" : 1, \"a\":2}",
                " [1 , 2.0e10, \"\\u00e9\"]",
                "\"x\"",
                "-0.0",
            ],
        ),
        listed(
            "jsonb",
            &[
                "null",
                "{\"b\": 1, \"a\": 2.50}",
                "[]",
                "{}",
                "\"\\u00e9\\n\"",
                "1e400",
                "-0.0",
            ],
        ),
        listed("jsonpath", &["$", "lax $.a[*] ? (@ > 1)", "strict $.\"x y\""]),
        mixed(
            "float4",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "-0",
                "1e-45",
                "3.4028235e38",
                "1.1754944e-38",
                "0.1",
            ],
            any::<f32>().prop_map(|n| format!("{n:e}").replace("inf", "Infinity")),
        ),
        mixed(
            "float8",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "-0",
                "5e-324",
                "1.7976931348623157e308",
                "2.2250738585072014e-308",
                "0.1",
            ],
            any::<f64>().prop_map(|n| format!("{n:e}").replace("inf", "Infinity")),
        ),
        mixed(
            "numeric",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "0",
                "0.000",
                "1e1000",
                "-1e-1000",
                "1.10",
                "99999999999999999999.99999999999999999999",
            ],
            "-?[0-9]{1,40}(\\.[0-9]{0,40})?",
        ),
        mixed(
            "numeric(30, 5)",
            &["NaN", "0.00001", "-0.00000"],
            "-?[0-9]{1,20}\\.[0-9]{0,5}",
        ),
        listed("numeric(3, -2)", &["12300", "-99900", "49", "0"]),
        mixed(
            "money",
            &["-92233720368547758.08", "92233720368547758.07", "0"],
            "-?[0-9]{1,12}\\.[0-9]{2}",
        ),
        mixed(
            "date",
            &[
                "infinity",
                "-infinity",
                "4713-01-01 BC",
                "5874897-12-31",
                "0001-01-01 BC",
                "2000-02-29",
            ],
            "(19|20)[0-9]{2}-0[1-9]-[0-2][1-8]",
        ),
        mixed(
            "time",
            &["00:00:00", "24:00:00", "23:59:59.999999"],
            "[01][0-9]:[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?",
        ),
        listed(
            "timetz",
            &[
                "00:00:00+15:59:59",
                "24:00:00-15:59:59",
                "12:34:56.789+05:30",
                "04:05:06",
            ],
        ),
        listed(
            "timestamp",
            &[
                "infinity",
                "-infinity",
                "4713-01-01 00:00:00 BC",
                "294276-12-31 23:59:59.999999",
                "2000-02-29 12:00:00.000001",
                "1999-12-31 23:59:60",
            ],
        ),
        listed("timestamptz", STAMPS),
        mixed(
            "interval",
            &[
                "0",
                "-178000000 years",
                "178000000 years",
                "1 mon -1 day 00:00:00.000001",
                "-1 mon +2 days -03:04:05.6",
                "P1Y2M3DT4H5M6.7S",
                "-00:00:01",
            ],
            (any::<i16>(), any::<i32>(), any::<i32>())
                .prop_map(|(months, days, seconds)| format!("{months} months {days} days {seconds} seconds")),
        ),
        mixed("bit(5)", &["00000", "11111"], "[01]{5}"),
        mixed("varbit", &["", "1"], "[01]{0,70}"),
        listed(
            "inet",
            &[
                "0.0.0.0",
                "255.255.255.255/0",
                "192.168.1.5/24",
                "::",
                "::1/128",
                "fe80::1/64",
                "::ffff:1.2.3.4",
            ],
        ),
        listed(
            "cidr",
            &["0.0.0.0/0", "10.0.0.0/8", "192.168.1.5/32", "::/0", "2001:db8::/32"],
        ),
        listed("macaddr", &["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "08002b:010203"]),
        listed("macaddr8", &["00:00:00:00:00:00:00:00", "08:00:2b:01:02:03:04:05"]),
        mixed(
            "uuid",
            &["00000000-0000-0000-0000-000000000000"],
            "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        ),
        listed("point", &["(0,-0)", "(NaN,Infinity)", "(0.1,1e300)", "(-1e-320,3)"]),
        listed("line", &["{1,2,3}", "{0,-1,0.1}"]),
        listed("lseg", &["[(0,0),(1,1e-300)]"]),
        listed("box", &["(1,1),(0,0)", "(0.1,0.2),(-0.3,Infinity)"]),
        listed("path", &["((0,0),(1,1),(0.1,2))", "[(0,0)]"]),
        listed("polygon", &["((0,0),(1,1),(0.1,2))", "((0,0))"]),
        listed("circle", &["<(0,0),0>", "<(0.1,0.2),1e10>"]),
        listed("tsvector", &["", "'a':1A,2B 'b c' 'it''s':16383", "x y z"]),
        listed("tsquery", &["'a'", "'a' & !'b'", "'x':AB* <3> ('y' | 'z')"]),
        listed("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF"]),
        listed("xid", &["0", "4294967295"]),
        listed("xid8", &["0", "18446744073709551615"]),
        listed("cid", &["7"]),
        listed("tid", &["(0,1)", "(4294967295,65535)"]),
        listed("pg_snapshot", &["10:20:10,14,15", "3:3:"]),
        listed(
            "regtype",
            &["integer", "timestamp with time zone", "pg_catalog.\"char\""],
        ),
        listed("regclass", &["pg_class", "pg_catalog.pg_type"]),
        listed("regnamespace", &["pg_catalog"]),
        listed("refcursor", &["a cursor"]),
        listed("int2vector", &["7", "1 2 -3"]),
        listed("oidvector", &["0", "1 2 4294967295"]),
        listed("int4range", &["empty", "(,)", "[1,5)", "(-2147483648,]"]),
        listed("int8range", &["empty", "[-9223372036854775808,9223372036854775807)"]),
        listed("numrange", &["empty", "[0.10,1.0]", "(NaN,)", "[-Infinity,Infinity]"]),
        listed("tsrange", &["empty", "[2000-01-01,infinity]", "(-infinity,)"]),
        listed(
            "tstzrange",
            &["empty", "[2000-01-01 00:00:00+05,2001-01-01 00:00:00-05)"],
        ),
        listed("daterange", &["empty", "[4713-01-01 BC,infinity)", "(,2000-01-01]"]),
        listed("int4multirange", &["{}", "{[1,3),[5,9)}", "{(,)}"]),
        listed("nummultirange", &["{}", "{[0.10,1.00],(2,)}"]),
        listed(
            "tstzmultirange",
            &[
                "{}",
                "{[2000-01-01 00:00:00+00,2000-01-02 00:00:00+00),[2010-01-01 00:00:00+00,)}",
            ],
        ),
        listed("datemultirange", &["{[2000-01-01,2000-01-05),[2001-01-01,)}"]),
        array_of("int4[]", &["1", "-2147483648", "NULL"]),
        array_of("text[]", &["", "NULL", "null", "a\"b", "\\", "{", ",", " x ", "é\n"]),
        array_of("float8[]", &["NaN", "-0", "0.1", "NULL", "Infinity"]),
        array_of("numeric[]", &["1.10", "NaN", "NULL"]),
        array_of("timestamptz[]", &["infinity", "2000-01-01 00:00:00+05:30", "NULL"]),
        array_of("interval[]", &["1 mon -1 day", "-00:00:01", "NULL"]),
        array_of("bytea[]", &["\\x00", "", "NULL"]),
        array_of("json[]", &["{\"a\" : 1}", "null"]),
        listed("box[]", &["{(1,1),(0,0);(0.1,2),(-0,0)}", "[0:0]={NULL}"]),
        array_of("int4range[]", &["empty", "[1,5)", "NULL"]),
        array_of("varchar(3)[]", &["abc", "", "NULL"]),
    ]
}

const TYPES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'it''s; \"odd\"', 'été, (x)', '');
    CREATE TYPE pair AS (a int, \"b c\" text, d timestamptz[]);
    CREATE TYPE nest AS (p pair, m mood, ps pair[]);
    CREATE DOMAIN positive AS numeric(10, 2) CHECK (value > 0);
    CREATE DOMAIN stamps AS timestamptz[];
    CREATE DOMAIN pairs AS pair CHECK ((value).a IS DISTINCT FROM 0);
    CREATE TYPE textrange AS RANGE (subtype = text, collation = \"C\")";

/// Types of the application's, whose OIDs differ.
fn own() -> Vec<Column> {
    let expressions = |kind, values: &'static [&'static str]| Column {
        kind,
        values: select(values).prop_map(str::to_owned).boxed(),
    };
    vec![
        listed("mood", &["sad", "it's; \"odd\"", "été, (x)", ""]),
        array_of("mood[]", &["sad", "it's; \"odd\"", "été, (x)", "", "NULL"]),
        listed("positive", &["0.01", "99999999.99"]),
        array_of("positive[]", &["0.01", "NULL"]),
        array_of("stamps", &["infinity", "2000-01-01 00:00:00+05:30", "NULL"]),
        expressions(
            "pair",
            &[
                "row(1, 'x, \"y\" (z) \\', '{infinity,\"2000-01-01 00:00:00+05\"}')::pair",
                "row(null, '', '{}')::pair",
                "row(null, null, null)::pair",
            ],
        ),
        expressions("pair[]", &["array[row(1, 'x,\"', null)::pair, null]", "'{}'::pair[]"]),
        expressions("pairs", &["row(5, 'in a domain', null)::pair"]),
        expressions(
            "nest",
            &[
                "row(row(1, 'é', '{}'), 'sad', array[row(2, '{}', null)::pair])::nest",
                "row(null, '', '{}')::nest",
            ],
        ),
        expressions(
            "textrange",
            &["textrange('a,', 'b\"')", "textrange('', null)", "'empty'::textrange"],
        ),
        expressions(
            "textmultirange",
            &[
                "textmultirange(textrange('a', 'b'), textrange('c', null))",
                "'{}'::textmultirange",
            ],
        ),
    ]
}

fn of_extensions() -> Vec<Column> {
    vec![
        listed(
            "hstore",
            &["", "a=>1, b=>NULL", "\"x y\"=>\"it's \\\"q\\\"\", \"\"=>\"\""],
        ),
        mixed("citext", &["", "Abc", "ABC"], "[a-zA-Zé]{0,9}"),
        listed("ltree", &["", "a.b.c", "Top.Elan"]),
    ]
}

struct Random(TestRunner);

impl Random {
    fn new() -> Self {
        Self(TestRunner::new_with_rng(
            Config::default(),
            TestRng::from_seed(RngAlgorithm::ChaCha, SEED),
        ))
    }

    fn one<T: std::fmt::Debug>(&mut self, strategy: impl Strategy<Value = T>) -> T {
        strategy.new_tree(&mut self.0).unwrap().current()
    }

    fn value(&mut self, column: &Column) -> String {
        if self.one(0..8) == 0 {
            return "NULL".to_owned();
        }
        let value = self.one(&column.values);
        format!("{value}::{}", column.kind)
    }

    fn settings(&mut self) -> String {
        let mut list = Vec::new();
        for (name, values) in [
            (
                "DateStyle",
                &["ISO, MDY", "German, DMY", "SQL, DMY", "Postgres, MDY", "ISO, YMD"][..],
            ),
            (
                "IntervalStyle",
                &["postgres", "postgres_verbose", "sql_standard", "iso_8601"],
            ),
            (
                "TimeZone",
                &["UTC", "America/St_Johns", "Asia/Kathmandu", "Pacific/Apia", "<-03>+03"],
            ),
            ("bytea_output", &["hex", "escape"]),
            ("extra_float_digits", &["-15", "0", "1", "3"]),
            ("client_encoding", &["UTF8", "UTF8", "LATIN1"]),
            ("lc_monetary", &["C", "en_US.utf8"]),
            ("quote_all_identifiers", &["on", "off"]),
            ("xmlbinary", &["hex", "base64"]),
            ("standard_conforming_strings", &["on"]),
        ] {
            let value = self.one(select(values));
            // A locale that the machine does not have is left alone.
            if !value.contains("utf8") {
                list.push(format!("SET {name} = '{value}'"));
            }
        }
        list.join("; ")
    }
}

pub(crate) async fn storm(new: Binaries, extensions: bool) {
    let mut rig = Rig::between(&Binaries::legacy().unwrap(), &new);
    rig.serve(Phase::DualWrite).await;
    let setup = rig.client().await;
    setup.batch_execute(TYPES).await.unwrap();
    let mut own = own();
    if extensions {
        setup
            .batch_execute("CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree")
            .await
            .unwrap();
        own.extend(of_extensions());
    }
    let sets = [("builtin", built_in()), ("own", own)];
    for (name, columns) in &sets {
        let list: Vec<String> = columns
            .iter()
            .enumerate()
            .map(|(at, column)| format!("c{at} {}", column.kind))
            .collect();
        let list = list.join(", ");
        setup
            .batch_execute(&format!(
                "CREATE TABLE {name} (id int PRIMARY KEY, {list}); CREATE TABLE {name}_keyless (id int, {list});
                 CREATE TABLE {name}_copied (id int PRIMARY KEY, {list})"
            ))
            .await
            .unwrap();
    }
    let mut random = Random::new();
    for batch in 0..BATCHES {
        let client = rig.client().await;
        client.batch_execute(&random.settings()).await.unwrap();
        for (name, columns) in &sets {
            if *name == "own" {
                // A label's name must arrive as it is; any bytes are a text in LATIN1.
                client.batch_execute("SET client_encoding = 'UTF8'").await.unwrap();
            }
            write(&client, &mut random, batch, name, columns).await;
        }
    }
    for (name, _) in &sets {
        copy_in_binary(&rig.client().await, name).await;
    }
    assert_identical(&rig).await;
    let (legacy, new) = (
        rig.direct(Side::Legacy, SUPERUSER).await,
        rig.direct(Side::New, SUPERUSER).await,
    );
    for table in [
        "builtin",
        "builtin_keyless",
        "builtin_copied",
        "own",
        "own_keyless",
        "own_copied",
    ] {
        // OIDs of the application's types are part of their binary form.
        let format = if table.starts_with("own") { "text" } else { "binary" };
        let (one, other) = (dump(&legacy, table, format).await, dump(&new, table, format).await);
        assert!(one.len() > 1000, "{table} has rows");
        assert!(one == other, "{table} differs in its {format} form");
    }
}

async fn write(client: &Client, random: &mut Random, batch: usize, name: &str, columns: &[Column]) {
    let mut statements = Vec::new();
    for row in 0..ROWS {
        let id = batch * ROWS + row;
        let values: Vec<String> = columns.iter().map(|column| random.value(column)).collect();
        for table in [name.to_owned(), format!("{name}_keyless")] {
            statements.push(format!("INSERT INTO {table} VALUES ({id}, {})", values.join(", ")));
        }
    }
    for _ in 0..ROWS {
        let at = random.one(0..columns.len());
        let id = random.one(0..(batch + 1) * ROWS);
        let value = random.value(&columns[at]);
        for table in [name.to_owned(), format!("{name}_keyless")] {
            statements.push(format!("UPDATE {table} SET c{at} = {value} WHERE id = {id}"));
        }
        let id = random.one(0..(batch + 1) * ROWS * 4);
        statements.push(format!("DELETE FROM {name}_keyless WHERE id = {id}"));
    }
    for statement in statements {
        let done = if random.one(any::<bool>()) {
            client.batch_execute(&statement).await
        } else {
            client.execute(&statement, &[]).await.map(drop)
        };
        done.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// Every value once more, as the binary protocol gives and takes it.
async fn copy_in_binary(client: &Client, name: &str) {
    let data = {
        let rows = client
            .copy_out(&format!("COPY {name} TO STDOUT (FORMAT binary)"))
            .await
            .unwrap();
        pin_mut!(rows);
        let mut data = Vec::new();
        while let Some(chunk) = rows.next().await {
            data.push(chunk.unwrap());
        }
        data
    };
    let sink = client
        .copy_in::<_, bytes::Bytes>(&format!("COPY {name}_copied FROM STDIN (FORMAT binary)"))
        .await
        .unwrap();
    pin_mut!(sink);
    for chunk in data {
        futures_util::SinkExt::send(&mut sink, chunk).await.unwrap();
    }
    sink.finish().await.unwrap();
}

async fn dump(client: &Client, table: &str, format: &str) -> Vec<u8> {
    client.batch_execute(PINNED_SETTINGS).await.unwrap();
    let sql = format!("COPY (SELECT * FROM public.{table} ORDER BY id) TO STDOUT (FORMAT {format})");
    let rows = client.copy_out(&sql).await.unwrap();
    pin_mut!(rows);
    let mut data = Vec::new();
    while let Some(chunk) = rows.next().await {
        data.extend_from_slice(&chunk.unwrap());
    }
    data
}
