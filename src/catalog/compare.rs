//! STUB
pub async fn rows_different(_: &tokio_postgres::Client, _: &tokio_postgres::Client) -> anyhow::Result<Vec<String>> {
    Ok(vec![])
}
