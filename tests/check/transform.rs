//! Schemas that differ, through the built binary: from `check` over the flip and back.

use pgtandem::control::{Phase, Side};

use crate::rig::{APP, DATABASE, Rig};

const LEGACY: &str = "
    CREATE TABLE kunden (kdnr serial PRIMARY KEY, name text NOT NULL, preis numeric(10,2), fax text);
    CREATE TABLE plain (id int PRIMARY KEY, v text);
    INSERT INTO kunden (name, preis, fax) SELECT 'n' || g, g / 4.0, 'f' FROM generate_series(1, 2000) g";
const NEW: &str = "
    CREATE TABLE customers (id bigserial PRIMARY KEY, full_name text NOT NULL, cents bigint, country text NOT NULL);
    CREATE TABLE plain (id int PRIMARY KEY, v text)";

fn mapping(inverse: &str, more: &str) -> String {
    format!(
        "    transform:
      tables:
        public.kunden:
          to: public.customers
          columns:
            id: kdnr
            full_name: name
            cents: {{ sql: (preis * 100)::bigint }}
            country: {{ sql: \"'DE'\" }}
{more}          drop: [fax]
          inverse: {{ preis: cents / 100.0{inverse} }}
"
    )
}

fn prepared() -> Rig {
    let rig = Rig::new();
    for (server, schema) in [(&rig.legacy, LEGACY), (&rig.new, NEW)] {
        server.sql(DATABASE, &format!("SET ROLE {APP}; {schema}")).unwrap();
    }
    rig
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_mapping_is_refused_everywhere() {
    let mut rig = prepared();
    rig.entry = mapping("", "            missing: name\n");
    rig.write_config(Phase::DualWrite);
    let said = rig.check(
        &["check"],
        1,
        "transform public.customers.missing: new has no such column",
    );
    assert!(said.contains("correct the name under columns"), "{said}");
    rig.spawn_proxy();
    let code = rig.exit_code().await;
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
    assert!(rig.log().contains("public.customers.missing"), "{}", rig.log());
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM customers").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_to_another_schema_and_back() {
    let mut rig = prepared();
    rig.extra = "reads: { shadow_percent: 100 }".into();
    // Without an inverse everything is mirrored, and nothing flips.
    rig.entry = mapping("", "");
    rig.write_config(Phase::DualWrite);
    let said = rig.check(&["check"], 1, "transform.inverse public.kunden.fax: it has no inverse");
    assert!(said.contains("name under inverse an expression"), "{said}");
    assert!(
        said.contains("public.kunden: exact: mirrored as public.customers"),
        "{said}"
    );
    rig.serve(Phase::DualWrite).await;
    rig.check(
        &["switchover", "--to", "new"],
        1,
        "public.kunden.fax: it has no inverse",
    );
    rig.kill_proxy();

    rig.entry = mapping(", fax: \"NULL\"", "");
    rig.serve(Phase::DualRead).await;
    rig.check(
        &["check"],
        0,
        "1 tables are mirrored in another shape, 1 of them also back",
    );
    rig.check(&["schema", "diff"], 0, "both sides define the same");
    rig.check(&["backfill"], 0, "");
    rig.wait_caught_up().await;
    rig.check(&["verify"], 0, "");
    assert_eq!(
        rig.value(Side::New, "SELECT (count(*), sum(cents), min(country)) FROM customers")
            .await,
        rig.value(
            Side::Legacy,
            "SELECT (count(*), sum((preis * 100)::bigint), 'DE') FROM kunden"
        )
        .await
    );

    // Reads in legacy's words are not compared, and counted.
    let client = rig.client().await;
    for _ in 0..3 {
        client
            .query("SELECT name FROM kunden WHERE kdnr = 1", &[])
            .await
            .unwrap();
    }
    let counted = rig
        .until(|status| {
            let counts = &status.databases[0].shadow_reads.not_comparable;
            counts.get("transformed").is_some_and(|&count| count >= 3)
        })
        .await;
    assert_eq!(counted.databases[0].shadow_reads.mismatched, 0);

    // DDL that has no meaning on the other side.
    for statement in [
        "ALTER TABLE kunden ADD COLUMN more int",
        "CREATE INDEX ON kunden (name)",
    ] {
        let error = client.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "0A000", "{statement}");
        let said = error.as_db_error().unwrap().to_string();
        assert!(said.contains("transformed table public.kunden"), "{said}");
    }
    client
        .batch_execute("CREATE INDEX CONCURRENTLY fast ON kunden (name)")
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO kunden (name, preis) VALUES ('indexed', 1)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    assert_eq!(
        rig.value(Side::New, "SELECT full_name FROM customers ORDER BY id DESC LIMIT 1")
            .await,
        "indexed"
    );

    // The mapping of what is mirrored does not change unnoticed.
    let as_it_is = std::mem::replace(&mut rig.entry, mapping(", fax: \"'none'\"", ""));
    let refused = rig.set_phase(Phase::DualRead).await.unwrap_err().to_string();
    assert!(refused.contains("databases"), "{refused}");
    rig.entry = as_it_is;

    rig.check(&["switchover", "--to", "new"], 0, "");
    let client = rig.client().await;
    client
        .batch_execute("INSERT INTO customers (full_name, cents, country) VALUES ('on new', 250, 'DE'); UPDATE customers SET cents = 1 WHERE id = 7")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    assert_eq!(
        rig.value(
            Side::Legacy,
            "SELECT (name, preis, fax) FROM kunden ORDER BY kdnr DESC LIMIT 1"
        )
        .await,
        "(\"on new\",2.50,)"
    );
    assert_eq!(
        rig.value(Side::Legacy, "SELECT (preis, fax) FROM kunden WHERE kdnr = 7")
            .await,
        "(0.01,)"
    );
    // What legacy still had of the dropped column is told, and goes when the operator says so.
    rig.check(&["verify"], 1, "public.kunden");
    rig.check(&["repair"], 0, "");
    rig.check(&["verify"], 0, "");
    rig.check(&["switchover", "--to", "legacy"], 0, "");
    let client = rig.client().await;
    client
        .batch_execute("INSERT INTO kunden (name, preis) VALUES ('back', 4)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.check(&["verify"], 0, "");
    assert_eq!(
        rig.value(
            Side::New,
            "SELECT (full_name, cents) FROM customers ORDER BY id DESC LIMIT 1"
        )
        .await,
        "(back,400)"
    );
}

/// A table split by columns flips once proxy.yaml says what a missing part means.
#[tokio::test(flavor = "multi_thread")]
async fn a_split_table_flips_and_flips_back() {
    let mut rig = Rig::new();
    let legacy = "CREATE TABLE orders (id serial PRIMARY KEY, total numeric(10,2) NOT NULL, note text);
        INSERT INTO orders (total, note) SELECT g, CASE WHEN g % 2 = 0 THEN 'n' || g END FROM generate_series(1, 500) g";
    let new = "CREATE TABLE orders (id serial PRIMARY KEY, total numeric(10,2) NOT NULL);
        CREATE TABLE order_notes (order_id int PRIMARY KEY REFERENCES orders ON DELETE CASCADE, text text NOT NULL)";
    for (server, schema) in [(&rig.legacy, legacy), (&rig.new, new)] {
        server.sql(DATABASE, &format!("SET ROLE {APP}; {schema}")).unwrap();
    }
    let split = |missing: &str| {
        format!(
            "    transform:
      tables:
        public.orders:
          split:
            public.orders: {{}}
            public.order_notes:
              columns: {{ order_id: id, text: note }}
{missing}"
        )
    };
    rig.entry = split("");
    rig.write_config(Phase::DualWrite);
    let said = rig.check(
        &["check"],
        1,
        "transform.inverse public.orders: it is split on new, and nothing says what legacy has of a row that only one part has",
    );
    assert!(said.contains("missing: nulls or missing: no_row"), "{said}");
    rig.entry = split("              missing: nulls\n");
    rig.serve(Phase::DualWrite).await;
    rig.check(
        &["check"],
        0,
        "2 tables are mirrored in another shape, 2 of them also back",
    );
    rig.check(&["backfill"], 0, "");
    rig.wait_caught_up().await;
    rig.check(&["verify"], 0, "");
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM order_notes").await, "250");

    rig.check(&["switchover", "--to", "new"], 0, "");
    let client = rig.client().await;
    client
        .batch_execute(
            "INSERT INTO orders (total) VALUES (7); INSERT INTO order_notes SELECT max(id), 'on new' FROM orders;
             UPDATE order_notes SET text = upper(text) WHERE order_id = 8; DELETE FROM orders WHERE id = 10; INSERT INTO order_notes VALUES (9, 'late')",
        )
        .await
        .unwrap();
    let refused = client.batch_execute("TRUNCATE order_notes").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "0A000", "{refused}");
    rig.wait_caught_up().await;
    assert_eq!(
        rig.value(
            Side::Legacy,
            "SELECT string_agg((id, total, note)::text, ' ' ORDER BY id) FROM orders WHERE id IN (8, 9, 10, 501)"
        )
        .await,
        "(8,8.00,N8) (9,9.00,late) (501,7.00,\"on new\")"
    );
    rig.check(&["verify"], 0, "");
    rig.check(&["check"], 0, "");
    let said = rig.check(&["switchover", "--to", "legacy"], 0, "");
    assert!(!said.contains("force"), "{said}");
    let client = rig.client().await;
    client
        .batch_execute(
            "UPDATE orders SET note = NULL WHERE id = 8; INSERT INTO orders (total, note) VALUES (1, 'back')",
        )
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.check(&["verify"], 0, "");
    assert_eq!(
        rig.value(
            Side::New,
            "SELECT count(*) || ' ' || max(text) FILTER (WHERE order_id = 502) FROM order_notes"
        )
        .await,
        "251 back"
    );
}
