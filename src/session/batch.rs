//! What a client asks at once, as far as it has arrived: a Query, or extended messages up to their
//! Sync. Pure.

use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::frontend;

/// A longer batch is no read of a kind that is worth keeping.
const BATCH_BYTES_MAX: usize = 256 * 1024;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Batch<'a> {
    /// Its end has not arrived.
    More,
    Query {
        len: usize,
        text: &'a [u8],
    },
    /// Kinds and bodies, the Sync left out.
    Extended {
        len: usize,
        frames: Vec<(u8, &'a [u8])>,
    },
    /// Something else, or too long.
    Other,
}

impl<'a> Batch<'a> {
    /// Reads the batch that `bytes` begin with.
    pub(super) fn read(bytes: &'a [u8]) -> Self {
        let mut frames = Vec::new();
        let mut at = 0;
        loop {
            let header = match Header::frontend(&bytes[at..]) {
                Ok(Some(header)) => header,
                // Of some kinds it is clear before the rest of them has come.
                Ok(None) if bytes.get(at).is_none_or(|kind| b"QPBDECS".contains(kind)) => return Self::More,
                Ok(None) | Err(_) => return Self::Other,
            };
            let end = at + header.total;
            if end > BATCH_BYTES_MAX || !b"QPBDECS".contains(&header.kind) || header.kind == b'Q' && at > 0 {
                return Self::Other;
            }
            let Some(body) = bytes.get(at + HEADER_LEN..end) else {
                return Self::More;
            };
            match header.kind {
                b'Q' => {
                    return frontend::query_text(body).map_or(Self::Other, |text| Self::Query { len: end, text });
                }
                b'S' => return Self::Extended { len: end, frames },
                kind => frames.push((kind, body)),
            }
            at = end;
        }
    }

    /// Whether it does without the session's unnamed statement.
    pub(super) fn replaces_unnamed(bytes: &[u8]) -> bool {
        match bytes.first() {
            Some(b'Q') => true,
            // Its name is empty.
            Some(b'P') => bytes.get(HEADER_LEN) == Some(&0),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_and_their_ends() {
        let mut bytes = Vec::new();
        frontend::put_parse(&mut bytes, b"", b"select 1", &[]);
        frontend::put_bind(&mut bytes, b"", b"", &[]);
        frontend::put_execute(&mut bytes, b"");
        bytes.extend_from_slice(frontend::SYNC);
        let len = bytes.len();
        bytes.extend_from_slice(b"Q\0\0\0\x09next\0");
        for end in 0..len {
            assert_eq!(Batch::read(&bytes[..end]), Batch::More, "{end}");
        }
        let Batch::Extended { len: found, frames } = Batch::read(&bytes) else {
            panic!("no batch");
        };
        let kinds: Vec<u8> = frames.iter().map(|(kind, _)| *kind).collect();
        assert_eq!((found, &kinds[..]), (len, &b"PBE"[..]));
        assert_eq!(Batch::read(&bytes[len..]), Batch::Query { len: 10, text: b"next" });
        assert!(Batch::replaces_unnamed(&bytes) && Batch::replaces_unnamed(&bytes[len..]));
        for other in [
            &b"X\0\0\0\x04"[..],
            b"H\0\0\0\x04",
            b"P\0\0\0\x09a\0b\0\0H\0\0\0\x04",
            b"P\0\0\0\x09a\0b\0\0Q\0\0\0\x09next\0",
            b"Q\0\x10\0\0",
            b"z",
        ] {
            assert_eq!(Batch::read(other), Batch::Other, "{other:?}");
        }
        assert!(!Batch::replaces_unnamed(b"P\0\0\0\x09a\0b\0\0\0"));
    }
}
