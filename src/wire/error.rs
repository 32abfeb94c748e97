//! What the proxy itself says to a client: an error with a SQLSTATE, as Postgres would put it.

use bytes::BytesMut;
use pgwire::messages::Message;
use pgwire::messages::response::ErrorResponse;

/// How far an error goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Error,
    Fatal,
}

/// An error that a client may see. Its texts hold nothing that a client should not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({sqlstate})")]
pub struct SqlError {
    pub severity: Severity,
    pub sqlstate: &'static str,
    pub message: String,
    pub hint: Option<String>,
}

/// The SQLSTATEs that the proxy gives by itself (PostgreSQL manual, appendix A).
pub mod sqlstate {
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    pub const CONNECTION_FAILURE: &str = "08006";
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    pub const INVALID_AUTHORIZATION: &str = "28000";
    pub const INVALID_PASSWORD: &str = "28P01";
    pub const INVALID_CATALOG_NAME: &str = "3D000";
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    pub const SERIALIZATION_FAILURE: &str = "40001";
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    pub const SYSTEM_ERROR: &str = "58000";
}

impl SqlError {
    pub fn fatal(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Fatal,
            sqlstate,
            message: message.into(),
            hint: None,
        }
    }

    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The ErrorResponse frame.
    pub fn to_frame(&self) -> Vec<u8> {
        let severity = match self.severity {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
        };
        // A zero byte inside would end the field early.
        let clean = |text: &str| text.replace('\0', "\u{fffd}");
        let mut fields = vec![
            (b'S', severity.to_owned()),
            (b'V', severity.to_owned()),
            (b'C', self.sqlstate.to_owned()),
            (b'M', clean(&self.message)),
        ];
        if let Some(hint) = &self.hint {
            fields.push((b'H', clean(hint)));
        }
        let mut out = BytesMut::new();
        match ErrorResponse::new(fields).encode(&mut out) {
            Ok(()) => out.to_vec(),
            // Only a message beyond 2 GiB cannot be encoded.
            Err(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::backend;

    #[test]
    fn the_frame_says_what_postgres_would() {
        let frame = SqlError::fatal(sqlstate::INVALID_CATALOG_NAME, "database \"x\" does not exist").to_frame();
        assert_eq!(frame[0], b'E');
        assert!(backend::is_fatal(&frame[5..]));
        assert_eq!(
            backend::error_text(&frame[5..]),
            "database \"x\" does not exist (3D000)"
        );
    }
}
