//! PostgreSQL's lexical rules on raw bytes (`src/backend/parser/scan.l`), without allocation.
//!
//! Everything that decides where a statement ends, or whether it is DDL, stands on this lexer,
//! so that it works in any client encoding and never depends on what sqlparser can parse. It
//! accepts every input: what the server would refuse (an unterminated string) becomes a token
//! that runs to the end of the text.
//!
//! In SJIS, BIG5, GBK, UHC, GB18030 and JOHAB the second byte of a character may look like an
//! ASCII backslash, letter or semicolon; [`Encoding`] makes the lexer step over such characters
//! as a whole. All other client encodings have no ASCII bytes inside characters.

use std::ops::Range;

/// What a session's settings change about the lexical rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LexSettings {
    /// `standard_conforming_strings`: off makes a backslash an escape in plain `'…'`.
    pub standard_conforming_strings: bool,
    pub encoding: Encoding,
}

impl Default for LexSettings {
    fn default() -> Self {
        Self {
            standard_conforming_strings: true,
            encoding: Encoding::AsciiSafe,
        }
    }
}

/// How the bytes of one character are told from ASCII.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Encoding {
    /// Bytes below 0x80 are ASCII wherever they stand: UTF8, LATINn, EUC_*, WIN*, …
    #[default]
    AsciiSafe,
    /// A byte from 0x80 takes the next one with it: BIG5, GBK, UHC, JOHAB, and GB18030, whose
    /// characters of four bytes are two such pairs.
    Pairs,
    /// As [`Encoding::Pairs`], but half-width katakana are single bytes: SJIS, SHIFT_JIS_2004.
    Sjis,
}

impl Encoding {
    /// By the name the server reports in `client_encoding`.
    pub fn of(client_encoding: &str) -> Self {
        let name: String = client_encoding
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .map(|c| c.to_ascii_uppercase())
            .collect();
        match name.as_str() {
            "SJIS" | "SHIFTJIS" | "SHIFTJIS2004" | "MSKANJI" | "WIN932" | "WINDOWS932" => Self::Sjis,
            "BIG5" | "GBK" | "UHC" | "GB18030" | "JOHAB" | "WIN936" | "WIN949" | "WIN950" | "WINDOWS936"
            | "WINDOWS949" | "WINDOWS950" => Self::Pairs,
            _ => Self::AsciiSafe,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// White space and comments; nothing to the grammar.
    Blank,
    /// A keyword or an unquoted identifier.
    Word,
    /// `"…"`
    QuotedWord,
    /// `U&"…"`, left undecoded.
    UnicodeQuotedWord,
    String(StringKind),
    Number,
    /// `$1`
    Parameter,
    Semicolon,
    OpenParen,
    CloseParen,
    Comma,
    Dot,
    /// One byte of an operator or any other punctuation.
    Symbol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StringKind {
    /// `'…'`, `N'…'`
    Plain,
    /// `E'…'`
    Escape,
    /// `U&'…'`
    Unicode,
    /// `B'…'`
    Bit,
    /// `X'…'`
    Hex,
    /// `$tag$…$tag$`
    Dollar,
}

/// A piece of the text; the pieces follow each other without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub kind: TokenKind,
    pub span: Range<usize>,
    /// False when the text ended inside the string, quoted word or comment.
    pub complete: bool,
}

/// Iterates over the tokens of a text, blanks included.
#[derive(Debug, Clone)]
pub struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    settings: LexSettings,
}

impl<'a> Lexer<'a> {
    pub const fn new(text: &'a [u8], settings: LexSettings) -> Self {
        Self { text, at: 0, settings }
    }

    /// The same without blanks.
    pub fn significant(self) -> impl Iterator<Item = Token> + Clone + use<'a> {
        self.filter(|token| token.kind != TokenKind::Blank)
    }

    fn peek(&self, ahead: usize) -> u8 {
        // The protocol cannot carry a NUL inside a text, so NUL may stand for the end.
        self.text.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// Past the character at `at`.
    fn step(&self, at: usize) -> usize {
        let byte = self.text[at];
        let double = match self.settings.encoding {
            Encoding::AsciiSafe => false,
            Encoding::Pairs => byte >= 0x80,
            Encoding::Sjis => byte >= 0x80 && !(0xa0..=0xdf).contains(&byte),
        };
        (at + if double { 2 } else { 1 }).min(self.text.len())
    }

    fn while_matches(&self, mut at: usize, matches: impl Fn(u8) -> bool) -> usize {
        while at < self.text.len() && matches(self.text[at]) {
            at = self.step(at);
        }
        at
    }

    /// Past the closing quote of a body that begins at `at`, or the end of the text.
    fn quoted(&self, mut at: usize, quote: u8, backslash: bool) -> (usize, bool) {
        while at < self.text.len() {
            let byte = self.text[at];
            if backslash && byte == b'\\' {
                at = self.step(at);
                if at < self.text.len() {
                    at = self.step(at);
                }
            } else if byte == quote {
                if self.text.get(at + 1) == Some(&quote) {
                    at += 2;
                } else {
                    return (at + 1, true);
                }
            } else {
                at = self.step(at);
            }
        }
        (at, false)
    }

    /// A string constant whose first body byte is at `at`, with the pieces that follow it on
    /// later lines: `'a'` newline `'b'` is one constant, lexed as it began.
    fn string(&self, at: usize, backslash: bool) -> (usize, bool) {
        let (mut end, mut complete) = self.quoted(at, b'\'', backslash);
        while complete && let Some(next) = self.continued(end) {
            (end, complete) = self.quoted(next, b'\'', backslash);
        }
        (end, complete)
    }

    /// Past the quote that continues a string constant that ended at `at`.
    fn continued(&self, mut at: usize) -> Option<usize> {
        let mut newline = false;
        loop {
            match self.text.get(at)? {
                b'\n' | b'\r' => {
                    newline = true;
                    at += 1;
                }
                b' ' | b'\t' | 0x0b | 0x0c => at += 1,
                b'-' if self.text.get(at + 1) == Some(&b'-') => at = self.line_comment(at),
                b'\'' if newline => return Some(at + 1),
                _ => return None,
            }
        }
    }

    /// To the newline that ends the comment at `at`, not past it.
    fn line_comment(&self, at: usize) -> usize {
        self.while_matches(at, |byte| byte != b'\n' && byte != b'\r')
    }

    fn block_comment(&self, mut at: usize) -> (usize, bool) {
        let mut depth = 0_usize;
        while at < self.text.len() {
            match (self.text[at], self.text.get(at + 1)) {
                (b'/', Some(b'*')) => {
                    depth += 1;
                    at += 2;
                }
                (b'*', Some(b'/')) => {
                    depth -= 1;
                    at += 2;
                    if depth == 0 {
                        return (at, true);
                    }
                }
                _ => at = self.step(at),
            }
        }
        (at, false)
    }

    fn blank(&self) -> Option<(usize, bool)> {
        let start = self.at;
        match (self.peek(0), self.peek(1)) {
            (b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, _) => Some((
                self.while_matches(start, |byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)),
                true,
            )),
            (b'-', b'-') => Some((self.line_comment(start), true)),
            (b'/', b'*') => Some(self.block_comment(start)),
            _ => None,
        }
    }

    /// `$tag$…$tag$`, where a tag begins at the current byte.
    fn dollar_string(&self) -> Option<(usize, bool)> {
        let start = self.at;
        let tag_end = match self.peek(1) {
            b'$' => start + 1,
            byte if is_word_start(byte) => {
                self.while_matches(start + 1, |byte| is_word_start(byte) || byte.is_ascii_digit())
            }
            _ => return None,
        };
        if self.text.get(tag_end) != Some(&b'$') {
            return None;
        }
        let delimiter = &self.text[start..=tag_end];
        let mut at = tag_end + 1;
        while let Some(offset) = self.text[at..].iter().position(|&byte| byte == b'$') {
            at += offset;
            if self.text[at..].starts_with(delimiter) {
                return Some((at + delimiter.len(), true));
            }
            at += 1;
        }
        Some((self.text.len(), false))
    }

    fn number(&self) -> usize {
        let digits = |at| self.while_matches(at, |byte| byte.is_ascii_digit() || byte == b'_');
        let start = self.at;
        if self.peek(0) == b'0' && matches!(self.peek(1) | 0x20, b'x' | b'o' | b'b') {
            let end = self.while_matches(start + 2, |byte| byte.is_ascii_hexdigit() || byte == b'_');
            if end > start + 2 {
                return end;
            }
        }
        let mut at = digits(start);
        if self.text.get(at) == Some(&b'.') && self.text.get(at + 1) != Some(&b'.') {
            at = digits(at + 1);
        }
        if self.text.get(at).is_some_and(|byte| byte | 0x20 == b'e') {
            let sign = usize::from(matches!(self.text.get(at + 1), Some(b'+' | b'-')));
            let end = digits(at + 1 + sign);
            if end > at + 1 + sign {
                return end;
            }
        }
        at
    }
}

impl Iterator for Lexer<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        use TokenKind as Kind;
        let start = self.at;
        let first = *self.text.get(start)?;
        let escapes = !self.settings.standard_conforming_strings;
        let (kind, (end, complete)) = if let Some(blank) = self.blank() {
            (Kind::Blank, blank)
        } else {
            match (first, self.peek(1), self.peek(2)) {
                (b'\'', ..) => (Kind::String(StringKind::Plain), self.string(start + 1, escapes)),
                (b'e' | b'E', b'\'', _) => (Kind::String(StringKind::Escape), self.string(start + 2, true)),
                (b'b' | b'B', b'\'', _) => (Kind::String(StringKind::Bit), self.string(start + 2, false)),
                (b'x' | b'X', b'\'', _) => (Kind::String(StringKind::Hex), self.string(start + 2, false)),
                // The server yields the keyword NCHAR and lexes the rest as a plain constant.
                (b'n' | b'N', b'\'', _) => (Kind::String(StringKind::Plain), self.string(start + 2, escapes)),
                (b'u' | b'U', b'&', b'\'') => (Kind::String(StringKind::Unicode), self.string(start + 3, false)),
                (b'u' | b'U', b'&', b'"') => (Kind::UnicodeQuotedWord, self.quoted(start + 3, b'"', false)),
                (b'"', ..) => (Kind::QuotedWord, self.quoted(start + 1, b'"', false)),
                (b'$', digit, _) if digit.is_ascii_digit() => (
                    Kind::Parameter,
                    (self.while_matches(start + 1, |byte| byte.is_ascii_digit()), true),
                ),
                (b'$', ..) => match self.dollar_string() {
                    Some(end) => (Kind::String(StringKind::Dollar), end),
                    None => (Kind::Symbol, (start + 1, true)),
                },
                (b';', ..) => (Kind::Semicolon, (start + 1, true)),
                (b'(', ..) => (Kind::OpenParen, (start + 1, true)),
                (b')', ..) => (Kind::CloseParen, (start + 1, true)),
                (b',', ..) => (Kind::Comma, (start + 1, true)),
                (b'.', digit, _) if digit.is_ascii_digit() => (Kind::Number, (self.number(), true)),
                (b'.', ..) => (Kind::Dot, (start + 1, true)),
                (byte, ..) if byte.is_ascii_digit() => (Kind::Number, (self.number(), true)),
                (byte, ..) if is_word_start(byte) => {
                    let end = self.while_matches(start, |byte| {
                        is_word_start(byte) || byte.is_ascii_digit() || byte == b'$'
                    });
                    (Kind::Word, (end, true))
                }
                _ => (Kind::Symbol, (start + 1, true)),
            }
        };
        self.at = end;
        Some(Token {
            kind,
            span: start..end,
            complete,
        })
    }
}

const fn is_word_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &[u8], settings: LexSettings) -> Vec<(TokenKind, String)> {
        Lexer::new(text, settings)
            .significant()
            .map(|token| {
                (
                    token.kind,
                    String::from_utf8_lossy(&text[token.span.clone()]).into_owned(),
                )
            })
            .collect()
    }

    fn check(text: &str, expected: &[(TokenKind, &str)]) {
        let found = kinds(text.as_bytes(), LexSettings::default());
        let expected: Vec<_> = expected.iter().map(|&(kind, text)| (kind, text.to_owned())).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn strings_of_every_kind() {
        use TokenKind::{Number, Parameter, QuotedWord, String as Str, Symbol, UnicodeQuotedWord, Word};
        check("'a''b'", &[(Str(StringKind::Plain), "'a''b'")]);
        check(r"'a\' b", &[(Str(StringKind::Plain), r"'a\'"), (Word, "b")]);
        check(r"E'a\' b'", &[(Str(StringKind::Escape), r"E'a\' b'")]);
        check("'a'\n  'b'", &[(Str(StringKind::Plain), "'a'\n  'b'")]);
        check(
            "'a'  'b'",
            &[(Str(StringKind::Plain), "'a'"), (Str(StringKind::Plain), "'b'")],
        );
        check("E'a' -- c\n '\\''", &[(Str(StringKind::Escape), "E'a' -- c\n '\\''")]);
        check("U&'x\\0041'", &[(Str(StringKind::Unicode), "U&'x\\0041'")]);
        check("U&\"x\"", &[(UnicodeQuotedWord, "U&\"x\"")]);
        check(
            "u & 'x'",
            &[(Word, "u"), (Symbol, "&"), (Str(StringKind::Plain), "'x'")],
        );
        check(
            "B'01' x'1F'",
            &[(Str(StringKind::Bit), "B'01'"), (Str(StringKind::Hex), "x'1F'")],
        );
        check("$$a;'b$$", &[(Str(StringKind::Dollar), "$$a;'b$$")]);
        check("$a$ $b$ $$ $a$", &[(Str(StringKind::Dollar), "$a$ $b$ $$ $a$")]);
        check(
            "$a$b$a$$a$c$a$",
            &[
                (Str(StringKind::Dollar), "$a$b$a$"),
                (Str(StringKind::Dollar), "$a$c$a$"),
            ],
        );
        check("a$b$c$b$", &[(Word, "a$b$c$b$")]);
        check("$1$x$;$x$", &[(Parameter, "$1"), (Str(StringKind::Dollar), "$x$;$x$")]);
        check("fooE'a'", &[(Word, "fooE"), (Str(StringKind::Plain), "'a'")]);
        check("\"a\"\"b;\"", &[(QuotedWord, "\"a\"\"b;\"")]);
        check(
            "1.5e-3 0x1F .5 1_000",
            &[(Number, "1.5e-3"), (Number, "0x1F"), (Number, ".5"), (Number, "1_000")],
        );
    }

    #[test]
    fn comments_are_blank() {
        use TokenKind::{Symbol, Word};
        check(
            "a /* b /* c */ ; */ d -- e\n f",
            &[(Word, "a"), (Word, "d"), (Word, "f")],
        );
        check("a*/*x*/b", &[(Word, "a"), (Symbol, "*"), (Word, "b")]);
        check("a--b", &[(Word, "a")]);
    }

    #[test]
    fn backslashes_without_standard_conforming_strings() {
        let old = LexSettings {
            standard_conforming_strings: false,
            ..LexSettings::default()
        };
        assert_eq!(
            kinds(br"'a\' b'", old),
            [(TokenKind::String(StringKind::Plain), r"'a\' b'".into())]
        );
    }

    #[test]
    fn trailing_bytes_that_look_like_ascii() {
        // In SJIS, 0x95 0x5c is one character (表) that ends in what looks like a backslash.
        let text = b"E'\x95\x5c' ; x";
        let sjis = LexSettings {
            encoding: Encoding::of("SJIS"),
            ..LexSettings::default()
        };
        assert_eq!(kinds(text, sjis).len(), 3);
        // Half-width katakana is one byte: the backslash after it escapes.
        assert_eq!(kinds(b"E'\xb1\\' ; x'", sjis).len(), 1);
        let gbk = LexSettings {
            encoding: Encoding::of("gbk"),
            ..LexSettings::default()
        };
        assert_eq!(kinds(b"E'\xb1\\' ; x", gbk).len(), 3);
    }

    #[test]
    fn unterminated_pieces_run_to_the_end() {
        for text in ["'abc", "E'abc\\", "\"abc", "/* abc", "$x$ abc", "U&'a", "'a'\n'b"] {
            let tokens: Vec<_> = Lexer::new(text.as_bytes(), LexSettings::default()).collect();
            assert_eq!(tokens.len(), 1, "{text}");
            assert!(!tokens[0].complete, "{text}");
        }
    }
}
