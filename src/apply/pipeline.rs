//! Many statements sent back to back on one connection, answered in order.

use std::error::Error as StdError;
use std::pin::Pin;

use bytes::BytesMut;
use futures_util::FutureExt;
use postgres_protocol::types::{ArrayDimension, array_to_sql};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Error, SimpleQueryMessage, Statement};

use super::difference::Image;

/// Images as a `text[]` parameter: bytes as they came, never decoded.
#[derive(Debug)]
pub struct ImageArray<'a>(pub Vec<Image<'a>>);

impl ToSql for ImageArray<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        let dimension = ArrayDimension {
            len: i32::try_from(self.0.len())?,
            lower_bound: 1,
        };
        array_to_sql(
            Some(dimension),
            Type::TEXT.oid(),
            &self.0,
            |image, out| {
                out.extend_from_slice(image);
                Ok(postgres_protocol::IsNull::No)
            },
            out,
        )?;
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TEXT_ARRAY
    }

    to_sql_checked!();
}

/// One statement of a pipeline.
#[derive(Debug)]
pub enum Item<'a> {
    /// SQL text; of several statements the last one's count is reported.
    Text(String),
    Prepared(Statement, Vec<ImageArray<'a>>),
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<u64, Error>> + Send + 'a>>;

/// Sends all, then waits for all. The row count of each, up to the first error.
pub async fn run(client: &Client, items: &[Item<'_>]) -> Result<Vec<u64>, Error> {
    let mut pending: Vec<Answer<'_>> = Vec::with_capacity(items.len());
    let mut early: Vec<Option<Result<u64, Error>>> = Vec::with_capacity(items.len());
    for item in items {
        let mut answer: Answer<'_> = match item {
            Item::Text(text) => Box::pin(async move {
                let messages = client.simple_query(text).await?;
                Ok(messages
                    .iter()
                    .rev()
                    .find_map(|message| match message {
                        SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
                        _ => None,
                    })
                    .unwrap_or(0))
            }),
            Item::Prepared(statement, arrays) => Box::pin(async move {
                let parameters: Vec<&(dyn ToSql + Sync)> =
                    arrays.iter().map(|array| array as &(dyn ToSql + Sync)).collect();
                client.execute(statement, &parameters).await
            }),
        };
        // The first poll is what sends it.
        early.push(answer.as_mut().now_or_never());
        pending.push(answer);
    }
    let mut counts = Vec::with_capacity(items.len());
    let mut failed = None;
    for (early, answer) in early.into_iter().zip(pending) {
        // After an error the server refuses the rest; wait for those answers all the same, so
        // that the connection is quiet when the caller goes on.
        let result = match early {
            Some(result) => result,
            None => answer.await,
        };
        match result {
            Ok(count) => counts.push(count),
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
    }
    failed.map_or(Ok(counts), Err)
}
