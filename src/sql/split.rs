//! Where statements begin and end, byte-exact.
//!
//! A `;` ends a statement unless it stands in parentheses (CREATE RULE … DO (a; b)) or in the
//! BEGIN ATOMIC … END body of a function. Where a text's parentheses do not match, the server
//! refuses it whole, so it does not matter what is made of it here.

use std::ops::Range;

use super::cursor::is_word;
use super::lexer::{LexSettings, Lexer, Token, TokenKind};

/// The statements' spans, without `;`, surrounding blanks and empty statements; and whether the
/// text ends inside a string, quoted name or comment.
pub(super) fn split(text: &[u8], settings: LexSettings) -> (Vec<Range<usize>>, bool) {
    let mut spans = Vec::new();
    let mut unterminated = false;
    let mut current: Option<Range<usize>> = None;
    let mut nesting = Nesting::default();
    for token in Lexer::new(text, settings) {
        unterminated |= !token.complete;
        match token.kind {
            TokenKind::Blank => {}
            TokenKind::Semicolon if nesting.none() => {
                spans.extend(current.take());
                nesting = Nesting::default();
            }
            _ => {
                nesting.see(text, &token);
                let start = current.as_ref().map_or(token.span.start, |span| span.start);
                current = Some(start..token.span.end);
            }
        }
    }
    spans.extend(current);
    (spans, unterminated)
}

/// What encloses the current token within its statement.
#[derive(Default)]
struct Nesting {
    parens: usize,
    /// BEGIN ATOMIC and the CASEs inside it, each ended by END.
    blocks: usize,
    head: Head,
    previous: Previous,
}

/// How far the statement's first words go along CREATE [OR REPLACE] {FUNCTION | PROCEDURE}.
#[derive(Default, Clone, Copy, PartialEq)]
enum Head {
    #[default]
    Start,
    Create,
    Routine,
    Else,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Previous {
    #[default]
    Other,
    Begin,
    /// After AS or a dot, a keyword is a mere name.
    Naming,
}

impl Nesting {
    const fn none(&self) -> bool {
        self.parens == 0 && self.blocks == 0
    }

    fn see(&mut self, text: &[u8], token: &Token) {
        let is = |word| is_word(text, token, word);
        self.head = match self.head {
            Head::Start if is("CREATE") => Head::Create,
            Head::Create if is("OR") || is("REPLACE") => Head::Create,
            Head::Create if is("FUNCTION") || is("PROCEDURE") => Head::Routine,
            Head::Routine => Head::Routine,
            Head::Start | Head::Create | Head::Else => Head::Else,
        };
        match token.kind {
            TokenKind::OpenParen => self.parens += 1,
            TokenKind::CloseParen => self.parens = self.parens.saturating_sub(1),
            TokenKind::Word if self.head == Head::Routine && self.previous != Previous::Naming => {
                if self.blocks > 0 && is("CASE") || self.previous == Previous::Begin && is("ATOMIC") {
                    self.blocks += 1;
                } else if self.blocks > 0 && is("END") {
                    self.blocks -= 1;
                }
            }
            _ => {}
        }
        self.previous = match token.kind {
            TokenKind::Dot => Previous::Naming,
            TokenKind::Word if is("AS") => Previous::Naming,
            TokenKind::Word if is("BEGIN") && self.previous != Previous::Naming => Previous::Begin,
            _ => Previous::Other,
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let (spans, _) = split(text.as_bytes(), LexSettings::default());
        let found: Vec<&str> = spans.into_iter().map(|span| &text[span]).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn statements_of_a_text() {
        check("", &[]);
        check(" ; ;; -- nothing\n", &[]);
        check("select 1", &["select 1"]);
        check(" select 1 ; select 2; ", &["select 1", "select 2"]);
        check(
            "/* a;b */ select ';' ; -- ;\nselect \";\"",
            &["select ';'", "select \";\""],
        );
        check(
            "select $$;$$; select $a$;$$;$a$",
            &["select $$;$$", "select $a$;$$;$a$"],
        );
        check("select E'\\';'; x", &["select E'\\';'", "x"]);
        check("select 'a'\n';' ; x", &["select 'a'\n';'", "x"]);
        check(
            "create rule r as on insert to t do also (insert into a values (1); insert into b values (2)); select 1",
            &[
                "create rule r as on insert to t do also (insert into a values (1); insert into b values (2))",
                "select 1",
            ],
        );
        check("select 'unterminated; select 2", &["select 'unterminated; select 2"]);
    }

    #[test]
    fn bodies_of_sql_functions() {
        let body = "create or replace function f(a int) returns int begin atomic select case when a > 0 then 1 else 2 end; select 3 as end; end";
        check(&format!("{body}; select 1"), &[body, "select 1"]);
        let procedure = "CREATE PROCEDURE p() LANGUAGE sql BEGIN ATOMIC INSERT INTO t VALUES (1); END";
        check(&format!("{procedure} ;begin; end"), &[procedure, "begin", "end"]);
        let plain = "create function f() returns int language sql as 'select 1; select 2'";
        check(&format!("{plain};select 1"), &[plain, "select 1"]);
        check(
            "begin; create table atomic(a int); end",
            &["begin", "create table atomic(a int)", "end"],
        );
    }

    fn gaps_hold_nothing(text: &[u8], settings: LexSettings) {
        let (spans, _) = split(text, settings);
        let mut from = 0;
        for span in spans.iter().cloned().chain(std::iter::once(text.len()..text.len())) {
            assert!(from <= span.start && span.start <= span.end);
            for token in Lexer::new(&text[from..span.start], settings) {
                assert!(
                    matches!(token.kind, TokenKind::Blank | TokenKind::Semicolon),
                    "{:?} lies between statements",
                    String::from_utf8_lossy(&text[from..span.start])
                );
            }
            from = span.end;
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_split_without_loss(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            for encoding in ["UTF8", "SJIS", "GBK"] {
                for standard_conforming_strings in [true, false] {
                    let encoding = super::super::Encoding::of(encoding);
                    gaps_hold_nothing(&text, LexSettings { standard_conforming_strings, encoding });
                }
            }
        }

        #[test]
        fn tokens_cover_the_text(text in "([a-zE$'\"\\\\;()./*\n -]|\\$a\\$|--|/\\*|\\*/|begin atomic|create function|end|case|\u{e4}){0,60}") {
            let mut at = 0;
            for token in Lexer::new(text.as_bytes(), LexSettings::default()) {
                prop_assert_eq!(token.span.start, at);
                prop_assert!(token.span.end > at);
                at = token.span.end;
            }
            prop_assert_eq!(at, text.len());
            gaps_hold_nothing(text.as_bytes(), LexSettings::default());
        }
    }
}
