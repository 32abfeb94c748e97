//! Where frames begin and end in a stream that arrives in arbitrary pieces.
//!
//! A reader presents what it has; [`Header::frontend`] and [`Header::backend`] read a frame's
//! header at its front, and [`Framer`] counts through the bodies that only pass. A reader that
//! wants a body waits until the whole frame lies before it: nothing is copied here.

/// A frame's kind and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    /// Bytes of the whole frame, kind and length field included.
    pub total: usize,
}

/// Kind and length field.
pub const HEADER_LEN: usize = 5;

/// Postgres' `PQ_LARGE_MESSAGE_LIMIT`: what a message with data may have, length field included.
const LARGE_LIMIT: u32 = 0x3fff_fffe;
/// Postgres' `PQ_SMALL_MESSAGE_LIMIT`: what a message without data may have.
const SMALL_LIMIT: u32 = 10_000;

/// Why a stream of frames cannot be followed any further. The texts are Postgres' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("invalid frontend message type {0}")]
    UnknownKind(u8),
    #[error("invalid message length")]
    Length,
}

impl Header {
    /// Reads a client's frame header, or `None` while fewer than five bytes are there.
    ///
    /// # Errors
    /// As Postgres' `SocketBackend`: a kind it does not know, a length that the kind cannot have.
    pub fn frontend(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        let Some(&kind) = bytes.first() else { return Ok(None) };
        let limit = match kind {
            // Query, Parse, Bind, CopyData, FunctionCall, and answers of an authentication.
            b'Q' | b'P' | b'B' | b'd' | b'F' => LARGE_LIMIT,
            // Close, Describe, Execute, Flush, Sync, Terminate, CopyDone, CopyFail.
            b'C' | b'D' | b'E' | b'H' | b'S' | b'X' | b'c' | b'f' => SMALL_LIMIT,
            other => return Err(FrameError::UnknownKind(other)),
        };
        Self::read(bytes, limit)
    }

    /// Reads a server's frame header. The server is believed about its kinds.
    pub fn backend(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        Self::read(bytes, i32::MAX.unsigned_abs())
    }

    fn read(bytes: &[u8], limit: u32) -> Result<Option<Self>, FrameError> {
        let &[kind, a, b, c, d, ..] = bytes else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([a, b, c, d]);
        if length < 4 || length > limit {
            return Err(FrameError::Length);
        }
        Ok(Some(Self {
            kind,
            total: length as usize + 1,
        }))
    }
}

/// Counts through the body of a frame that passes without being looked at.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Framer {
    remaining: usize,
}

impl Framer {
    /// Whether the next byte is a frame's first.
    pub const fn at_boundary(&self) -> bool {
        self.remaining == 0
    }

    /// Lets a frame pass, of which `available` bytes are at hand; returns how many of these
    /// belong to it.
    pub const fn pass(&mut self, header: Header, available: usize) -> usize {
        self.remaining = header.total;
        self.rest(available)
    }

    /// How many of `available` bytes belong to the frame that is passing.
    pub const fn rest(&mut self, available: usize) -> usize {
        let taken = if available < self.remaining {
            available
        } else {
            self.remaining
        };
        self.remaining -= taken;
        taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        crate::wire::put_frame(&mut out, kind, |out| out.extend_from_slice(body));
        out
    }

    #[test]
    fn headers_that_postgres_refuses() {
        use FrameError::{Length, UnknownKind};
        for (bytes, expected) in [
            (&b""[..], Ok(None)),
            (b"Q", Ok(None)),
            (b"Q\0\0\0", Ok(None)),
            (b"Q\0\0\0\x04", Ok(Some(Header { kind: b'Q', total: 5 }))),
            (b"Q\0\0\0\x03", Err(Length)),
            (b"Q\x7f\xff\xff\xff", Err(Length)),
            (b"Q\xff\xff\xff\xff", Err(Length)),
            (
                b"Q\x3f\xff\xff\xfe",
                Ok(Some(Header {
                    kind: b'Q',
                    total: 0x3fff_ffff,
                })),
            ),
            (b"S\0\0\x27\x11", Err(Length)),
            (b"p\0\0\0\x04", Err(UnknownKind(b'p'))),
            (b"\0", Err(UnknownKind(0))),
        ] {
            assert_eq!(Header::frontend(bytes), expected, "{bytes:?}");
        }
    }

    /// What a relay does with chunks: passes small kinds raw, waits for whole frames of the
    /// wanted kind, keeps what it cannot use yet.
    fn relay(chunks: &[Vec<u8>]) -> (Vec<u8>, Vec<Vec<u8>>) {
        let (mut framer, mut pending) = (Framer::default(), Vec::new());
        let (mut passed, mut whole) = (Vec::new(), Vec::new());
        for chunk in chunks {
            pending.extend_from_slice(chunk);
            let mut at = 0;
            while at < pending.len() {
                let rest = &pending[at..];
                let taken = if framer.at_boundary() {
                    match Header::frontend(rest).unwrap() {
                        None => break,
                        Some(header) if header.kind == b'P' => {
                            if rest.len() < header.total {
                                break;
                            }
                            whole.push(rest[..header.total].to_vec());
                            header.total
                        }
                        Some(header) => framer.pass(header, rest.len()),
                    }
                } else {
                    framer.rest(rest.len())
                };
                passed.extend_from_slice(&pending[at..at + taken]);
                at += taken;
            }
            pending.drain(..at);
        }
        assert!(pending.is_empty() && framer.at_boundary());
        (passed, whole)
    }

    proptest! {
        #[test]
        fn every_byte_passes_once_whatever_the_chunks(
            frames in prop::collection::vec(
                (prop::sample::select(b"QPBdSHE".to_vec()), prop::collection::vec(any::<u8>(), 0..200)), 0..30),
            cuts in prop::collection::vec(1usize..97, 1..50),
        ) {
            let frames: Vec<Vec<u8>> = frames.iter().map(|(kind, body)| frame(*kind, body)).collect();
            let stream = frames.concat();
            let mut chunks = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk.to_vec());
                rest = after;
            }
            let (passed, whole) = relay(&chunks);
            prop_assert_eq!(passed, stream);
            let wanted: Vec<Vec<u8>> = frames.into_iter().filter(|frame| frame[0] == b'P').collect();
            prop_assert_eq!(whole, wanted);
        }

        #[test]
        fn headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            Header::frontend(&bytes).ok();
            Header::backend(&bytes).ok();
        }
    }
}
