//! From a mapping and two catalogs to select lists, and to everything that is wrong with the
//! mapping as far as catalogs tell. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Catalog, Column, TableFacts};
use super::join::Join;
use super::{Name, Origin, Part, TableMap, Transform};
use crate::catalog::Oid;
use crate::catalog::quote::identifier;
use crate::control::Side;

mod split;

/// A column of a face.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaceColumn {
    /// The other side's.
    pub name: String,
    pub type_name: String,
    /// As it is computed, of the type that it has there.
    pub sql: String,
    /// What proxy.yaml says, where that is an expression.
    pub expression: Option<String>,
}

/// One table in the shape of one of the other side's; or several, put together to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Face {
    pub source: Name,
    pub source_oid: Oid,
    pub target: Name,
    pub columns: Vec<FaceColumn>,
    /// Columns that are the same values under another name: the other side's, then this one's, and
    /// whether they are of one type.
    pub same: Vec<(String, String, bool)>,
    /// Every row of this side's table is told from the row that the other side has.
    pub exact: bool,
    /// Which rows of the source are rows there; without it all of them.
    pub only_where: Option<String>,
    /// What the source's rows are put together with.
    pub join: Option<Join>,
}

impl Face {
    /// Of a row of the source, which goes by its bare name.
    pub fn select_list(&self) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|column| format!("{} AS {}", column.sql, identifier(&column.name)))
            .collect();
        columns.join(", ")
    }

    /// As view `pgtandem.shape` has a table's columns.
    pub fn columns_json(&self) -> String {
        let columns: Vec<[&str; 3]> = self
            .columns
            .iter()
            .map(|column| [column.name.as_str(), column.type_name.as_str(), ""])
            .collect();
        serde_json::to_string(&columns).unwrap_or_default()
    }
}

/// Something that is wrong with a mapping: what, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub side: Side,
    pub subject: String,
    pub fact: String,
    pub advice: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "transform: {}: {} ({}): {}",
            self.subject, self.fact, self.side, self.advice
        )
    }
}

/// What a mapping comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Legacy's tables as new has them.
    pub forward: Vec<Face>,
    /// New's tables as legacy has them, where there is a way back.
    pub reverse: Vec<Face>,
    /// Nothing is mirrored with these.
    pub faults: Vec<Fault>,
    /// Tables without a way back, and why: there is no flip with these.
    pub one_way: Vec<Fault>,
    /// Legacy's schemas that have another name on new.
    pub schemas: BTreeMap<String, String>,
}

impl Plan {
    /// The faces of the tables of one side.
    pub fn faces(&self, side: Side) -> &[Face] {
        match side {
            Side::Legacy => &self.forward,
            Side::New => &self.reverse,
        }
    }
}

/// Every mapping of proxy.yaml against both catalogs.
pub fn plan(transform: &Transform, legacy: &Catalog, new: &Catalog) -> Plan {
    let mut planner = Planner {
        legacy,
        new,
        plan: Plan {
            schemas: transform.schemas.clone(),
            ..Plan::default()
        },
    };
    for schema in transform.schemas.keys() {
        if !legacy.tables.keys().any(|name| name.schema == *schema) {
            planner.fault(
                Side::Legacy,
                schema,
                "legacy has no table in this schema",
                "name one of legacy's schemas under schemas",
            );
        }
    }
    let tables = with_schemas(transform, legacy);
    planner.one_table_each(&tables);
    for (name, map) in &tables {
        planner.table(name, map);
    }
    planner.plan
}

/// The tables of renamed schemas, each as if it were named.
fn with_schemas(transform: &Transform, legacy: &Catalog) -> BTreeMap<Name, TableMap> {
    let mut tables = transform.tables.clone();
    for name in legacy.tables.keys() {
        let Some(schema) = transform.schemas.get(&name.schema) else {
            continue;
        };
        tables.entry(name.clone()).or_insert_with(|| TableMap {
            parts: vec![Part {
                to: Name::new(schema, &name.table),
                columns: BTreeMap::new(),
                missing: None,
            }],
            drop: BTreeSet::new(),
            inverse: BTreeMap::new(),
        });
    }
    tables
}

struct Planner<'a> {
    legacy: &'a Catalog,
    new: &'a Catalog,
    plan: Plan,
}

impl Planner<'_> {
    fn fault(&mut self, side: Side, subject: impl ToString, fact: impl Into<String>, advice: impl Into<String>) {
        self.plan.faults.push(Fault {
            side,
            subject: subject.to_string(),
            fact: fact.into(),
            advice: advice.into(),
        });
    }

    /// No table of new is the target of two, counting those that are mirrored under their own name.
    fn one_table_each(&mut self, tables: &BTreeMap<Name, TableMap>) {
        let mut sources: BTreeMap<&Name, Vec<&Name>> = BTreeMap::new();
        for (name, map) in tables {
            for part in &map.parts {
                sources.entry(&part.to).or_default().push(name);
            }
        }
        for (target, mut from) in sources {
            if !tables.contains_key(target) && self.legacy.tables.contains_key(target) {
                from.push(target);
            }
            if let [first, second, ..] = from[..] {
                let fact = if first == second {
                    format!("two parts of {first} go to it")
                } else {
                    format!("both {first} and {second} go to it")
                };
                self.fault(
                    Side::New,
                    target,
                    fact,
                    "give each table of legacy a table of its own on new",
                );
            }
        }
    }

    fn table(&mut self, name: &Name, map: &TableMap) {
        let (legacy, new) = (self.legacy, self.new);
        let Some(here) = legacy.tables.get(name) else {
            self.fault(
                Side::Legacy,
                name,
                "legacy has no such table",
                "correct the name under transform",
            );
            return;
        };
        self.whole_table(Side::Legacy, here);
        let before = self.plan.faults.len();
        let mut forward = Vec::new();
        let mut used = BTreeSet::new();
        for part in &map.parts {
            let Some(there) = new.tables.get(&part.to) else {
                self.fault(
                    Side::New,
                    &part.to,
                    format!("new has no such table, which {name} becomes"),
                    "create it on new, or correct the name under to",
                );
                continue;
            };
            self.whole_table(Side::New, there);
            let face = self.face(here, there, part, &mut used);
            self.key_is_kept(here, there, &face, map.parts.len() > 1);
            forward.push(split::Half { face, there, part });
        }
        self.nothing_is_forgotten(here, map, &used);
        if self.plan.faults.len() > before {
            return;
        }
        self.optional_parts(here, &mut forward);
        let way_back = match &forward[..] {
            [only] => self.way_back(here, only.there, &only.face, map),
            parts => self.way_back_of_split(here, parts, map),
        };
        if forward.len() > 1 {
            // New may have rows of one part alone, which legacy has not: compared after a flip back.
            forward.iter_mut().for_each(|half| half.face.exact = false);
        }
        self.plan.forward.extend(forward.into_iter().map(|half| half.face));
        match way_back {
            Ok(face) => self.plan.reverse.push(face),
            Err(fault) => self.plan.one_way.push(fault),
        }
    }

    fn whole_table(&mut self, side: Side, table: &TableFacts) {
        if table.kind != "r" || table.partition {
            self.fault(
                side,
                &table.name,
                "it is partitioned, a partition or no table",
                "only plain tables can be transformed; let both sides define it alike",
            );
        }
        for column in table.columns.iter().filter(|column| !column.generated.is_empty()) {
            if side == Side::New || column.generated == "v" {
                self.fault(
                    side,
                    format!("{}.{}", table.name, column.name),
                    "a generated column",
                    "generated columns of transformed tables are not mirrored; compute it otherwise",
                );
            }
        }
    }

    /// The select list over `here` for `there`. `used`: legacy's columns that reach new.
    fn face(&mut self, here: &TableFacts, there: &TableFacts, part: &Part, used: &mut BTreeSet<String>) -> Face {
        let mut face = Face::between(here, there);
        for name in part.columns.keys().filter(|name| there.column(name).is_none()) {
            self.fault(
                Side::New,
                format!("{}.{name}", part.to),
                "new has no such column",
                "correct the name under columns, or create it on new",
            );
        }
        let mut goes_to: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (to, origin) in &part.columns {
            if let Origin::Column(from) = origin {
                goes_to.entry(from).or_default().push(to);
            }
        }
        for (from, to) in goes_to.iter().filter(|(_, to)| to.len() > 1) {
            self.fault(
                Side::New,
                format!("{}.{from}", here.name),
                format!("it goes to {}", to.join(" and ")),
                "a column goes to one column; write the second as an expression (sql)",
            );
        }
        for column in &there.columns {
            let own = || {
                here.column(&column.name)
                    .filter(|own| !goes_to.contains_key(own.name.as_str()))
            };
            let origin = match part.columns.get(&column.name) {
                Some(origin) => origin.clone(),
                None if own().is_some() => Origin::Column(column.name.clone()),
                None => {
                    let fact = if column.not_null {
                        "a NOT NULL column without a source"
                    } else {
                        "a column without a source"
                    };
                    self.fault(
                        Side::New,
                        format!("{}.{}", part.to, column.name),
                        fact,
                        format!("name under columns one of the columns of {}, or an expression (sql), which may be a constant", here.name),
                    );
                    continue;
                }
            };
            match origin {
                Origin::Column(from) => {
                    let Some(source) = here.column(&from) else {
                        self.fault(
                            Side::Legacy,
                            format!("{}.{from}", here.name),
                            format!("legacy has no such column, from which {} is to come", column.name),
                            "correct the name under columns",
                        );
                        continue;
                    };
                    used.insert(from.clone());
                    if !fits(source, column) {
                        self.fault(
                            Side::New,
                            format!("{}.{}", part.to, column.name),
                            format!("{} does not become {} without loss", source.type_name, column.type_name),
                            format!("write an expression (sql) over {from} that gives {}", column.type_name),
                        );
                    }
                    face.same(here, self.legacy, source, column);
                }
                Origin::Sql(sql) => {
                    used.extend(
                        here.columns
                            .iter()
                            .filter(|own| mentions(&sql, &own.name))
                            .map(|own| own.name.clone()),
                    );
                    face.compute(self.legacy, &sql, column);
                }
            }
        }
        face
    }

    /// A row must still be told from every other one.
    fn key_is_kept(&mut self, here: &TableFacts, there: &TableFacts, face: &Face, split: bool) {
        if here.keys.is_empty() && !split {
            return;
        }
        if !keeps_key(here, there, face) {
            let keys: Vec<String> = here.keys.iter().map(|key| format!("({})", key.join(", "))).collect();
            let has = if keys.is_empty() {
                "no key".to_owned()
            } else {
                format!("the key {}", keys.join(" or "))
            };
            self.fault(
                Side::New,
                &there.name,
                format!(
                    "the key is lost: {} has {has}, and no unique NOT NULL columns of {} hold it unchanged",
                    here.name, there.name
                ),
                "carry the key's columns over as they are, under a primary key or a unique constraint",
            );
        }
    }

    fn nothing_is_forgotten(&mut self, here: &TableFacts, map: &TableMap, used: &BTreeSet<String>) {
        for name in map
            .drop
            .iter()
            .chain(map.inverse.keys())
            .filter(|name| here.column(name).is_none())
        {
            self.fault(
                Side::Legacy,
                format!("{}.{name}", here.name),
                "legacy has no such column",
                "correct the name under drop or inverse",
            );
        }
        for column in &here.columns {
            let subject = format!("{}.{}", here.name, column.name);
            match (used.contains(&column.name), map.drop.contains(&column.name)) {
                (false, false) => self.fault(
                    Side::Legacy,
                    subject,
                    "it goes nowhere",
                    "name it under drop, or say under columns what it becomes",
                ),
                (true, true) => self.fault(
                    Side::Legacy,
                    subject,
                    "it is dropped, and comes to new all the same",
                    "take it out of drop or out of columns",
                ),
                _ => {}
            }
        }
    }

    /// New's table as legacy has it.
    fn way_back(&self, legacy: &TableFacts, new: &TableFacts, forward: &Face, map: &TableMap) -> Result<Face, Fault> {
        let blocked = |column: &str, fact: String| Fault {
            side: Side::Legacy,
            subject: format!("{}.{column}", legacy.name),
            fact,
            advice: format!(
                "name under inverse an expression over a row of {} that gives {column}",
                new.name
            ),
        };
        let mut face = Face::between(new, legacy);
        for column in &legacy.columns {
            if !column.generated.is_empty() {
                return Err(blocked(&column.name, "a generated column has no way back".into()));
            }
            let same = forward.same.iter().find(|(_, from, _)| *from == column.name);
            let source = same.and_then(|(to, _, _)| new.column(to));
            match (map.inverse.get(&column.name), source) {
                (Some(sql), _) => face.compute(self.new, sql, column),
                (None, Some(source)) if fits(source, column) => face.same(new, self.new, source, column),
                (None, Some(source)) => {
                    return Err(blocked(
                        &column.name,
                        format!(
                            "{} does not become {} again without loss",
                            source.type_name, column.type_name
                        ),
                    ));
                }
                (None, None) => return Err(blocked(&column.name, "it has no inverse".into())),
            }
        }
        if !legacy.keys.is_empty() && !keeps_key(new, legacy, &face) {
            return Err(blocked(
                &legacy.keys[0].join(", "),
                "the key is lost on the way back".into(),
            ));
        }
        face.exact = face.exact && forward.exact;
        Ok(face)
    }
}

impl Face {
    fn between(here: &TableFacts, there: &TableFacts) -> Self {
        Self {
            source: here.name.clone(),
            source_oid: here.oid,
            target: there.name.clone(),
            columns: Vec::new(),
            same: Vec::new(),
            exact: true,
            only_where: None,
            join: None,
        }
    }

    /// The column's own value.
    fn same(&mut self, here: &TableFacts, catalog: &Catalog, from: &Column, to: &Column) {
        let value = format!("{}.{}", identifier(&here.name.table), identifier(&from.name));
        let sql = if from.type_name == to.type_name {
            value
        } else if from.kind == "e" || to.kind == "e" {
            cast(catalog, &format!("({value})::text"), to)
        } else {
            cast(catalog, &value, to)
        };
        self.same
            .push((to.name.clone(), from.name.clone(), from.type_name == to.type_name));
        self.columns.push(FaceColumn {
            name: to.name.clone(),
            type_name: to.type_name.clone(),
            sql,
            expression: None,
        });
    }

    fn compute(&mut self, catalog: &Catalog, sql: &str, to: &Column) {
        self.exact = false;
        let expression = Some(sql.to_owned());
        // A comment ends with its line.
        let ended = format!("{sql}\n");
        let sql = if sql.contains("--") { &ended } else { sql };
        self.columns.push(FaceColumn {
            name: to.name.clone(),
            type_name: to.type_name.clone(),
            sql: cast(catalog, sql, to),
            expression,
        });
    }
}

/// Whether unique columns of `there` hold a whole key of `here`, unchanged.
fn keeps_key(here: &TableFacts, there: &TableFacts, face: &Face) -> bool {
    let origin = |column: &String| {
        face.same
            .iter()
            .find(|(to, _, _)| to == column)
            .map(|(_, from, _)| from)
    };
    there.keys.iter().any(|unique| {
        let from: Option<BTreeSet<&String>> = unique.iter().map(origin).collect();
        from.is_some_and(|from| {
            here.keys
                .iter()
                .any(|key| key.iter().all(|column| from.contains(column)))
        })
    })
}

/// An expression's value as a column of the other side holds it, so that its text is the one that
/// the column's value has there. Never by cutting text off: where that is too long the other side
/// refuses it.
fn cast(catalog: &Catalog, sql: &str, to: &Column) -> String {
    let wanted = to.type_name.as_str();
    if !to.built_in && !catalog.types.contains(wanted) {
        // A type that only the other side has: its text is taken.
        return format!("({sql})::text");
    }
    if let Some(length) = wanted
        .strip_prefix("character(")
        .and_then(|rest| rest.strip_suffix(')'))
    {
        return format!(
            "(CASE WHEN char_length(({sql})::text) <= {length} THEN ({sql})::character({length}) ELSE ({sql})::bpchar END)"
        );
    }
    if wanted.starts_with("bit(") && !wanted.ends_with(']') {
        return format!("({sql})::\"bit\"");
    }
    format!("({sql})::{}", without_length(wanted))
}

/// `character varying(20)[]` is `character varying[]`; other types keep what they have.
fn without_length(type_name: &str) -> String {
    for kind in ["character varying", "bit varying"] {
        if let Some(rest) = type_name.strip_prefix(kind)
            && let Some((_, rest)) = rest.split_once(')')
        {
            return format!("{kind}{rest}");
        }
    }
    type_name.to_owned()
}

/// Whether every value of a column goes into another one exactly, or is refused there: never
/// rounded, cut off or read otherwise.
fn fits(from: &Column, to: &Column) -> bool {
    if from.type_name == to.type_name {
        return true;
    }
    let whole = |name: &str| matches!(name, "smallint" | "integer" | "bigint");
    let text = |name: &str| name == "text" || name.starts_with("character varying") && !name.ends_with(']');
    let (one, other) = (from.type_name.as_str(), to.type_name.as_str());
    if whole(one) && (whole(other) || scale(other).is_some()) {
        return true;
    }
    if let (Some(from), Some(to)) = (scale(one), scale(other)) {
        return from <= to;
    }
    let words = |column: &Column, name: &str| text(name) || column.kind == "e";
    words(from, one) && words(to, other)
}

/// The digits behind the point of a numeric; without a limit as many as there are.
fn scale(type_name: &str) -> Option<u32> {
    let rest = type_name.strip_prefix("numeric")?;
    if rest.is_empty() {
        return Some(u32::MAX);
    }
    let (_, scale) = rest.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    scale.parse().ok()
}

/// Whether an expression has a column's name in it, as a word. Too often rather than too seldom
/// would hide that a column goes nowhere; so the name must stand there as a whole.
fn mentions(sql: &str, column: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    let (text, wanted) = (sql.to_lowercase(), column.to_lowercase());
    text.match_indices(&wanted).any(|(at, found)| {
        let before = text[..at].chars().next_back();
        let after = text[at + found.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

#[cfg(test)]
mod tests;
