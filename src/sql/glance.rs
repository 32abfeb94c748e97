//! A first look at a text, without allocating or parsing: most texts need no second one.
//!
//! Applications that spell constants out send every text once; to split and classify each would
//! cost more than relaying it. A session that has no reason to know more than "no schema change,
//! no transaction control, no setting" asks here first.

use super::cursor::is_word;
use super::lexer::{LexSettings, Lexer, TokenKind};

/// What a first look tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glance {
    /// One statement that begins like a query and has no INTO: a read, or a write inside WITH;
    /// of no consequence for the session's state.
    Query,
    /// One INSERT, UPDATE, DELETE or MERGE.
    Dml,
    /// Anything else: [`super::analyze`] tells.
    Unclear,
}

/// Looks at a text.
pub fn glance(text: &[u8], settings: LexSettings) -> Glance {
    let mut tokens = Lexer::new(text, settings).filter(|token| token.kind != TokenKind::Blank);
    let mut nested = false;
    let Some(first) = tokens.find(|token| {
        let opens = token.kind == TokenKind::OpenParen;
        nested |= opens;
        !opens
    }) else {
        return Glance::Unclear;
    };
    let begins = |words: &[&str]| words.iter().any(|word| is_word(text, &first, word));
    let found = if begins(&["SELECT", "WITH", "VALUES", "TABLE"]) {
        Glance::Query
    } else if !nested && begins(&["INSERT", "UPDATE", "DELETE", "MERGE"]) {
        Glance::Dml
    } else {
        return Glance::Unclear;
    };
    let mut ended = false;
    for token in tokens {
        // Another statement, a text that is broken, SELECT INTO, or a setting changed on the way.
        let second = ended && token.kind != TokenKind::Semicolon;
        let into = found == Glance::Query && is_word(text, &token, "INTO");
        if second || !token.complete || into || is_word(text, &token, "set_config") {
            return Glance::Unclear;
        }
        ended |= token.kind == TokenKind::Semicolon;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_looks() {
        use Glance::{Dml, Query, Unclear};
        for (text, expected) in [
            ("select 1", Query),
            (" /* x */ SELECT ';into' ; ", Query),
            ("(select 1) union select 2", Query),
            ("with x as (delete from t returning *) select * from x", Query),
            ("insert into t values (1)", Dml),
            ("update t set a = 1;", Dml),
            ("select 1; select 2", Unclear),
            ("select 1 into t", Unclear),
            ("with x as (select 1) insert into t select * from x", Unclear),
            ("select set_config('a.b', 'c', false)", Unclear),
            ("select 'a", Unclear),
            ("select 1; create table t ()", Unclear),
            ("create table t ()", Unclear),
            ("begin", Unclear),
            ("", Unclear),
            ("(", Unclear),
            // No statement at all: the full look must take such texts for the worst.
            ("( insert ( into", Unclear),
            ("( ( update into", Unclear),
        ] {
            assert_eq!(glance(text.as_bytes(), LexSettings::default()), expected, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_looks_plain_is_no_schema_change(words in proptest::collection::vec(
            proptest::prelude::prop::sample::select(vec![
                "select", "with", "as", "(", ")", "'a'", "t", "insert", "into", "create", "table", ";", "drop",
                "explain", "analyze", "begin", "$$", "--", "\n", "/*", "*/", "E'", "\\", "\"", "set", "update",
            ]),
            0..20,
        )) {
            let text = words.join(" ");
            let looks = glance(text.as_bytes(), LexSettings::default());
            let script = crate::sql::analyze(text.as_bytes());
            if looks != Glance::Unclear {
                proptest::prop_assert!(!script.has_ddl() && script.statements.len() == 1, "{}", text);
            }
        }
    }
}
