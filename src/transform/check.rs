//! What only a server can say of a mapping: whether its expressions are SQL over one row, immutable,
//! and give what their columns take. Postgres asks the same of a generated column, so each expression
//! becomes one, of an empty temporary table like the source, in a transaction that is rolled back.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::facts::Catalog;
use super::{Face, Fault, Plan, Transform, plan};
use crate::catalog::quote::identifier;
use crate::control::Side;
use crate::sql::is_one_expression;

/// The whole judgement: names, keys and types by the catalogs, then expressions by the servers. The
/// sessions must have the [pinned settings](crate::catalog::PINNED_SETTINGS), and may write.
pub async fn examine(transform: &Transform, legacy: &Client, new: &Client) -> Result<Plan, tokio_postgres::Error> {
    if transform.is_empty() {
        return Ok(Plan::default());
    }
    let (here, there) = tokio::try_join!(Catalog::read(legacy), Catalog::read(new))?;
    let mut plan = plan(transform, &here, &there);
    for (side, client) in [(Side::Legacy, legacy), (Side::New, new)] {
        let faults = expressions(client, side, plan.faces(side)).await?;
        plan.faults.extend(faults);
    }
    Ok(plan)
}

async fn expressions(client: &Client, side: Side, faces: &[Face]) -> Result<Vec<Fault>, tokio_postgres::Error> {
    let mut faults = Vec::new();
    for face in faces
        .iter()
        .filter(|face| face.columns.iter().any(|column| column.expression.is_some()))
    {
        client
            .batch_execute(
                "BEGIN READ WRITE; SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog",
            )
            .await?;
        let judged = of_face(client, side, face).await;
        client.batch_execute("ROLLBACK").await?;
        faults.extend(judged?);
    }
    Ok(faults)
}

async fn of_face(client: &Client, side: Side, face: &Face) -> Result<Vec<Fault>, tokio_postgres::Error> {
    let table = identifier(&face.source.table);
    // Of several tables, the columns that are told apart by their names alone.
    let columns = match &face.join {
        None => format!("LIKE {}", face.source.quoted()),
        Some(join) => {
            let columns = join.named.iter();
            let columns: Vec<String> = columns
                .map(|(name, type_name)| format!("{} {type_name}", identifier(name)))
                .collect();
            columns.join(", ")
        }
    };
    client
        .batch_execute(&format!("CREATE TEMP TABLE {table} ({columns})"))
        .await?;
    let mut faults = Vec::new();
    for column in &face.columns {
        let Some(expression) = &column.expression else { continue };
        // A type that only the other side has is read from text there.
        let known = client
            .query_one("SELECT to_regtype($1) IS NOT NULL", &[&base(&column.type_name)])
            .await?;
        let type_name = if known.get(0) {
            column.type_name.as_str()
        } else {
            "text"
        };
        if !is_one_expression(expression) {
            faults.push(Fault {
                side,
                subject: format!("{}.{}", face.target, column.name),
                fact: format!("the expression is not SQL: {expression}"),
                advice: format!("write one SQL expression over a row of {}", face.source),
            });
            continue;
        }
        client.batch_execute("SAVEPOINT expression").await?;
        let probe = format!(
            "ALTER TABLE pg_temp.{table} ADD COLUMN \"pgtandem probe\" {type_name} GENERATED ALWAYS AS (\n{expression}\n) STORED"
        );
        // The extended protocol takes one statement only.
        let judged = client.execute(&probe, &[]).await;
        client.batch_execute("ROLLBACK TO SAVEPOINT expression").await?;
        match judged {
            Ok(_) => {}
            Err(error) if error.code().is_some() => faults.push(fault(side, face, &column.name, expression, &error)),
            Err(error) => return Err(error),
        }
    }
    Ok(faults)
}

fn base(type_name: &str) -> &str {
    type_name.split('(').next().unwrap_or(type_name)
}

fn fault(side: Side, face: &Face, column: &str, expression: &str, error: &tokio_postgres::Error) -> Fault {
    let said = error
        .as_db_error()
        .map_or_else(|| error.to_string(), |error| error.message().to_owned());
    let (fact, advice) = match error.code() {
        Some(code) if *code == SqlState::INVALID_OBJECT_DEFINITION => (
            format!("the expression is not immutable: {expression}"),
            "use functions only that give the same for the same row at any time (SELECT provolatile FROM pg_proc)"
                .to_owned(),
        ),
        Some(code) if *code == SqlState::DATATYPE_MISMATCH => (
            format!("the column cannot take what the expression gives: {said}"),
            "cast it to the column's type".to_owned(),
        ),
        Some(code) if *code == SqlState::SYNTAX_ERROR => (
            format!("the expression is not SQL: {said}"),
            format!("write one SQL expression over a row of {}", face.source),
        ),
        _ => (
            format!("the expression cannot be computed: {said}"),
            format!(
                "write one SQL expression over the columns of {}; functions outside pg_catalog with their schema",
                face.source
            ),
        ),
    };
    Fault {
        side,
        subject: format!("{}.{column}", face.target),
        fact,
        advice,
    }
}
