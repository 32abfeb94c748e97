//! A read with a wider LIMIT, to find out whether two answers differ only in which rows came.

use std::sync::Arc;

use super::class::{Class, ReadFacts};
use super::classify::classify;
use super::cursor::is_word;
use super::lexer::{LexSettings, Lexer, Token, TokenKind};

/// A read with a wider LIMIT.
#[derive(Debug, PartialEq)]
pub struct Widened {
    pub text: Vec<u8>,
    /// Of the read without any outermost LIMIT.
    pub facts: Arc<ReadFacts>,
}

/// The same read with `rows` instead of its outermost LIMIT and no OFFSET. What they were is
/// still named, so that the parameters in them keep their types. `None` where they do not stand
/// at the text's own level.
pub fn widen_limit(text: &[u8], settings: LexSettings, rows: u32) -> Option<Widened> {
    let tokens: Vec<Token> = Lexer::new(text, settings)
        .filter(|token| token.kind != TokenKind::Blank)
        .collect();
    let mut tokens = &tokens[..];
    while let [before @ .., last] = tokens
        && last.kind == TokenKind::Semicolon
    {
        tokens = before;
    }
    let (mut depth, mut clauses) = (0_usize, Vec::new());
    for (at, token) in tokens.iter().enumerate() {
        match token.kind {
            TokenKind::OpenParen => depth += 1,
            TokenKind::CloseParen => depth = depth.checked_sub(1)?,
            TokenKind::Word if depth == 0 && at > 0 => {
                let before = &tokens[at - 1];
                let named = before.kind == TokenKind::Dot || is_word(text, before, "AS");
                let clause = ["LIMIT", "OFFSET", "FETCH", "FOR"]
                    .into_iter()
                    .find(|word| !named && is_word(text, token, word));
                clauses.extend(clause.map(|clause| (clause, at)));
            }
            _ => {}
        }
    }
    let (_, first) = *clauses.first()?;
    let (mut limit, mut offset) = (None, None);
    for (index, &(clause, at)) in clauses.iter().enumerate() {
        let end = clauses.get(index + 1).map_or(tokens.len(), |&(_, next)| next);
        let mut inside = &tokens[at + 1..end];
        let drop_words = |inside: &mut &[Token], words: &[&str], front: bool| {
            while let Some(token) = if front { inside.first() } else { inside.last() }
                && words.iter().any(|word| is_word(text, token, word))
            {
                *inside = if front {
                    &inside[1..]
                } else {
                    &inside[..inside.len() - 1]
                };
            }
        };
        let place = match clause {
            "LIMIT" => {
                drop_words(&mut inside, &["ALL"], true);
                &mut limit
            }
            "OFFSET" => {
                drop_words(&mut inside, &["ROW", "ROWS"], false);
                &mut offset
            }
            "FETCH" => {
                // WITH TIES leaves nothing open.
                if inside.iter().any(|token| is_word(text, token, "TIES")) {
                    return None;
                }
                drop_words(&mut inside, &["FIRST", "NEXT"], true);
                drop_words(&mut inside, &["ROW", "ROWS", "ONLY"], false);
                &mut limit
            }
            // Locking reads are not asked.
            _ => return None,
        };
        if let (Some(from), Some(to)) = (inside.first(), inside.last()) {
            *place = Some(&text[from.span.start..to.span.end]);
        }
    }
    let unlimited = &text[..tokens[first].span.start];
    let Class::Read(facts) = classify(unlimited, settings) else {
        return None;
    };
    let mut widened = unlimited.to_vec();
    let mut clause = |word: &str, rows: u32, was: Option<&[u8]>| {
        widened.extend_from_slice(format!("{word} {rows}").as_bytes());
        if let Some(was) = was {
            widened.extend_from_slice(b" + 0 * coalesce((");
            widened.extend_from_slice(was);
            widened.extend_from_slice(b")::bigint, 0)");
        }
    };
    clause("limit", rows, limit);
    clause(" offset", 0, offset);
    Some(Widened { text: widened, facts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<&str>) {
        let widened = widen_limit(text.as_bytes(), LexSettings::default(), 9);
        let widened = widened.map(|widened| String::from_utf8(widened.text).unwrap());
        assert_eq!(widened.as_deref(), expected, "{text}");
        if let Some(widened) = expected {
            let script = super::super::analyze(widened.as_bytes());
            assert!(super::super::single_read(&script).is_ok(), "{widened}");
        }
    }

    #[test]
    fn wider_limits() {
        check(
            "select a from t limit $1 offset f(2);",
            Some("select a from t limit 9 + 0 * coalesce(($1)::bigint, 0) offset 0 + 0 * coalesce((f(2))::bigint, 0)"),
        );
        check(
            "select a from t offset 3 rows fetch next 5 rows only",
            Some("select a from t limit 9 + 0 * coalesce((5)::bigint, 0) offset 0 + 0 * coalesce((3)::bigint, 0)"),
        );
        check("select a from t limit all", Some("select a from t limit 9 offset 0"));
        check(
            "select a from t fetch first row only",
            Some("select a from t limit 9 offset 0"),
        );
        check("(select a from t limit 1)", None);
        check("select a from t", None);
        check("select a as limit from t", None);
        check("select a from t order by a fetch first 3 rows with ties", None);
        check("select substring(a from 1 for 2) from t", None);
    }
}
