//! The statements that bring one side's definitions in line with the other's: a pure function of
//! what both catalogs say.
//!
//! Each object that differs gets a [verdict](change::Verdict). What cannot be altered while others
//! rest on it (a view over a column whose type changes) takes those along: they are dropped
//! before and made again after. Drops come first, from the leaves of the secondary's
//! dependencies inwards; what is made or altered follows in the order of the primary's. Types,
//! schemas and extensions go last, when no column is of theirs any more.

mod change;
mod make;
mod order;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use self::change::Verdict;
use crate::catalog::objects::{Key, Object, Objects};

/// One statement for the secondary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The role to run it as: its object's owner, where it may run code of that role's.
    pub role: Option<String>,
    pub sql: String,
    /// What follows may need it committed: a label given to an enum.
    pub apart: bool,
}

/// What brings the secondary in line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Script {
    /// In this order.
    pub statements: Vec<Statement>,
    /// The tables that are new, or whose rows may be others afterwards.
    pub tables: BTreeSet<String>,
    /// What no statement can do, in words.
    pub left: Vec<String>,
}

impl Script {
    /// As text to be run by psql.
    pub fn to_sql(&self) -> String {
        let mut text = String::new();
        for why in &self.left {
            text.push_str(&format!("-- no statement can do this: {}\n", why.replace('\n', " ")));
        }
        for statement in self.session() {
            text.push_str(&statement);
            text.push_str(";\n");
        }
        text
    }

    /// All that one session has to run, its settings and changes of role included.
    pub fn session(&self) -> Vec<String> {
        let mut session = vec![
            "SET check_function_bodies = off".to_owned(),
            "SET search_path = pg_catalog".to_owned(),
        ];
        let mut role: Option<&str> = None;
        for statement in &self.statements {
            if statement.role.as_deref() != role {
                role = statement.role.as_deref();
                session.push(match role {
                    Some(role) => format!("SET ROLE {}", crate::catalog::quote::identifier(role)),
                    None => "RESET ROLE".to_owned(),
                });
            }
            session.push(statement.sql.clone());
        }
        if role.is_some() {
            session.push("RESET ROLE".to_owned());
        }
        session
    }
}

/// Compares two databases, or of them what goes with the roots in `scope`, and says what brings
/// the second in line with the first.
pub fn statements(primary: &Objects, secondary: &Objects, scope: Option<&BTreeSet<String>>) -> Script {
    let mut comparison = Comparison::new(primary, secondary, scope);
    comparison.take_along();
    comparison.script()
}

struct Comparison<'a> {
    primary: &'a Objects,
    secondary: &'a Objects,
    verdicts: BTreeMap<&'a Key, Verdict>,
    left: Vec<String>,
}

impl<'a> Comparison<'a> {
    fn new(primary: &'a Objects, secondary: &'a Objects, scope: Option<&BTreeSet<String>>) -> Self {
        let inside = |object: &Object| scope.is_none_or(|scope| scope.contains(&object.root));
        let same_version = primary.major == secondary.major;
        let mut verdicts = BTreeMap::new();
        let mut left = Vec::new();
        for (key, object) in primary.by_key.iter().filter(|(_, object)| inside(object)) {
            let verdict = match secondary.by_key.get(key) {
                None => Verdict::Create,
                Some(there) if change::alike(&key.0, object, there, same_version) => continue,
                Some(there) => change::between(key, object, there, primary, secondary),
            };
            match verdict {
                Verdict::Cannot(why) => left.push(format!("{} {}: {why}", key.0, key.1)),
                verdict => drop(verdicts.insert(key, verdict)),
            }
        }
        for (key, _) in secondary.by_key.iter().filter(|(_, object)| inside(object)) {
            if !primary.by_key.contains_key(key) {
                verdicts.insert(key, Verdict::Drop);
            }
        }
        Self {
            primary,
            secondary,
            verdicts,
            left,
        }
    }

    /// What rests on something that goes, or on a column that gets another type, goes and comes
    /// back.
    fn take_along(&mut self) {
        loop {
            let mut more: Vec<&'a Key> = Vec::new();
            let mut stuck: Vec<&'a Key> = Vec::new();
            for (key, object) in &self.secondary.by_key {
                let goes = self.goes(key);
                for on in &object.depends {
                    let blocks = match self.verdicts.get_key_value(on) {
                        Some((_, Verdict::Drop | Verdict::Replace)) => true,
                        Some((_, Verdict::Alter { retypes, .. })) => {
                            *retypes && ["view", "rule", "trigger", "policy"].contains(&key.0.as_str())
                        }
                        _ => false,
                    };
                    if !blocks || goes {
                        continue;
                    }
                    if change::may_be_made_again(&key.0) {
                        more.push(key);
                    } else if let Some((on, Verdict::Replace)) = self.verdicts.get_key_value(on) {
                        stuck.push(on);
                    }
                }
            }
            for key in &stuck {
                self.verdicts.remove(key);
                self.left.push(format!(
                    "{} {}: is defined otherwise, and in use by tables",
                    key.0, key.1
                ));
            }
            more.retain(|key| !matches!(self.verdicts.get(key), Some(Verdict::Drop | Verdict::Replace)));
            if more.is_empty() && stuck.is_empty() {
                return;
            }
            for key in more {
                self.verdicts.insert(key, Verdict::Replace);
            }
        }
    }

    fn goes(&self, key: &Key) -> bool {
        matches!(self.verdicts.get(key), Some(Verdict::Drop | Verdict::Replace))
    }

    fn table_goes(&self, object: &Object) -> bool {
        self.goes(&("table".to_owned(), object.root.clone()))
    }

    fn script(self) -> Script {
        let mut script = Script::default();
        let last = self.drops(&mut script);
        self.makes(&mut script);
        script.statements.extend(last);
        self.words(&mut script);
        for (key, verdict) in &self.verdicts {
            let (kind, name) = (key.0.as_str(), &key.1);
            if kind == "table" && matches!(verdict, Verdict::Create) {
                script.tables.insert(name.clone());
            } else if kind == "column"
                && let Some(object) = self.wanted(key).or_else(|| self.secondary.by_key.get(*key))
                && !self.table_goes(object)
            {
                script.tables.insert(object.root.clone());
            }
        }
        script.left = self.left;
        script
    }

    /// How the object shall be: as on the primary, or as it is where it only has to be made again.
    fn wanted(&self, key: &Key) -> Option<&'a Object> {
        match self.verdicts.get(key) {
            Some(Verdict::Drop) => None,
            _ => self.primary.by_key.get(key).or_else(|| self.secondary.by_key.get(key)),
        }
    }

    /// Returns what goes only when columns have changed that rest on it now.
    fn drops(&self, script: &mut Script) -> Vec<Statement> {
        let mut last = Vec::new();
        script.statements.extend(self.sequences_that_stay());
        let gone: BTreeSet<&Key> = self
            .verdicts
            .iter()
            .filter(|(key, verdict)| matches!(verdict, Verdict::Drop | Verdict::Replace) && !is_said_of(&key.0))
            .map(|(key, _)| *key)
            .collect();
        for key in order::sorted(&gone, self.secondary).into_iter().rev() {
            let Some(object) = self.secondary.by_key.get(key) else {
                continue;
            };
            // Goes with its table.
            if key.0 != "table" && key.1 != object.root && self.table_goes(object) {
                let elsewhere = object
                    .depends
                    .iter()
                    .any(|on| self.goes(on) && self.root_of(on) != Some(&object.root));
                if !elsewhere || key.0 == "column" || key.0 == "default" {
                    continue;
                }
            }
            if self.goes_last(key) {
                last.push(plain(make::drop(key, object)));
            } else {
                script.statements.push(plain(make::drop(key, object)));
            }
        }
        last
    }

    /// A sequence goes with the column that owns it, unless it is set free before.
    fn sequences_that_stay(&self) -> impl Iterator<Item = Statement> {
        let stay = self.secondary.by_key.iter().filter(|(key, sequence)| {
            let owner = make::text(sequence, "owned_by").and_then(|column| self.secondary.get("column", column));
            let column = (
                "column".to_owned(),
                make::text(sequence, "owned_by").unwrap_or_default().to_owned(),
            );
            let owner_goes = owner.is_some_and(|owner| self.table_goes(owner) || self.goes(&column));
            key.0 == "sequence" && owner_goes && !self.goes(key)
        });
        stay.map(|(key, _)| plain(format!("ALTER SEQUENCE {} OWNED BY NONE", key.1)))
    }

    fn goes_last(&self, key: &Key) -> bool {
        let by_name = |kind: &str| self.verdicts.get(&(kind.to_owned(), key.1.clone()));
        let makes_way = ["table", "view"]
            .iter()
            .any(|kind| matches!(by_name(kind), Some(Verdict::Create)));
        ["type", "schema", "extension"].contains(&key.0.as_str())
            && matches!(self.verdicts.get(key), Some(Verdict::Drop))
            && !makes_way
    }

    fn root_of(&self, key: &Key) -> Option<&String> {
        self.secondary.by_key.get(key).map(|object| &object.root)
    }

    fn makes(&self, script: &mut Script) {
        let made: BTreeSet<&Key> = self
            .verdicts
            .iter()
            .filter(|(key, verdict)| !matches!(verdict, Verdict::Drop) && !is_said_of(&key.0))
            .map(|(key, _)| *key)
            .collect();
        let mut late = Vec::new();
        for key in order::sorted(&made, self.primary) {
            let (Some(verdict), Some(object)) = (self.verdicts.get(key), self.wanted(key)) else {
                continue;
            };
            let new_table = |root: &String| {
                matches!(
                    self.verdicts.get(&("table".to_owned(), root.clone())),
                    Some(Verdict::Create)
                )
            };
            match verdict {
                Verdict::Create | Verdict::Replace => {
                    // A new table's columns are in its statement, a new column's default in its own.
                    let column = ("column".to_owned(), key.1.clone());
                    let within = match key.0.as_str() {
                        "column" => new_table(&object.root),
                        "default" => {
                            !new_table(&object.root)
                                && matches!(self.verdicts.get(&column), Some(Verdict::Create | Verdict::Replace))
                        }
                        _ => false,
                    };
                    if within {
                        continue;
                    }
                    match make::create(key, object, self.primary) {
                        Ok(made) => {
                            script.statements.extend(made.at_once.into_iter().map(|sql| Statement {
                                role: make::role(&key.0, object),
                                sql,
                                apart: false,
                            }));
                            late.extend(made.late);
                        }
                        Err(why) => script.left.push(format!("{} {}: {why}", key.0, key.1)),
                    }
                }
                Verdict::Alter {
                    statements,
                    apart,
                    owner,
                    ..
                } => {
                    let role = self
                        .secondary
                        .by_key
                        .get(key)
                        .and_then(|there| make::role(&key.0, there));
                    script.statements.extend(statements.iter().map(|sql| Statement {
                        role: role.clone(),
                        sql: sql.clone(),
                        apart: *apart,
                    }));
                    late.extend(owner.clone());
                }
                Verdict::Drop | Verdict::Cannot(_) => {}
            }
        }
        script.statements.extend(late.into_iter().map(plain));
    }

    /// Grants and comments, which say something of an object that is there by now.
    fn words(&self, script: &mut Script) {
        let anew = |key: &Key| matches!(self.verdicts.get(key), Some(Verdict::Create | Verdict::Replace));
        let keys: BTreeSet<&Key> = self.primary.by_key.keys().chain(self.secondary.by_key.keys()).collect();
        for key in keys.into_iter().filter(|key| is_said_of(&key.0)) {
            let (wanted, there) = (self.wanted(key), self.secondary.by_key.get(key));
            let Some(object) = wanted.or(there) else { continue };
            let of_new = if key.0 == "comment" {
                object.depends.iter().any(anew)
            } else {
                ["schema", "type", "sequence", "function", "aggregate", "table", "view"]
                    .iter()
                    .any(|kind| anew(&((*kind).to_owned(), object.root.clone())))
            };
            if !of_new && !self.verdicts.contains_key(key) {
                continue;
            }
            let subject_gone = object
                .depends
                .iter()
                .any(|on| matches!(self.verdicts.get(on), Some(Verdict::Drop)))
                || ["schema", "type", "sequence", "function", "aggregate", "table", "view"]
                    .iter()
                    .any(|kind| {
                        matches!(
                            self.verdicts.get(&((*kind).to_owned(), object.root.clone())),
                            Some(Verdict::Drop)
                        )
                    });
            if subject_gone {
                continue;
            }
            let there = there.filter(|_| !of_new);
            script
                .statements
                .extend(make::words(key, wanted, there).into_iter().map(plain));
        }
    }
}

/// What is said of other objects, and is no object itself.
fn is_said_of(kind: &str) -> bool {
    kind == "grant" || kind == "comment"
}

const fn plain(sql: String) -> Statement {
    Statement {
        role: None,
        sql,
        apart: false,
    }
}
