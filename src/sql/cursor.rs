//! Walks over a statement's significant tokens by their words.

use super::class::QualifiedName;
use super::lexer::{LexSettings, Lexer, Token, TokenKind};

#[derive(Clone)]
pub(super) struct Cursor<'a> {
    text: &'a [u8],
    lexer: Lexer<'a>,
    peeked: Option<Token>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a [u8], settings: LexSettings) -> Self {
        let mut cursor = Self {
            text,
            lexer: Lexer::new(text, settings),
            peeked: None,
        };
        cursor.next();
        cursor
    }

    /// Takes the next token.
    pub(super) fn next(&mut self) -> Option<Token> {
        let following = self.lexer.find(|token| token.kind != TokenKind::Blank);
        std::mem::replace(&mut self.peeked, following)
    }

    pub(super) fn peek_kind(&self) -> Option<TokenKind> {
        self.peeked.as_ref().map(|token| token.kind)
    }

    pub(super) fn bytes(&self, token: &Token) -> &'a [u8] {
        &self.text[token.span.clone()]
    }

    /// Whether the next token is this keyword.
    pub(super) fn at(&self, word: &str) -> bool {
        self.peeked
            .as_ref()
            .is_some_and(|token| is_word(self.text, token, word))
    }

    /// Whether the next token is one of these keywords.
    pub(super) fn at_any(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.at(word))
    }

    /// Takes this keyword if it is next.
    pub(super) fn eat(&mut self, word: &str) -> bool {
        let found = self.at(word);
        if found {
            self.next();
        }
        found
    }

    /// Takes one of these keywords if it is next.
    pub(super) fn eat_any(&mut self, words: &[&str]) -> bool {
        words.iter().any(|word| self.eat(word))
    }

    pub(super) fn eat_kind(&mut self, kind: TokenKind) -> bool {
        let found = self.peek_kind() == Some(kind);
        if found {
            self.next();
        }
        found
    }

    /// Takes the next token if it is an unquoted word, in upper case.
    pub(super) fn keyword(&mut self) -> Option<String> {
        if self.peek_kind() != Some(TokenKind::Word) {
            return None;
        }
        let token = self.next()?;
        Some(String::from_utf8_lossy(self.bytes(&token)).to_ascii_uppercase())
    }

    /// Takes an identifier.
    pub(super) fn identifier(&mut self) -> Option<String> {
        if !matches!(self.peek_kind()?, TokenKind::Word | TokenKind::QuotedWord) {
            return None;
        }
        let token = self.next()?;
        Some(identifier(self.bytes(&token)))
    }

    /// Takes a possibly qualified name.
    pub(super) fn name(&mut self) -> Option<QualifiedName> {
        let mut name = QualifiedName {
            schema: None,
            name: self.identifier()?,
        };
        while self.eat_kind(TokenKind::Dot) {
            let part = self.identifier()?;
            name.schema = Some(std::mem::replace(&mut name.name, part));
        }
        Some(name)
    }

    /// The text from the next token on.
    pub(super) fn rest(&self) -> &'a [u8] {
        let from = self.peeked.as_ref().map_or(self.text.len(), |token| token.span.start);
        &self.text[from..]
    }

    /// Passes over `( … )` if it is next; what stands between is looked at by `inside`.
    pub(super) fn skip_parens(&mut self, mut inside: impl FnMut(&Token)) {
        if !self.eat_kind(TokenKind::OpenParen) {
            return;
        }
        let mut depth = 1_usize;
        while depth > 0 {
            let Some(token) = self.next() else { return };
            match token.kind {
                TokenKind::OpenParen => depth += 1,
                TokenKind::CloseParen => depth -= 1,
                _ => {}
            }
            if depth > 0 {
                inside(&token);
            }
        }
    }
}

/// Whether the token is this keyword, in any case.
pub(super) fn is_word(text: &[u8], token: &Token, word: &str) -> bool {
    token.kind == TokenKind::Word && text[token.span.clone()].eq_ignore_ascii_case(word.as_bytes())
}

/// The name that an unquoted or quoted identifier stands for.
pub(super) fn identifier(bytes: &[u8]) -> String {
    match bytes {
        [b'"', inner @ .., b'"'] => String::from_utf8_lossy(inner).replace("\"\"", "\""),
        // The server folds more than ASCII only in single-byte encodings of some locales.
        _ => String::from_utf8_lossy(bytes).to_ascii_lowercase(),
    }
}
