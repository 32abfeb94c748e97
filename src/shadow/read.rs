//! One read that the primary answered, with all that is needed to ask the secondary the same.

use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::digest::Digest;
use super::stats::Timing;
use crate::control::Control;
use crate::sql::{Fingerprint, Script};
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
    /// The text's script: exactly one read.
    pub script: Arc<Script>,
    pub call: Call,
    /// What the primary answered.
    pub digest: Digest,
    /// From the request on.
    pub timing: Timing,
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
}

impl Call {
    /// What tells one execution from another besides the text.
    pub fn parameters(&self) -> &[u8] {
        match self {
            Self::Simple => &[],
            Self::Extended { bind, .. } => bind,
        }
    }
}

impl ShadowRead {
    pub(super) fn fingerprint(&self) -> &Fingerprint {
        self.script.fingerprint(&self.text)
    }

    pub(super) fn bytes(&self) -> usize {
        self.text.len() + self.call.parameters().len()
    }
}

/// Decides by text and parameters, so that the same read is always in the sample or never.
pub(super) fn sample_key(text: &[u8], parameters: &[u8]) -> u64 {
    if parameters.is_empty() {
        xxh3_64(text)
    } else {
        xxh3_64_with_seed(parameters, xxh3_64(text))
    }
}

/// The pieces of Bind's body behind its two names.
pub(super) struct BindValues<'a> {
    /// 0 for text, 1 for binary; one for all, one for each, or none.
    pub(super) formats: &'a [u8],
    /// Formats and values as they stand, without the result formats.
    pub(super) without_results: &'a [u8],
}

impl<'a> BindValues<'a> {
    /// `None` where the body is truncated, which the primary would have refused.
    pub(super) fn read(body: &'a [u8]) -> Option<Self> {
        let (count, rest) = body.split_first_chunk::<2>()?;
        let formats = rest.get(..usize::from(u16::from_be_bytes(*count)) * 2)?;
        let mut rest = &rest[formats.len()..];
        let count;
        (count, rest) = rest.split_first_chunk::<2>().map(|(count, rest)| (*count, rest))?;
        for _ in 0..u16::from_be_bytes(count) {
            let (length, after) = rest.split_first_chunk::<4>()?;
            // A negative length is a null without bytes.
            let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
            rest = after.get(length..)?;
        }
        Some(Self {
            formats,
            without_results: &body[..body.len() - rest.len()],
        })
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
        let none = BindValues::read(b"\0\0\0\0\0\0").unwrap();
        assert!(!none.any_binary());
        for end in 0..body.len() - 4 {
            assert!(BindValues::read(&body[..end]).is_none(), "{end}");
        }
    }
}
