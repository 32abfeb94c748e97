//! Bodies of servers' frames that the proxy reads.

use super::split_cstr;

/// A transaction's state as ReadyForQuery gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    #[default]
    Idle,
    InTransaction,
    Failed,
}

impl Status {
    /// Reads a ReadyForQuery's body; what is not known counts as an open transaction, so that
    /// nothing is ever done between a transaction's statements.
    pub const fn read(body: &[u8]) -> Self {
        match body {
            [b'I', ..] => Self::Idle,
            [b'E', ..] => Self::Failed,
            _ => Self::InTransaction,
        }
    }
}

/// Name and value of a ParameterStatus' body.
pub fn parameter(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, rest) = split_cstr(body)?;
    let (value, _) = split_cstr(rest)?;
    Some((name, value))
}

/// The command tag of a CommandComplete.
pub fn tag(body: &[u8]) -> String {
    String::from_utf8_lossy(body.strip_suffix(b"\0").unwrap_or(body)).into_owned()
}

/// One field of an ErrorResponse's or NoticeResponse's body.
pub fn error_field(body: &[u8], wanted: u8) -> Option<&[u8]> {
    error_fields(body)
        .find(|(code, _)| *code == wanted)
        .map(|(_, value)| value)
}

/// The fields of an ErrorResponse's or NoticeResponse's body.
pub fn error_fields(body: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = body;
    std::iter::from_fn(move || {
        let (&code, after) = rest.split_first()?;
        if code == 0 {
            return None;
        }
        let (value, after) = split_cstr(after)?;
        rest = after;
        Some((code, value))
    })
}

/// Whether an error ends the session: its severity is FATAL or PANIC in every language.
pub fn is_fatal(body: &[u8]) -> bool {
    matches!(severity(body), Some(b"FATAL" | b"PANIC"))
}

/// ERROR, WARNING, NOTICE, …: in English, from Postgres 9.6 on.
pub fn severity(body: &[u8]) -> Option<&[u8]> {
    error_field(body, b'V').or_else(|| error_field(body, b'S'))
}

/// `SQLSTATE: message`, for logs and for naming what failed.
pub fn error_text(body: &[u8]) -> String {
    let text = |code| String::from_utf8_lossy(error_field(body, code).unwrap_or_default()).into_owned();
    format!("{} ({})", text(b'M'), text(b'C'))
}

/// Moves an error's position by the characters that stood before the statement, where a Query
/// of several statements was run one by one.
pub fn shift_position(body: &[u8], characters: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 8);
    for (code, value) in error_fields(body) {
        out.push(code);
        let position = std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse::<usize>().ok());
        match position {
            Some(position) if code == b'P' => out.extend_from_slice((position + characters).to_string().as_bytes()),
            _ => out.extend_from_slice(value),
        }
        out.push(0);
    }
    out.push(0);
    out
}

/// The columns of a DataRow's body; `None` inside is SQL's null. A truncated row ends early.
pub fn columns(body: &[u8]) -> impl Iterator<Item = Option<&[u8]>> {
    let mut rest = body.get(2..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let length = i32::from_be_bytes(*length);
        let Ok(length) = usize::try_from(length) else {
            rest = after;
            return Some(None);
        };
        let value = after.get(..length)?;
        rest = &after[length..];
        Some(Some(value))
    })
}

/// The types of a RowDescription's columns, by OID. A truncated one ends early.
pub fn column_types(body: &[u8]) -> impl Iterator<Item = u32> {
    let mut rest = body.get(2..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (_, after) = split_cstr(rest)?;
        // Table and column, the type, its length and modifier, the format.
        let (fixed, after) = after.split_first_chunk::<18>()?;
        rest = after;
        Some(u32::from_be_bytes([fixed[6], fixed[7], fixed[8], fixed[9]]))
    })
}

/// Process id and cancel key of a BackendKeyData's body.
pub fn key_data(body: &[u8]) -> Option<(i32, &[u8])> {
    let (pid, key) = body.split_first_chunk::<4>()?;
    (4..=256).contains(&key.len()).then(|| (i32::from_be_bytes(*pid), key))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ERROR: &[u8] = b"SFEHLER\0VERROR\0C42601\0Msyntax error\0P8\0\0";

    #[test]
    fn errors() {
        assert_eq!(error_field(ERROR, b'C'), Some(&b"42601"[..]));
        assert!(!is_fatal(ERROR));
        assert!(is_fatal(b"VFATAL\0\0"));
        assert!(!is_fatal(b"VFATAL"));
        assert_eq!(error_text(ERROR), "syntax error (42601)");
        assert_eq!(
            shift_position(ERROR, 12),
            b"SFEHLER\0VERROR\0C42601\0Msyntax error\0P20\0\0"
        );
    }

    #[test]
    fn rows() {
        let row = b"\0\x03\0\0\0\x01a\xff\xff\xff\xff\0\0\0\0";
        let read: Vec<_> = columns(row).collect();
        assert_eq!(read, [Some(&b"a"[..]), None, Some(&b""[..])]);
        assert_eq!(columns(b"\0\x01\0\0\0\x09ab").count(), 0);
        assert_eq!(columns(b"").count(), 0);
    }

    #[test]
    fn types_of_columns() {
        let body = b"\0\x02a\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0\
                     b\0\0\0\0\0\0\0\0\0\x40\x01\0\x04\xff\xff\xff\xff\0\0";
        assert_eq!(column_types(body).collect::<Vec<_>>(), [23, 0x4001]);
        assert_eq!(column_types(&body[..body.len() - 1]).count(), 1);
        assert_eq!(column_types(b"").count(), 0);
    }

    #[test]
    fn keys() {
        assert_eq!(key_data(b"\0\0\0\x07abcd"), Some((7, &b"abcd"[..])));
        assert_eq!(key_data(b"\0\0\0\x07abc"), None);
        assert_eq!(key_data(b"\0\0"), None);
    }
}
