//! SQL-level cursors and prepared statements of a session, as far as their reads are shown to the
//! shadow. What is remembered wrongly (a DECLARE that failed, a name that came to mean something
//! else) makes no mismatch: differences are confirmed by asking both sides the same.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::observe::Observation;
use crate::sql::{Prepare, Script};

/// Names of each kind that are remembered of one session.
const NAMES_MAX: usize = 64;
/// Longer ones are not.
const TEXT_BYTES_MAX: usize = 64 * 1024;

#[derive(Default)]
pub(super) struct SqlStatements {
    prepared: HashMap<String, Prepared>,
    cursors: HashMap<String, Cursor>,
}

pub(super) struct Prepared {
    /// PREPARE as it was sent.
    pub prepare: Bytes,
    /// The statement behind AS.
    pub statement: Arc<[u8]>,
}

pub(super) struct Cursor {
    pub query: Arc<[u8]>,
    /// The query's.
    pub script: Arc<Script>,
    /// Of DECLARE's parameters: types, and a Bind's body behind the names without the results'
    /// formats.
    pub types: Box<[u8]>,
    pub values: Box<[u8]>,
    /// The formats of the rows that were fetched.
    pub results: Box<[u8]>,
    /// Its transaction had written when it was declared.
    pub after_write: bool,
    pub state: State,
}

pub(super) enum State {
    /// Nothing has been fetched.
    Declared,
    /// The first rows have been.
    Fetched(Box<Observation>),
    /// Nothing more is of interest.
    Over,
}

impl SqlStatements {
    pub(super) fn prepare(&mut self, prepare: &Prepare, text: &[u8]) {
        // A second PREPARE of one name fails.
        if text.len() <= TEXT_BYTES_MAX && self.prepared.len() < NAMES_MAX && !self.prepared.contains_key(&prepare.name)
        {
            let prepared = Prepared {
                prepare: Bytes::copy_from_slice(text),
                statement: prepare.statement.clone(),
            };
            self.prepared.insert(prepare.name.clone(), prepared);
        }
    }

    pub(super) fn prepared(&self, name: &str) -> Option<&Prepared> {
        self.prepared.get(name)
    }

    /// One, or all.
    pub(super) fn deallocate(&mut self, name: Option<&str>) {
        match name {
            Some(name) => drop(self.prepared.remove(name)),
            None => self.prepared.clear(),
        }
    }

    pub(super) fn declare(&mut self, name: &str, cursor: Cursor) {
        self.close(Some(name));
        if self.cursors.len() < NAMES_MAX && cursor.query.len() <= TEXT_BYTES_MAX {
            self.cursors.insert(name.to_owned(), cursor);
        }
    }

    pub(super) fn cursor(&mut self, name: &str) -> Option<&mut Cursor> {
        self.cursors.get_mut(name)
    }

    /// The first rows of a cursor have been fetched; more may be.
    pub(super) fn lay_aside(&mut self, name: &str, observation: Observation) {
        match self.cursors.get_mut(name) {
            Some(cursor) => cursor.state = State::Fetched(Box::new(observation)),
            None => observation.complete(),
        }
    }

    /// One, or all: what was fetched is the read.
    pub(super) fn close(&mut self, name: Option<&str>) {
        let closed: Vec<Cursor> = match name {
            Some(name) => self.cursors.remove(name).into_iter().collect(),
            None => self.cursors.drain().map(|(_, cursor)| cursor).collect(),
        };
        for cursor in closed {
            if let State::Fetched(observation) = cursor.state {
                observation.complete();
            }
        }
    }

    /// Cursors end with their transaction; what is fetched later from one WITH HOLD is not looked
    /// at.
    pub(super) fn transaction_over(&mut self) {
        if !self.cursors.is_empty() {
            self.close(None);
        }
    }
}
