//! One thing that is said of a pair of databases.

use serde::Serialize;

use crate::control::Side;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Mirroring, or a flip, would not be exact or not work at all.
    Blocks,
    /// It works; what follows from it should be known before.
    Warns,
    Fine,
}

/// A fact with what follows from it. Its fields are part of the interface (`check --json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable, `area.what`: `role.replica`, `table.columns`.
    pub id: &'static str,
    pub level: Level,
    /// Where it is, and where `sql` is to be run; none: the pair.
    pub side: Option<Side>,
    /// What it is about: a table, a role, an extension; empty for the server or the pair.
    pub subject: String,
    pub fact: String,
    /// What to do; empty where nothing is to be done.
    pub advice: String,
    /// Statements that mend it, without a closing semicolon.
    pub sql: Vec<String>,
}

impl Finding {
    fn new(id: &'static str, level: Level, fact: impl Into<String>) -> Self {
        Self {
            id,
            level,
            side: None,
            subject: String::new(),
            fact: fact.into(),
            advice: String::new(),
            sql: Vec::new(),
        }
    }

    pub(super) fn blocks(id: &'static str, fact: impl Into<String>) -> Self {
        Self::new(id, Level::Blocks, fact)
    }

    pub(super) fn warns(id: &'static str, fact: impl Into<String>) -> Self {
        Self::new(id, Level::Warns, fact)
    }

    pub(super) fn fine(id: &'static str, fact: impl Into<String>) -> Self {
        Self::new(id, Level::Fine, fact)
    }

    pub(super) fn on(self, side: Side) -> Self {
        Self {
            side: Some(side),
            ..self
        }
    }

    pub(super) fn about(self, subject: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            ..self
        }
    }

    pub(super) fn advice(self, advice: impl Into<String>) -> Self {
        Self {
            advice: advice.into(),
            ..self
        }
    }

    /// One more statement.
    pub(super) fn sql(mut self, statement: impl Into<String>) -> Self {
        let statement = statement.into();
        self.sql.push(statement.trim_end_matches(';').to_owned());
        self
    }
}
