//! Whether a text is one expression as far as words tell, so that it can stand between parentheses
//! and nothing of it acts outside them. Whether it is an expression at all is for the server to say.

use super::cursor::Cursor;
use super::lexer::{LexSettings, TokenKind};

pub fn is_one_expression(text: &str) -> bool {
    let mut cursor = Cursor::new(text.as_bytes(), LexSettings::default());
    let (mut depth, mut any) = (0_usize, false);
    while let Some(token) = cursor.next() {
        any = true;
        match token.kind {
            TokenKind::Semicolon | TokenKind::Parameter => return false,
            TokenKind::OpenParen => depth += 1,
            TokenKind::CloseParen if depth == 0 => return false,
            TokenKind::CloseParen => depth -= 1,
            _ => {}
        }
    }
    any && depth == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_stand_between_parentheses() {
        for (text, expected) in [
            ("a + 1", true),
            ("upper(a) || ')'", true),
            ("f(g(1), (2))", true),
            ("1) STORED, ADD COLUMN x int GENERATED ALWAYS AS (2", false),
            ("1; DROP TABLE t", false),
            ("';'", true),
            ("(1", false),
            ("$1", false),
            ("", false),
            ("-- nothing", false),
        ] {
            assert_eq!(is_one_expression(text), expected, "{text}");
        }
    }
}
