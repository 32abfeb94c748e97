//! A statement with its constants removed, so that executions of one statement count together.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use serde::{Serialize, Serializer};
use xxhash_rust::xxh3::xxh3_64;

use super::lexer::{LexSettings, Lexer, TokenKind};

/// A longer text is cut in the log; its id still covers all of it.
const TEXT_BYTES_MAX: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint {
    pub id: FingerprintId,
    /// Words in lower case, `?` for every constant and parameter, single blanks.
    pub text: String,
}

/// Printed as 16 hex digits, everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FingerprintId(pub u64);

impl fmt::Display for FingerprintId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Reads the 16 hex digits.
impl std::str::FromStr for FingerprintId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        u64::from_str_radix(text, 16)
            .ok()
            .filter(|_| digits)
            .map(Self)
            .ok_or_else(|| "a fingerprint has 16 hex digits".to_owned())
    }
}

impl Serialize for FingerprintId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The fingerprint of a text under default settings.
pub fn fingerprint(text: &[u8]) -> Fingerprint {
    fingerprint_as(text, LexSettings::default())
}

pub fn fingerprint_as(text: &[u8], settings: LexSettings) -> Fingerprint {
    let mut out = Vec::with_capacity(text.len().min(TEXT_BYTES_MAX));
    normalize(text, settings, &mut Vec::new(), &mut out);
    let id = FingerprintId(xxh3_64(&out));
    out.truncate(TEXT_BYTES_MAX);
    Fingerprint {
        id,
        text: String::from_utf8_lossy(&out).into_owned(),
    }
}

thread_local! {
    static SCRATCH: RefCell<(Vec<Piece>, Vec<u8>)> = RefCell::default();
}

/// The id alone of [`fingerprint`]; allocates nothing but, once for a thread, room to work in.
pub fn fingerprint_id(text: &[u8]) -> FingerprintId {
    SCRATCH.with_borrow_mut(|(pieces, out)| {
        normalize(text, LexSettings::default(), pieces, out);
        let id = FingerprintId(xxh3_64(out));
        if out.capacity() > SCRATCH_MAX {
            (*pieces, *out) = Default::default();
        }
        id
    })
}

/// Room that a thread keeps for the next text.
const SCRATCH_MAX: usize = 64 * 1024;

fn normalize(text: &[u8], settings: LexSettings, pieces: &mut Vec<Piece>, out: &mut Vec<u8>) {
    pieces.clear();
    out.clear();
    let mut adjacent = false;
    for token in Lexer::new(text, settings) {
        match token.kind {
            TokenKind::Blank => {
                adjacent = false;
                continue;
            }
            TokenKind::String(_) | TokenKind::Number | TokenKind::Parameter => {
                drop_sign(pieces);
                pieces.push(Piece::Constant);
            }
            TokenKind::Word | TokenKind::QuotedWord | TokenKind::UnicodeQuotedWord => {
                pieces.push(Piece::Word(token.span.clone()));
            }
            TokenKind::OpenParen => pieces.push(Piece::Open),
            TokenKind::CloseParen => {
                pieces.push(Piece::Close);
                collapse(text, pieces);
            }
            TokenKind::Symbol => match pieces.last_mut() {
                // Symbols without a blank between them are one operator.
                Some(Piece::Operator(range)) if adjacent => range.end = token.span.end,
                _ => pieces.push(Piece::Operator(token.span.clone())),
            },
            TokenKind::Comma => pieces.push(Piece::Comma),
            TokenKind::Dot => pieces.push(Piece::Dot),
            TokenKind::Semicolon => pieces.push(Piece::Semicolon),
        }
        adjacent = true;
    }
    while pieces.last() == Some(&Piece::Semicolon) {
        pieces.pop();
    }
    write(text, pieces, out);
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Constant,
    /// A list of constants in parentheses, of any length.
    List,
    Word(Range<usize>),
    /// Bytes of the text.
    Operator(Range<usize>),
    Open,
    Close,
    Comma,
    Dot,
    Semicolon,
}

/// `= -1` is a constant with its sign; `a - 1` is not.
fn drop_sign(pieces: &mut Vec<Piece>) {
    if let [.., before, Piece::Operator(operator)] = &pieces[..]
        && operator.len() == 1
        && matches!(before, Piece::Operator(_) | Piece::Open | Piece::Comma)
    {
        pieces.pop();
    }
}

/// Of `IN (1, 2)` and `VALUES (1, 2), (3, 4)` no number of constants remains.
fn collapse(text: &[u8], pieces: &mut Vec<Piece>) {
    let Some(open) = pieces.iter().rposition(|piece| *piece == Piece::Open) else {
        return;
    };
    let inside = &pieces[open + 1..pieces.len() - 1];
    let constants = inside.len() % 2 == 1
        && inside.iter().enumerate().all(|(index, piece)| {
            if index % 2 == 1 {
                *piece == Piece::Comma
            } else {
                matches!(piece, Piece::Constant | Piece::List)
            }
        });
    if !constants {
        return;
    }
    match &pieces[..open] {
        [.., Piece::List, Piece::Comma] => pieces.truncate(open - 1),
        [.., Piece::Open] => {
            pieces.truncate(open);
            pieces.push(Piece::List);
        }
        [.., Piece::Word(word)]
            if text[word.clone()].eq_ignore_ascii_case(b"in") || text[word.clone()].eq_ignore_ascii_case(b"values") =>
        {
            pieces.truncate(open);
            pieces.push(Piece::List);
        }
        _ => {}
    }
}

fn write(text: &[u8], pieces: &[Piece], out: &mut Vec<u8>) {
    let mut glue = true;
    for (index, piece) in pieces.iter().enumerate() {
        let glued_before = match piece {
            Piece::Close | Piece::Comma | Piece::Dot | Piece::Semicolon => true,
            Piece::Open => matches!(index.checked_sub(1).map(|before| &pieces[before]), Some(Piece::Word(_))),
            Piece::Constant | Piece::List | Piece::Word(_) | Piece::Operator(_) => false,
        };
        if !glue && !glued_before {
            out.push(b' ');
        }
        glue = matches!(piece, Piece::Open | Piece::Dot);
        match piece {
            Piece::Constant => out.push(b'?'),
            Piece::List => out.extend_from_slice(b"(...)"),
            Piece::Word(word) => {
                let word = &text[word.clone()];
                if word.contains(&b'"') {
                    out.extend_from_slice(word);
                } else {
                    out.extend(word.iter().map(u8::to_ascii_lowercase));
                }
            }
            Piece::Operator(range) => out.extend_from_slice(&text[range.clone()]),
            Piece::Open => out.push(b'('),
            Piece::Close => out.push(b')'),
            Piece::Comma => out.push(b','),
            Piece::Dot => out.push(b'.'),
            Piece::Semicolon => out.push(b';'),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        assert_eq!(fingerprint(text.as_bytes()).text, expected, "{text}");
    }

    #[test]
    fn constants_blanks_and_case_are_gone() {
        check("SELECT * FROM T where a=1", "select * from t where a = ?");
        check(
            "select  *\n from t /* c */ where a = $1 ;",
            "select * from t where a = ?",
        );
        check("select * from t where a = -1", "select * from t where a = ?");
        check("select a - 1, a->>'x'", "select a - ?, a ->> ?");
        check("select E'a\\'b', $$x$$, 1.5e3, B'01'", "select ?, ?, ?, ?");
        check("select \"A\".b from \"A\"", "select \"A\".b from \"A\"");
        check("select 1; select 2", "select ?; select ?");
    }

    #[test]
    fn lists_collapse() {
        check("select 1 from t where a in (1)", "select ? from t where a in (...)");
        check(
            "select 1 from t where a IN ($1, 'x', 3)",
            "select ? from t where a in (...)",
        );
        check(
            "select 1 from t where (a, b) in ((1,2),(3,4))",
            "select ? from t where(a, b) in (...)",
        );
        check("insert into t values (1,2),(3,4),(5,6)", "insert into t values (...)");
        check("select f(1,2)", "select f(?, ?)");
        check("select a in (select b from c)", "select a in(select b from c)");
    }

    #[test]
    fn ids_are_sixteen_hex_digits() {
        let one = fingerprint(b"select 1");
        assert_eq!(one.id.to_string().len(), 16);
        assert_eq!(one.id, fingerprint(b"SELECT  2").id);
        assert_eq!(one.id, fingerprint_id(b"SELECT  2"));
        assert_eq!(one.id.to_string().parse(), Ok(one.id));
        assert_ne!(one.id, fingerprint(b"select a").id);
    }
}
