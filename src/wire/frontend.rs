//! Bodies of clients' frames that the proxy reads, and the frames it sends to servers itself.
//! Every reader checks lengths: a truncated body gives `None`, and the server is left to say
//! what is wrong with it.

use super::{put_cstr, put_frame, split_cstr};

/// The text of a Query's body.
pub fn query_text(body: &[u8]) -> Option<&[u8]> {
    split_cstr(body).map(|(text, _)| text)
}

/// A Parse's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parse<'a> {
    pub name: &'a [u8],
    pub text: &'a [u8],
    /// Four bytes for each parameter type that the client gave.
    pub types: &'a [u8],
}

impl<'a> Parse<'a> {
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (name, rest) = split_cstr(body)?;
        let (text, rest) = split_cstr(rest)?;
        let (count, types) = rest.split_first_chunk::<2>()?;
        let count = usize::from(u16::from_be_bytes(*count));
        let types = types.get(..count * 4)?;
        Some(Self { name, text, types })
    }
}

/// The names at a Bind's front, and what follows them (formats, values, result formats).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    pub values: &'a [u8],
}

impl<'a> Bind<'a> {
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (portal, rest) = split_cstr(body)?;
        let (statement, values) = split_cstr(rest)?;
        Some(Self {
            portal,
            statement,
            values,
        })
    }
}

/// The portal of an Execute's body.
pub fn execute_portal(body: &[u8]) -> Option<&[u8]> {
    split_cstr(body).map(|(portal, _)| portal)
}

/// What a Close or Describe names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named<'a> {
    Statement(&'a [u8]),
    Portal(&'a [u8]),
}

impl<'a> Named<'a> {
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (&what, rest) = body.split_first()?;
        let (name, _) = split_cstr(rest)?;
        match what {
            b'S' => Some(Self::Statement(name)),
            b'P' => Some(Self::Portal(name)),
            _ => None,
        }
    }
}

pub fn put_query(out: &mut Vec<u8>, text: &[u8]) {
    put_frame(out, b'Q', |out| put_cstr(out, text));
}

/// `types` holds four bytes for each parameter's type OID.
pub fn put_parse(out: &mut Vec<u8>, name: &[u8], text: &[u8], types: &[u8]) {
    put_frame(out, b'P', |out| {
        put_cstr(out, name);
        put_cstr(out, text);
        let count = u16::try_from(types.len() / 4).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        out.extend_from_slice(types);
    });
}

/// Binds text parameters and asks for text results.
pub fn put_bind(out: &mut Vec<u8>, portal: &[u8], statement: &[u8], parameters: &[Option<&[u8]>]) {
    put_frame(out, b'B', |out| {
        put_cstr(out, portal);
        put_cstr(out, statement);
        out.extend_from_slice(&[0, 0]);
        let count = u16::try_from(parameters.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for parameter in parameters {
            match parameter {
                Some(value) => {
                    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
                    out.extend_from_slice(&length.to_be_bytes());
                    out.extend_from_slice(value);
                }
                None => out.extend_from_slice(&[0xff; 4]),
            }
        }
        out.extend_from_slice(&[0, 0]);
    });
}

pub fn put_describe_portal(out: &mut Vec<u8>, portal: &[u8]) {
    put_frame(out, b'D', |out| {
        out.push(b'P');
        put_cstr(out, portal);
    });
}

pub fn put_describe_statement(out: &mut Vec<u8>, name: &[u8]) {
    put_frame(out, b'D', |out| {
        out.push(b'S');
        put_cstr(out, name);
    });
}

pub fn put_execute(out: &mut Vec<u8>, portal: &[u8]) {
    put_execute_rows(out, portal, 0);
}

/// At most so many rows; 0 for all.
pub fn put_execute_rows(out: &mut Vec<u8>, portal: &[u8], rows: u32) {
    put_frame(out, b'E', |out| {
        put_cstr(out, portal);
        out.extend_from_slice(&rows.to_be_bytes());
    });
}

pub fn put_close_statement(out: &mut Vec<u8>, name: &[u8]) {
    put_frame(out, b'C', |out| {
        out.push(b'S');
        put_cstr(out, name);
    });
}

pub fn put_close_portal(out: &mut Vec<u8>, name: &[u8]) {
    put_frame(out, b'C', |out| {
        out.push(b'P');
        put_cstr(out, name);
    });
}

pub const SYNC: &[u8] = b"S\0\0\0\x04";
pub const FLUSH: &[u8] = b"H\0\0\0\x04";
pub const TERMINATE: &[u8] = b"X\0\0\0\x04";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut out = Vec::new();
        put_parse(&mut out, b"s", b"select $1", &25u32.to_be_bytes());
        assert_eq!(
            Parse::read(&out[5..]),
            Some(Parse {
                name: b"s",
                text: b"select $1",
                types: &[0, 0, 0, 25],
            })
        );
        out.clear();
        put_bind(&mut out, b"p", b"s", &[Some(b"x"), None]);
        let bind = Bind::read(&out[5..]).unwrap();
        assert_eq!((bind.portal, bind.statement), (&b"p"[..], &b"s"[..]));
        assert_eq!(bind.values, b"\0\0\0\x02\0\0\0\x01x\xff\xff\xff\xff\0\0");
    }

    #[test]
    fn truncated_bodies_are_none() {
        assert_eq!(query_text(b"select 1"), None);
        assert_eq!(Parse::read(b"s\0select 1\0\0\x02\0\0\0\x01"), None);
        assert_eq!(Parse::read(b"s\0select 1\0\0"), None);
        assert_eq!(Bind::read(b"portal\0statement"), None);
        assert_eq!(Named::read(b""), None);
        assert_eq!(Named::read(b"Xname\0"), None);
        assert_eq!(execute_portal(b""), None);
    }
}
