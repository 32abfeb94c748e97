//! What an error of the secondary means: try again, or hold out what it refuses. Pure.

use std::fmt;

use crate::upstream::control::error_chain;

/// How an SQLSTATE is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Passes by itself or when somebody mends the server: connection, deadlock, disk full, too
    /// many connections, shutdown. Retried for ever; the journal keeps what comes.
    Transient,
    /// The same rows will be refused again: a constraint, a type, a missing object.
    Permanent,
    /// Neither clearly. Retried `writes.retry_attempts` times, then taken as permanent.
    Unclear,
}

/// Classifies an SQLSTATE, mostly by its class (PostgreSQL manual, appendix A).
pub fn classify(sqlstate: &str) -> Class {
    match sqlstate {
        // lock_not_available, object_in_use, read_only_sql_transaction (a standby that was not
        // promoted yet), duplicate_object of a concurrent CREATE is 23505 and permanent.
        "55P03" | "55006" | "25006" => return Class::Transient,
        // object_not_in_prerequisite_state, unsafe_new_enum_value_usage.
        "55000" | "55P04" => return Class::Permanent,
        // Our own mistakes with transactions and statements; a new session may do better.
        "25P01" | "25P02" | "26000" | "34000" | "3B001" => return Class::Unclear,
        _ => {}
    }
    match sqlstate.get(..2).unwrap_or_default() {
        // connection, authorization, rollback (serialization, deadlock), resources, operator
        // intervention, system error (an I/O error of the server).
        "08" | "28" | "40" | "53" | "57" | "58" => Class::Transient,
        // not supported, invalid grantor/role, triggered action, cardinality, data, integrity,
        // transaction state, dependent objects, routines, catalog and schema names, names and
        // access rules, check option, program limits, application's own.
        "0A" | "0L" | "0P" | "09" | "21" | "22" | "23" | "25" | "27" | "2B" | "2F" | "38" | "39" | "3D" | "3F"
        | "42" | "44" | "54" | "P0" => Class::Permanent,
        _ => Class::Unclear,
    }
}

/// What the secondary said no to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub sqlstate: Option<String>,
    /// Without values of the application's rows.
    pub text: String,
    /// Everything that the server said; may contain such values.
    pub detail: Option<String>,
}

impl Refusal {
    pub fn of(error: &tokio_postgres::Error) -> Self {
        let Some(said) = error.as_db_error() else {
            return Self::said(error_chain(error));
        };
        let sqlstate = said.code().code();
        Self {
            sqlstate: Some(sqlstate.to_owned()),
            text: without_values(sqlstate, said.message()).to_owned(),
            detail: Some(error_chain(error)),
        }
    }

    /// Our own words.
    pub fn said(text: impl Into<String>) -> Self {
        Self {
            sqlstate: None,
            text: text.into(),
            detail: None,
        }
    }

    /// No error, but not the rows that should be there.
    pub fn rows(expected: u64, found: u64) -> Self {
        Self::said(format!("{expected} rows expected, {found} found"))
    }
}

const TRANSFORM: &str = "\"transform: ";

/// A server's message names objects in quotes, and in data exceptions (class 22) the value itself
/// behind a colon.
fn without_values<'a>(sqlstate: &str, message: &'a str) -> &'a str {
    // An image that could not be computed says so instead of being one (transform::install).
    if let Some(at) = message.find(TRANSFORM) {
        let said = &message[at + 1..];
        let end = said.match_indices([':', '"']).nth(1).map_or(said.len(), |(end, _)| end);
        return &said[..end];
    }
    match message.split_once(':') {
        Some((what, _value)) if sqlstate.starts_with("22") => what,
        _ => message,
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_is_in_the_text() {
        for (sqlstate, message, text) in [
            (
                "22P02",
                "invalid input value for enum mood: \"bad\"",
                "invalid input value for enum mood",
            ),
            ("22003", "integer out of range", "integer out of range"),
            (
                "22P02",
                "malformed record literal: \"transform: division by zero\"",
                "transform: division by zero",
            ),
            (
                "22P02",
                "malformed record literal: \"transform: invalid input syntax for type integer: \"secret\"\"",
                "transform: invalid input syntax for type integer",
            ),
            ("42601", "syntax error: at end", "syntax error: at end"),
        ] {
            assert_eq!(without_values(sqlstate, message), text);
        }
    }

    #[test]
    fn sqlstates_by_what_to_do() {
        use Class::{Permanent, Transient, Unclear};
        for (sqlstate, expected) in [
            ("08006", Transient), // connection_failure
            ("28P01", Transient), // invalid_password: somebody is changing it
            ("40001", Transient), // serialization_failure
            ("40P01", Transient), // deadlock_detected
            ("53000", Transient), // insufficient_resources
            ("53100", Transient), // disk_full
            ("53200", Transient), // out_of_memory
            ("53300", Transient), // too_many_connections
            ("55006", Transient), // object_in_use
            ("55P03", Transient), // lock_not_available
            ("57014", Transient), // query_canceled
            ("57P01", Transient), // admin_shutdown
            ("57P03", Transient), // cannot_connect_now
            ("58030", Transient), // io_error
            ("25006", Transient), // read_only_sql_transaction
            ("0A000", Permanent), // feature_not_supported
            ("22003", Permanent), // numeric_value_out_of_range
            ("22P02", Permanent), // invalid_text_representation
            ("23502", Permanent), // not_null_violation
            ("23505", Permanent), // unique_violation
            ("23514", Permanent), // check_violation
            ("23P01", Permanent), // exclusion_violation
            ("25001", Permanent), // active_sql_transaction
            ("2BP01", Permanent), // dependent_objects_still_exist
            ("3F000", Permanent), // invalid_schema_name
            ("42501", Permanent), // insufficient_privilege
            ("42601", Permanent), // syntax_error
            ("42703", Permanent), // undefined_column
            ("42P01", Permanent), // undefined_table
            ("44000", Permanent), // with_check_option_violation
            ("54000", Permanent), // program_limit_exceeded: an index row too large
            ("55000", Permanent), // object_not_in_prerequisite_state
            ("P0001", Permanent), // raise_exception
            ("25P02", Unclear),   // in_failed_sql_transaction
            ("26000", Unclear),   // invalid_sql_statement_name
            ("XX000", Unclear),   // internal_error
            ("XX001", Unclear),   // data_corrupted
            ("", Unclear),
        ] {
            assert_eq!(classify(sqlstate), expected, "{sqlstate}");
        }
    }
}
