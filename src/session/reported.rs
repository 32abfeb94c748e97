//! What a server last reported of its parameters (ParameterStatus), as the client knows it.

use crate::sql::{Encoding, LexSettings};
use crate::wire::{put_cstr, put_frame, split_cstr};

/// Names and values, zero-terminated, one after the other: a dozen short ones.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Reported(Box<[u8]>);

impl Reported {
    pub(super) fn new<'a>(parameters: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut bytes = Vec::new();
        for (name, value) in parameters {
            put_cstr(&mut bytes, name);
            put_cstr(&mut bytes, value);
        }
        Self(bytes.into())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (name, after) = split_cstr(rest)?;
            let (value, after) = split_cstr(after)?;
            rest = after;
            Some((name, value))
        })
    }

    pub(super) fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    pub(super) fn set(&mut self, name: &[u8], value: &[u8]) {
        let others = self.iter().filter(|(key, _)| *key != name);
        *self = Self::new(others.chain([(name, value)]));
    }

    /// ParameterStatus frames for what is different in `new`.
    pub(super) fn put_differences(&self, new: &Self, out: &mut Vec<u8>) {
        for (name, value) in new.iter() {
            if self.get(name) != Some(value) {
                put_frame(out, b'S', |out| {
                    put_cstr(out, name);
                    put_cstr(out, value);
                });
            }
        }
    }

    /// How the session's texts are to be read.
    pub(super) fn lex(&self) -> LexSettings {
        let text = |name: &[u8]| std::str::from_utf8(self.get(name).unwrap_or_default()).unwrap_or_default();
        LexSettings {
            standard_conforming_strings: text(b"standard_conforming_strings") != "off",
            encoding: Encoding::of(text(b"client_encoding")),
        }
    }

    pub(super) fn is_utf8(&self) -> bool {
        self.get(b"client_encoding") == Some(b"UTF8")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_differences_are_told() {
        let pairs = |pairs: &'static [(&str, &str)]| {
            Reported::new(pairs.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        let mut old = pairs(&[("server_version", "15.1"), ("TimeZone", "UTC")]);
        old.set(b"TimeZone", b"Europe/Paris");
        assert_eq!(old, pairs(&[("server_version", "15.1"), ("TimeZone", "Europe/Paris")]));
        let new = pairs(&[
            ("TimeZone", "Europe/Paris"),
            ("server_version", "18.0"),
            ("search_path", "x"),
        ]);
        let mut out = Vec::new();
        old.put_differences(&new, &mut out);
        assert_eq!(out, b"S\0\0\0\x18server_version\x0018.0\0S\0\0\0\x12search_path\0x\0");
    }
}
