//! What the proxy's own role must be allowed, and the SQL that a DBA runs where it is not.

use tokio_postgres::Client;

use super::quote;

/// What [`journal::install`](crate::journal::install) needs: one statement for each privilege
/// that is missing.
pub async fn missing_to_install(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT pg_catalog.current_database()::text, current_user::text,
                    pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'),
                    pg_catalog.to_regnamespace('pgtandem') IS NOT NULL,
                    COALESCE((SELECT pg_catalog.pg_has_role(n.nspowner, 'USAGE')
                                FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pgtandem'), true)",
            &[],
        )
        .await?;
    let (database, role): (String, String) = (row.get(0), row.get(1));
    let (may_create, exists, owns): (bool, bool, bool) = (row.get(2), row.get(3), row.get(4));
    let mut missing = Vec::new();
    if !exists && !may_create {
        missing.push(format!(
            "GRANT CREATE ON DATABASE {} TO {};",
            quote::identifier(&database),
            quote::identifier(&role)
        ));
    }
    if exists && !owns {
        missing.push(format!("ALTER SCHEMA pgtandem OWNER TO {};", quote::identifier(&role)));
    }
    Ok(missing)
}

/// Tables on this side that the proxy's role does not own, directly or as a member: capture
/// needs to own them, and so does the applier. One GRANT for each owner.
pub async fn missing_ownership(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT DISTINCT pg_catalog.pg_get_userbyid(c.relowner)::text, current_user::text
               FROM pgtandem.shape s JOIN pg_catalog.pg_class c ON c.oid = s.rel
              WHERE s.extension IS NULL AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| {
            let (owner, role): (String, String) = (row.get(0), row.get(1));
            format!("GRANT {} TO {};", quote::identifier(&owner), quote::identifier(&role))
        })
        .collect())
}

/// The statement that lets the applier switch triggers off for itself, where it may not yet.
/// Before Postgres 15 only a superuser may.
pub async fn missing_replication_role(client: &Client) -> Result<Option<String>, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT current_user::text, pg_catalog.current_setting('server_version_num')::integer,
                    r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user",
            &[],
        )
        .await?;
    let (role, version, superuser): (String, i32, bool) = (row.get(0), row.get(1), row.get(2));
    if superuser {
        return Ok(None);
    }
    if version < 150_000 {
        return Ok(Some(format!("ALTER ROLE {} SUPERUSER;", quote::identifier(&role))));
    }
    let granted = client
        .query_one(
            "SELECT pg_catalog.has_parameter_privilege('session_replication_role', 'SET')",
            &[],
        )
        .await?
        .get::<_, bool>(0);
    Ok((!granted).then(|| {
        format!(
            "GRANT SET ON PARAMETER session_replication_role TO {};",
            quote::identifier(&role)
        )
    }))
}
