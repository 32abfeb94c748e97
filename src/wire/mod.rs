//! The bytes of Postgres' protocol, without any I/O: where frames begin and end, the few bodies
//! that must be understood, the frames that the proxy writes itself, and SCRAM.
//!
//! The sessions and the logins drive it. Typed messages of `pgwire` are used for what the proxy
//! says itself; what only passes through is never decoded (its codec is lossy on text that is
//! not UTF-8, and panics on truncated bodies, so lengths are checked here first).

pub mod backend;
pub mod error;
pub mod frame;
pub mod frontend;
pub mod scram;
pub mod startup;
pub mod tracker;

/// Splits a zero-terminated string off the front; `None` where the zero is missing.
pub fn split_cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// Appends one frame: kind, length, and whatever `body` writes.
pub fn put_frame(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    // Frames written here are the proxy's own or hold one statement: far below 2 GiB.
    let length = u32::try_from(out.len() - length_at).unwrap_or(u32::MAX);
    out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends a zero-terminated string.
pub fn put_cstr(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(text);
    out.push(0);
}
