//! Which databases a server has, for the entry `"*"`.

use crate::config::Target;
use crate::upstream::control::{connect, error_chain};

/// The databases that clients may connect to, templates apart.
///
/// # Errors
/// The server cannot be reached or asked, in words.
pub async fn databases(target: &Target) -> Result<Vec<String>, String> {
    let client = connect(target, "databases").await.map_err(|error| error.to_string())?;
    let rows = client
        .query(
            "SELECT datname::text FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname",
            &[],
        )
        .await
        .map_err(|error| format!("{}: list databases: {}", target.describe(), error_chain(&error)))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
