//! An answer, boiled down while its frames pass: how many rows, which, in what order, of which
//! columns, or which error.
//!
//! Memory stays bounded whatever the size of the answer: rows are hashed as their bytes pass,
//! in any pieces. The hash is not keyed; digests never leave the process.

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use crate::wire::{backend, split_cstr};

/// Types below this have the same OID on every server.
pub(super) const FIRST_CUSTOM_OID: u32 = 16384;
/// What is kept of a RowDescription, ErrorResponse or CommandComplete; 1,600 columns (the
/// server's limit) with long names fit.
const SMALL_BODY_BYTES_MAX: usize = 256 * 1024;
/// Signature, flags and the length of an extension that there never is. The server sends it
/// together with the first row.
const COPY_HEADER_LEN: usize = 19;

/// What an answer was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    pub rows: u64,
    /// Of all rows, whatever their order: equal for equal multisets.
    pub multiset: u128,
    /// Of all rows in their order.
    pub ordered: u128,
    /// Of the columns' names and types, where a RowDescription passed.
    pub columns: Option<u64>,
    /// Of the command tag.
    pub tag: Option<u64>,
    pub sqlstate: Option<[u8; 5]>,
    /// Of the notices' severities, codes and texts, in their order; 0 without any.
    pub notices: u64,
    /// It ended before the last row, at the client's wish: these are the first rows.
    pub suspended: bool,
    /// It was fetched in several parts, so that no tag is that of the whole.
    pub in_parts: bool,
    /// Not an answer that could be repeated (the server asked for data).
    pub partial: bool,
}

impl Digest {
    /// The SQLSTATE as text.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_ref().and_then(|code| std::str::from_utf8(code).ok())
    }

    pub(super) fn add_row(&mut self, row: u128) {
        // An odd factor makes each row's place count; 2^128 / golden ratio spreads it.
        const FACTOR: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
        self.rows += 1;
        self.multiset = self.multiset.wrapping_add(row);
        self.ordered = self.ordered.wrapping_mul(FACTOR).wrapping_add(row);
    }
}

/// Makes a [`Digest`] of the backend frames between a request and its ReadyForQuery (or, in a
/// pipeline, between one Execute's answers). Kept by a session and used again and again.
#[derive(Default)]
pub struct DigestBuilder {
    digest: Digest,
    frame: Frame,
    row: Option<Box<Xxh3>>,
    small: Vec<u8>,
    /// The next data is the first of a COPY in binary.
    binary_copy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Frame {
    #[default]
    Ignored,
    /// The body is hashed as it passes.
    Row,
    /// The same but for a header before the first row of a COPY in binary.
    RowBehind(usize),
    /// The body is gathered, then read.
    Small(u8),
}

impl DigestBuilder {
    /// A frame begins, `kind` being its type byte.
    pub fn begin(&mut self, kind: u8) {
        self.frame = match kind {
            b'D' | b'd' => {
                self.row.get_or_insert_with(|| Box::new(Xxh3::new())).reset();
                match std::mem::take(&mut self.binary_copy) {
                    true => Frame::RowBehind(COPY_HEADER_LEN),
                    false => Frame::Row,
                }
            }
            b'T' | b'C' | b'E' | b'N' | b'H' => {
                self.small.clear();
                Frame::Small(kind)
            }
            // PortalSuspended.
            b's' => {
                self.digest.suspended = true;
                self.digest.in_parts = true;
                Frame::Ignored
            }
            // CopyInResponse, CopyBothResponse.
            b'G' | b'W' => {
                self.digest.partial = true;
                Frame::Ignored
            }
            _ => Frame::Ignored,
        };
    }

    /// The next bytes of the frame's body.
    pub fn piece(&mut self, body: &[u8]) {
        match self.frame {
            Frame::Ignored => {}
            Frame::Row => {
                if let Some(row) = &mut self.row {
                    row.update(body);
                }
            }
            Frame::RowBehind(header) => {
                let skipped = header.min(body.len());
                if let Some(row) = &mut self.row {
                    row.update(&body[skipped..]);
                }
                self.frame = match header - skipped {
                    0 => Frame::Row,
                    left => Frame::RowBehind(left),
                };
            }
            Frame::Small(_) => {
                let room = SMALL_BODY_BYTES_MAX.saturating_sub(self.small.len());
                self.small.extend_from_slice(&body[..body.len().min(room)]);
            }
        }
    }

    /// The frame's body is through.
    pub fn end(&mut self) {
        match std::mem::take(&mut self.frame) {
            Frame::Ignored => {}
            Frame::Row | Frame::RowBehind(_) => {
                if let Some(row) = &self.row {
                    self.digest.add_row(row.digest128());
                }
            }
            Frame::Small(kind) => self.small(kind),
        }
    }

    /// A frame whose body lies whole before the caller, which is by far the most frequent case.
    pub fn frame(&mut self, kind: u8, body: &[u8]) {
        if kind == b'D' {
            self.digest.add_row(xxh3_128(body));
        } else {
            self.begin(kind);
            self.piece(body);
            self.end();
        }
    }

    fn small(&mut self, kind: u8) {
        match kind {
            b'T' => self.digest.columns = Some(columns_hash(&self.small)),
            b'C' => {
                self.digest.suspended = false;
                self.digest.tag = Some(xxh3_64(&self.small));
            }
            b'N' => self.notice(),
            // Its first byte says whether the whole is in binary.
            b'H' => self.binary_copy = self.small.first() == Some(&1),
            _ => {
                let code = backend::error_field(&self.small, b'C').and_then(|code| code.try_into().ok());
                // An error without a readable code is an error all the same.
                self.digest.sqlstate = Some(code.unwrap_or(*b"?????"));
            }
        }
        if self.small.capacity() > 4096 {
            self.small = Vec::new();
        }
    }

    fn notice(&mut self) {
        let mut hash = Xxh3::new();
        hash.update(&self.digest.notices.to_be_bytes());
        for wanted in *b"VCM" {
            hash.update(backend::error_field(&self.small, wanted).unwrap_or_default());
            hash.update(&[0]);
        }
        self.digest.notices = hash.digest();
    }

    /// The digest of what passed, and a fresh start.
    pub fn finish(&mut self) -> Digest {
        self.frame = Frame::Ignored;
        self.binary_copy = false;
        std::mem::take(&mut self.digest)
    }
}

/// A column of a RowDescription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) name: Vec<u8>,
    /// OID of the table and number of the column that it simply is, or zeros.
    pub(super) origin: (u32, i16),
    pub(super) type_oid: u32,
}

/// The columns of a RowDescription's body. A truncated one ends early.
pub(super) fn described_columns(body: &[u8]) -> Vec<Column> {
    let mut rest = body.get(2..).unwrap_or_default();
    let mut columns = Vec::new();
    while let Some((name, after)) = split_cstr(rest)
        && let Some((fields, after)) = after.split_first_chunk::<18>()
    {
        // Table (4), attribute (2), type (4), length (2), modifier (4), format (2).
        let [t, u, v, w, m, n, a, b, c, d, ..] = *fields;
        columns.push(Column {
            name: name.to_owned(),
            origin: (u32::from_be_bytes([t, u, v, w]), i16::from_be_bytes([m, n])),
            type_oid: u32::from_be_bytes([a, b, c, d]),
        });
        rest = after;
    }
    columns
}

/// Names and types; of types with OIDs of their own on each server only that they are such, and
/// no formats (Describe of a statement does not know them).
fn columns_hash(body: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    for column in described_columns(body) {
        hash.update(&column.name);
        let type_oid = if column.type_oid < FIRST_CUSTOM_OID {
            column.type_oid
        } else {
            FIRST_CUSTOM_OID
        };
        hash.update(&[0]);
        hash.update(&type_oid.to_be_bytes());
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(frames: &[(u8, &[u8])]) -> Digest {
        let mut builder = DigestBuilder::default();
        for (kind, body) in frames {
            builder.frame(*kind, body);
        }
        builder.finish()
    }

    #[test]
    fn rows_as_a_multiset_and_in_order() {
        let one = digest(&[(b'D', b"a"), (b'D', b"b"), (b'D', b"b")]);
        let other = digest(&[(b'D', b"b"), (b'D', b"a"), (b'D', b"b")]);
        assert_eq!((one.rows, one.multiset), (3, other.multiset));
        assert_ne!(one.ordered, other.ordered);
        assert_ne!(
            one.multiset,
            digest(&[(b'D', b"a"), (b'D', b"a"), (b'D', b"b")]).multiset
        );
        assert_ne!(one.multiset, digest(&[(b'D', b"a"), (b'D', b"b")]).multiset);
    }

    fn description(columns: &[(&str, u32)]) -> Vec<u8> {
        let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        for (name, type_oid) in columns {
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&[0, 0, 0, 0, 9, 0, 1]);
            body.extend_from_slice(&type_oid.to_be_bytes());
            body.extend_from_slice(&[0, 4, 0xff, 0xff, 0xff, 0xff, 0, 0]);
        }
        body
    }

    #[test]
    fn copies_are_rows_and_a_binary_header_is_none() {
        let text = digest(&[
            (b'H', b"\0\0\x01\0\0"),
            (b'd', b"1\n"),
            (b'd', b"2\n"),
            (b'c', b""),
            (b'C', b"COPY 2\0"),
        ]);
        assert_eq!(text.rows, 2);
        let header = [0_u8; COPY_HEADER_LEN];
        let one = digest(&[(b'H', b"\x01"), (b'd', &[&header[..], b"a"].concat()), (b'd', b"b")]);
        let other = digest(&[(b'H', b"\x01"), (b'd', &[&header[..], b"b"].concat()), (b'd', b"a")]);
        assert_eq!(one.multiset, other.multiset);
        assert_ne!(one.ordered, other.ordered);
    }

    #[test]
    fn notices_by_what_they_say() {
        let of = |message: &str| {
            let body = format!("SHINWEIS\0VNOTICE\0C00000\0M{message}\0\0");
            digest(&[(b'N', body.as_bytes())]).notices
        };
        assert_eq!(of("a"), of("a"));
        assert_ne!(of("a"), of("b"));
        assert_ne!(of("a"), 0);
    }

    #[test]
    fn columns_by_name_and_builtin_type() {
        let of = |columns: &[(&str, u32)]| digest(&[(b'T', &description(columns))]).columns;
        assert_eq!(of(&[("a", 23)]), of(&[("a", 23)]));
        assert_ne!(of(&[("a", 23)]), of(&[("b", 23)]));
        assert_ne!(of(&[("a", 23)]), of(&[("a", 20)]));
        assert_eq!(of(&[("a", 16400)]), of(&[("a", 20001)]));
        assert_ne!(of(&[("a", 16400)]), of(&[("a", 25)]));
        assert_eq!(
            described_columns(&description(&[("a", 23), ("bc", 25)]))[1].type_oid,
            25
        );
        assert_eq!(described_columns(b"\0\x02a\0\0"), []);
    }

    #[test]
    fn errors_tags_and_parts() {
        let failed = digest(&[(b'E', b"SERROR\0C22012\0Mdivision by zero\0\0")]);
        assert_eq!(failed.sqlstate(), Some("22012"));
        assert_eq!(digest(&[(b'E', b"")]).sqlstate(), Some("?????"));
        assert!(digest(&[(b'D', b"a"), (b's', b"")]).suspended);
        let two_parts = digest(&[(b'D', b"a"), (b's', b""), (b'D', b"b"), (b'C', b"SELECT 1\0")]);
        assert!(two_parts.in_parts && !two_parts.suspended && two_parts.rows == 2);
        assert!(digest(&[(b'G', b"")]).partial);
        assert_eq!(
            digest(&[(b'C', b"SELECT 1\0")]).tag,
            digest(&[(b'C', b"SELECT 1\0")]).tag
        );
        assert_eq!(
            digest(&[(b'S', b"a\0b\0"), (b'1', b""), (b'Z', b"I")]),
            Digest::default()
        );
    }

    proptest! {
        #[test]
        fn pieces_are_of_no_consequence(
            frames in prop::collection::vec(
                (prop::sample::select(b"DTCESN".to_vec()), prop::collection::vec(any::<u8>(), 0..600)), 0..20),
            size in 1usize..200,
        ) {
            let whole: Vec<_> = frames.iter().map(|(kind, body)| (*kind, &body[..])).collect();
            let mut builder = DigestBuilder::default();
            for (kind, body) in &frames {
                builder.begin(*kind);
                body.chunks(size).for_each(|piece| builder.piece(piece));
                builder.end();
            }
            prop_assert_eq!(builder.finish(), digest(&whole));
        }
    }
}
