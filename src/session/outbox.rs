//! Bytes on their way out of one end of a session.

use std::io;
use std::ops::Range;
use std::task::{Context, Poll, ready};

use crate::upstream::Stream;

/// What a socket has not taken yet. Its room is given back when it is empty.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    /// The TLS layer may still hold bytes.
    unflushed: bool,
}

impl Outbox {
    /// More to send, behind what is there.
    pub(super) const fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(super) fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Sends what is there; ready when all of it is gone.
    pub(super) fn poll_send(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let written = ready!(stream.poll_write(cx, &self.bytes[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
            self.unflushed = true;
        }
        if !self.bytes.is_empty() {
            self.bytes = Vec::new();
            self.sent = 0;
        }
        if self.unflushed {
            ready!(stream.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends `run` behind what is there: straight from where it lies if nothing is in its way,
    /// and keeps only what the socket does not take.
    pub(super) fn poll_send_run(
        &mut self,
        run: &[u8],
        stream: &mut Stream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let mut rest = run;
        if self.bytes.is_empty() {
            while !rest.is_empty() {
                match stream.poll_write(cx, rest) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(written)) => {
                        self.unflushed = true;
                        rest = &rest[written..];
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => break,
                }
            }
        }
        self.bytes.extend_from_slice(rest);
        self.poll_send(stream, cx)
    }
}

/// Collects what of a chunk goes out. As long as that is one run of the chunk's own bytes, nothing
/// is copied.
pub(super) struct Gather<'c> {
    chunk: &'c [u8],
    run: Range<usize>,
    outbox: Outbox,
}

impl<'c> Gather<'c> {
    pub(super) const fn new(chunk: &'c [u8], outbox: Outbox) -> Self {
        Self {
            chunk,
            run: 0..0,
            outbox,
        }
    }

    pub(super) const fn chunk(&self) -> &'c [u8] {
        self.chunk
    }

    /// Bytes of the chunk go out.
    pub(super) fn keep(&mut self, range: Range<usize>) {
        if self.run.end == range.start {
            self.run.end = range.end;
        } else {
            self.copy_run();
            self.run = range;
        }
    }

    /// Other bytes go out behind what has been kept so far.
    pub(super) fn insert(&mut self) -> &mut Vec<u8> {
        self.copy_run();
        self.outbox.bytes()
    }

    fn copy_run(&mut self) {
        if !self.run.is_empty() {
            self.outbox.bytes().extend_from_slice(&self.chunk[self.run.clone()]);
        }
        self.run = self.run.end..self.run.end;
    }

    /// What goes out last and still lies in the chunk, and what goes before it.
    pub(super) fn finish(self) -> (&'c [u8], Outbox) {
        (&self.chunk[self.run], self.outbox)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_is_not_copied_and_order_is_kept() {
        let mut gather = Gather::new(b"abcdef", Outbox::default());
        gather.keep(0..2);
        gather.keep(2..4);
        let (run, outbox) = gather.finish();
        assert_eq!((run, outbox.unsent()), (&b"abcd"[..], &b""[..]));

        let mut gather = Gather::new(b"abcdef", Outbox::default());
        gather.keep(0..2);
        gather.insert().extend_from_slice(b"--");
        gather.keep(2..3);
        gather.keep(5..6);
        let (run, outbox) = gather.finish();
        assert_eq!((run, outbox.unsent()), (&b"f"[..], &b"ab--c"[..]));
    }
}
