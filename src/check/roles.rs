//! Findings about roles: what the proxy's own may do, and whether the others are there.

use std::collections::BTreeSet;

use super::facts::Facts;
use super::finding::Finding;
use crate::catalog::quote::identifier;
use crate::control::Side;

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for side in [Side::Legacy, Side::New] {
        found.extend(own(facts, side));
    }
    found.extend(clients(facts));
    found.extend(concerned(facts));
    if found.is_empty() {
        found.push(Finding::fine(
            "role",
            "the proxy's role may do what it must; the others are on both sides",
        ));
    }
    found.extend(ddl_fence(facts));
    found
}

/// Whether DDL past the proxy is refused on the side that is not the primary.
fn ddl_fence(facts: &Facts) -> Option<Finding> {
    let without = [Side::Legacy, Side::New]
        .into_iter()
        .filter(|side| !facts.side(*side).role.superuser);
    let without: Vec<String> = without.map(|side| side.to_string()).collect();
    (!without.is_empty()).then(|| {
        Finding::fine(
            "role.ddl_fence",
            format!(
                "on {} DDL past the proxy is not refused while that side is the secondary: event triggers take a \
                 superuser. The definitions are compared instead, `status` shows what differs",
                without.join(" and ")
            ),
        )
    })
}

fn own(facts: &Facts, side: Side) -> Vec<Finding> {
    let it = facts.side(side);
    let mut found = Vec::new();
    for statement in &it.missing_to_install {
        found.push(
            Finding::blocks(
                "role.create",
                format!("{} may not make its own schema on {side}", it.role.name),
            )
            .on(side)
            .about(&it.role.name)
            .advice("as a DBA, run the statement")
            .sql(statement.as_str()),
        );
    }
    // Only a secondary is applied to; after the flip it is the other side.
    if let Some(statement) = &it.missing_to_apply {
        found.push(
            Finding::blocks(
                "role.replica",
                format!("{} may not set session_replication_role on {side}", it.role.name),
            )
            .on(side)
            .about(&it.role.name)
            .advice("as a DBA, run the statement: triggers of the application would fire twice otherwise")
            .sql(statement.as_str()),
        );
    }
    let owners: BTreeSet<&str> = it
        .tables
        .iter()
        .filter(|table| !table.owned && table.extension.is_none())
        .map(|table| table.owner.as_str())
        .collect();
    for owner in owners {
        let tables = it.tables.iter().filter(|table| table.owner == owner).count();
        found.push(
            Finding::blocks(
                "role.ownership",
                format!(
                    "{} does not act for {owner}, who owns {tables} tables on {side}",
                    it.role.name
                ),
            )
            .on(side)
            .about(owner)
            .advice("as a DBA, run the statement")
            .sql(format!("GRANT {} TO {}", identifier(owner), identifier(&it.role.name))),
        );
    }
    found
}

fn clients(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for side in [Side::Legacy, Side::New] {
        for user in &facts.users {
            let quoted = identifier(user);
            match facts.side(side).roles.get(user) {
                Some(true) => {}
                Some(false) => found.push(
                    Finding::blocks(
                        "role.client",
                        format!("{user}, a client of proxy.yaml, may not log in on {side}"),
                    )
                    .on(side)
                    .about(user)
                    .advice("let it log in, with the same password on both sides")
                    .sql(format!("ALTER ROLE {quoted} LOGIN")),
                ),
                None => found.push(
                    Finding::blocks(
                        "role.client",
                        format!("{user}, a client of proxy.yaml, is not on {side}"),
                    )
                    .on(side)
                    .about(user)
                    .advice("create it, with the same password on both sides")
                    .sql(format!("CREATE ROLE {quoted} LOGIN")),
                ),
            }
        }
    }
    found
}

/// Roles that the secondary needs for the primary's definitions.
fn concerned(facts: &Facts) -> Vec<Finding> {
    let side = facts.primary.other();
    let (primary, there) = (facts.primary(), &facts.secondary().roles);
    let missing = primary
        .concerned
        .iter()
        .filter(|name| !there.contains_key(*name) && !facts.users.contains(name));
    missing
        .map(|name| {
            Finding::blocks(
                "role.missing",
                format!(
                    "{name} owns or is granted something on {}, and is not on {side}",
                    facts.primary
                ),
            )
            .on(side)
            .about(name)
            .advice("create it (its password and memberships are not copied)")
            .sql(create_role(name, primary.roles.get(name) == Some(&true)))
        })
        .collect()
}

/// The statement that creates a role as far as definitions need it.
pub fn create_role(name: &str, may_log_in: bool) -> String {
    let login = if may_log_in { " LOGIN" } else { "" };
    format!("CREATE ROLE {}{login}", identifier(name))
}
