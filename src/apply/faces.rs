//! Tables that have another shape on the secondary, as an applier's session knows them: by the OIDs
//! of their faces (see [`crate::transform`]).

use std::collections::HashMap;

use tokio_postgres::Client;

use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::Oid;
use crate::catalog::quote::qualified;
use crate::control::Side;
use crate::journal::joined::{Joined, JoinedPart};
use crate::journal::read::Shapes;
use crate::transform::check::examine;
use crate::transform::install::install;
use crate::transform::{Face, Fault, Plan};

#[derive(Default)]
pub(super) struct Faces {
    /// By the primary's table.
    by_source: HashMap<Oid, Vec<Oid>>,
    /// By the face's OID: what is read where a table would be.
    relations: HashMap<Oid, String>,
    /// Those that several tables' rows are put together to.
    joined: Vec<Joined>,
    /// Tables that could not be mirrored after a flip, and why.
    pub one_way: Vec<String>,
}

impl Faces {
    /// Makes both sides' faces those of proxy.yaml. What is wrong with the mapping stops here:
    /// nothing is mirrored by half of it. A table whose mapping changed needs seeding again.
    pub(super) async fn put(
        config: &ApplierConfig,
        primary: &mut Client,
        secondary: &mut Client,
    ) -> Result<Self, ApplyError> {
        if config.transform.is_empty() && !any_recorded(primary).await? && !any_recorded(secondary).await? {
            return Ok(Self::default());
        }
        let (legacy, new) = match config.primary.side {
            Side::Legacy => (&*primary, &*secondary),
            Side::New => (&*secondary, &*primary),
        };
        let plan = examine(&config.transform, legacy, new)
            .await
            .map_err(doing("examine the mapping of the two schemas"))?;
        if !plan.faults.is_empty() {
            let faults: Vec<String> = plan.faults.iter().map(Fault::to_string).collect();
            return Err(ApplyError::Transform(faults.join("; ")));
        }
        put_on(config.primary.side, primary, secondary, &plan).await?;
        put_on(config.secondary.side, secondary, primary, &plan).await?;
        let mut faces = Self {
            one_way: plan
                .one_way
                .iter()
                .map(|fault| format!("{}: {}", fault.subject, fault.fact))
                .collect(),
            ..Self::default()
        };
        let rows = primary
            .query(
                "SELECT rel, sources, format('pgtandem.%I', face), face FROM pgtandem.transform",
                &[],
            )
            .await
            .map_err(doing("read the mapping of the two schemas"))?;
        for row in &rows {
            let (rel, sources, function): (Oid, Vec<Oid>, String) = (row.get(0), row.get(1), row.get(2));
            for source in sources {
                faces.by_source.entry(source).or_default().push(rel);
            }
            let face = plan
                .faces(config.primary.side)
                .iter()
                .find(|face| face.name() == row.get::<_, &str>(3));
            faces.joined.extend(face.and_then(|face| joined(face, rel, &function)));
            faces.relations.insert(rel, function);
        }
        Ok(faces)
    }

    /// For whoever reads the journal.
    pub(super) fn shapes(&self) -> Shapes {
        Shapes {
            transformed: !self.relations.is_empty(),
            joined: self.joined.clone(),
        }
    }

    /// Whether rows of several tables are put together to this one's: there is no table behind it
    /// whose rows could be journaled anew.
    pub(super) fn is_joined(&self, rel: Oid) -> bool {
        self.joined.iter().any(|joined| joined.rel == rel)
    }

    /// Under which OIDs a table's changes leave the journal.
    pub(super) fn of(&self, source: Oid) -> Vec<Oid> {
        self.by_source.get(&source).cloned().unwrap_or_else(|| vec![source])
    }

    /// What is read on the primary instead of a table of that name.
    pub(super) fn relation(&self, rel: Oid) -> Option<&String> {
        self.relations.get(&rel)
    }
}

fn joined(face: &Face, rel: Oid, function: &str) -> Option<Joined> {
    let join = face.join.as_ref()?;
    let part = |rel, name: &crate::transform::Name, key: &[String]| JoinedPart {
        rel,
        relation: qualified(&name.schema, &name.table),
        key: key.to_vec(),
    };
    let first = part(face.source_oid, &face.source, &join.key);
    let others = join
        .others
        .iter()
        .map(|other| part(other.source_oid, &other.source, &other.key));
    Some(Joined {
        rel,
        function: function.to_owned(),
        parts: std::iter::once(first).chain(others).collect(),
    })
}

async fn any_recorded(client: &Client) -> Result<bool, ApplyError> {
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pgtandem.transform) OR EXISTS (SELECT FROM pgtandem.transform_schema)",
            &[],
        )
        .await
        .map_err(doing("look for a mapping of the two schemas"))?;
    Ok(row.get(0))
}

/// `follower`: the side where the tables' states are, while `side` is the primary.
async fn put_on(side: Side, client: &mut Client, follower: &mut Client, plan: &Plan) -> Result<(), ApplyError> {
    let schemas = match side {
        Side::Legacy => plan.schemas.clone(),
        Side::New => plan
            .schemas
            .iter()
            .map(|(old, new)| (new.clone(), old.clone()))
            .collect(),
    };
    let fresh = follower
        .query_one("SELECT NOT EXISTS (SELECT FROM pgtandem.seeding)", &[])
        .await
        .map_err(doing("look for tables that are mirrored already"))?
        .get::<_, bool>(0);
    let changed = install(client, plan.faces(side), &schemas, fresh)
        .await
        .map_err(doing("install the mapping of the two schemas"))?;
    if changed.is_empty() {
        return Ok(());
    }
    tracing::info!(%side, tables = changed.sources.len(), "tables are mirrored in another shape from now on");
    // A row of either is no table any more; what is of the other direction has no state here.
    let forget = follower
        .transaction()
        .await
        .map_err(doing("forget a table's old shape"))?;
    for rel in &changed.left {
        forget
            .execute(
                "SELECT pgtandem.void_held($1, 'its mapping to the other schema changed')",
                &[rel],
            )
            .await
            .map_err(doing("void what is held of a table's old shape"))?;
    }
    forget
        .execute("DELETE FROM pgtandem.seeding WHERE rel = ANY ($1)", &[&changed.left])
        .await
        .map_err(doing("forget a table's old shape"))?;
    forget.commit().await.map_err(doing("forget a table's old shape"))
}
