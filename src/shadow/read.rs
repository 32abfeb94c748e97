//! One read that the primary answered, with all that is needed to ask the secondary the same.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::digest::Digest;
use super::stats::Timing;
use crate::control::{Control, Side};
use crate::sql::{Fingerprint, Script, analyze};
use crate::upstream::Login;

/// A read to be repeated on the secondary.
#[derive(Debug, Clone)]
pub struct ShadowRead {
    /// Of the transaction that the read ran in.
    pub control: Control,
    /// As whom, with the client's startup parameters; shared by all reads of a session.
    pub login: Arc<Login>,
    /// Statements that bring a fresh connection to the session's settings (SET …, SET ROLE …);
    /// shared by all reads until one changes.
    pub settings: Arc<[Bytes]>,
    /// The text as the client sent it, in the client's encoding.
    pub text: Bytes,
    pub analysis: Analysis,
    pub call: Call,
    /// What the primary answered.
    pub digest: Digest,
    /// From the request on.
    pub timing: Timing,
    /// The secondary answered the client; `digest` and `timing` are its own.
    pub canary: bool,
}

/// A text's script. What spells its constants out has a new text each time, which a statement of its
/// kind has told enough about: it is made where it is first asked for, not on the client's thread.
#[derive(Debug, Clone, Default)]
pub struct Analysis(OnceLock<Arc<Script>>);

impl From<Arc<Script>> for Analysis {
    fn from(script: Arc<Script>) -> Self {
        Self(script.into())
    }
}

/// In which form the client asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// By Query.
    Simple,
    /// By Parse, Bind, Execute.
    Extended {
        /// Four bytes for each parameter type that Parse gave.
        parameter_types: Bytes,
        /// Bind's body behind the two names: parameter formats, parameters, result formats.
        bind: Bytes,
    },
    /// By SQL's EXECUTE; the read's text is the statement behind it.
    Prepared {
        name: String,
        /// The PREPARE as the session sent it.
        prepare: Bytes,
        execute: Bytes,
    },
}

impl Call {
    /// What tells one execution from another besides the text.
    pub fn parameters(&self) -> &[u8] {
        match self {
            Self::Simple => &[],
            Self::Extended { bind, .. } => bind,
            Self::Prepared { execute, .. } => execute,
        }
    }
}

impl ShadowRead {
    /// The side that answered the client.
    pub(super) const fn answered_by(&self) -> Side {
        if self.canary {
            self.control.secondary()
        } else {
            self.control.primary
        }
    }

    /// The text's script: exactly one read, unless this text is another thing than its kind.
    pub fn script(&self) -> &Arc<Script> {
        self.analysis.0.get_or_init(|| Arc::new(analyze(&self.text)))
    }

    /// Whether the text itself has been looked at, and not only its kind.
    pub(super) fn is_analysed(&self) -> bool {
        self.analysis.0.get().is_some()
    }

    pub fn fingerprint(&self) -> &Fingerprint {
        self.script().fingerprint(&self.text)
    }

    /// How many rows were fetched where not all were; 0 for all.
    pub(super) const fn first_rows(&self) -> u64 {
        if self.digest.suspended { self.digest.rows } else { 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.text.len() + self.call.parameters().len()
    }
}

/// The pieces of Bind's body behind its two names.
pub struct BindValues<'a> {
    /// 0 for text, 1 for binary; one for all, one for each, or none.
    formats: &'a [u8],
    /// Formats and values as they stand, without the result formats.
    pub without_results: &'a [u8],
    /// Formats of the results: their number, then two bytes each.
    pub results: &'a [u8],
    /// Each with its length before it.
    parameters: &'a [u8],
}

impl<'a> BindValues<'a> {
    /// `None` where the body is truncated, which the primary would have refused.
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (count, rest) = body.split_first_chunk::<2>()?;
        let formats = rest.get(..usize::from(u16::from_be_bytes(*count)) * 2)?;
        let mut rest = &rest[formats.len()..];
        let count;
        (count, rest) = rest.split_first_chunk::<2>().map(|(count, rest)| (*count, rest))?;
        let parameters = rest;
        for _ in 0..u16::from_be_bytes(count) {
            let (length, after) = rest.split_first_chunk::<4>()?;
            // A negative length is a null without bytes.
            let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
            rest = after.get(length..)?;
        }
        Some(Self {
            formats,
            without_results: &body[..body.len() - rest.len()],
            results: rest,
            parameters: &parameters[..parameters.len() - rest.len()],
        })
    }

    /// The bytes of `$number`; `None` where there is no such parameter, or it is null.
    pub(super) fn parameter(&self, number: usize) -> Option<&'a [u8]> {
        let mut rest = self.parameters;
        for at in 1.. {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(i32::from_be_bytes(*length)).ok();
            if at == number {
                return after.get(..length?);
            }
            rest = after.get(length.unwrap_or(0)..)?;
        }
        None
    }

    pub(super) fn any_binary(&self) -> bool {
        self.formats.chunks_exact(2).any(|format| format != [0, 0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_bind() {
        let body = b"\0\x01\0\x01\0\x02\0\0\0\x03abc\xff\xff\xff\xff\0\x01\0\x01";
        let values = BindValues::read(body).unwrap();
        assert!(values.any_binary());
        assert_eq!(values.without_results, &body[..body.len() - 4]);
        assert_eq!(values.results, b"\0\x01\0\x01");
        assert_eq!((values.parameter(1), values.parameter(2)), (Some(&b"abc"[..]), None));
        assert_eq!((values.parameter(0), values.parameter(3)), (None, None));
        let none = BindValues::read(b"\0\0\0\0\0\0").unwrap();
        assert!(!none.any_binary());
        for end in 0..body.len() - 4 {
            assert!(BindValues::read(&body[..end]).is_none(), "{end}");
        }
    }
}
