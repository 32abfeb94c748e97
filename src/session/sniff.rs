//! A quick look at a statement's text, to spare most of them a closer one. Errs on one side only:
//! what it calls harmless is.

/// What a text may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sniff {
    /// DDL, so that it must be analyzed in mirroring phases.
    pub ddl: bool,
    /// Something that sets a setting of the session.
    pub setting: bool,
    /// Something that writes rows, as far as its first word tells.
    pub write: bool,
}

/// First words of statements that write no rows (but for functions called in them).
const ROWLESS: &[&[u8]] = &[
    b"select",
    b"values",
    b"table",
    b"begin",
    b"start",
    b"commit",
    b"end",
    b"rollback",
    b"abort",
    b"savepoint",
    b"release",
    b"set",
    b"show",
    b"reset",
    b"fetch",
    b"close",
];

/// First words of statements that are not DDL. SELECT and WITH are not when they hold INTO.
const HARMLESS: &[&[u8]] = &[
    b"select",
    b"insert",
    b"update",
    b"delete",
    b"begin",
    b"commit",
    b"rollback",
    b"set",
    b"show",
    b"with",
    b"values",
    b"table",
    b"merge",
    b"start",
    b"end",
    b"abort",
    b"savepoint",
    b"release",
    b"copy",
    b"fetch",
    b"move",
    b"declare",
    b"close",
    b"listen",
    b"notify",
    b"unlisten",
    b"lock",
    b"deallocate",
    b"prepare",
    b"execute",
    b"truncate",
    b"call",
    b"do",
    b"reset",
    b"discard",
];

pub(super) fn sniff(text: &[u8]) -> Sniff {
    let text = skip_space(text);
    let word = &text[..text.iter().take_while(|byte| byte.is_ascii_alphabetic()).count()];
    let single = !text.iter().position(|&byte| byte == b';').is_some_and(|at| {
        text[at..]
            .iter()
            .any(|byte| *byte != b';' && !byte.is_ascii_whitespace())
    });
    let is = |wanted: &[u8]| word.eq_ignore_ascii_case(wanted);
    let harmless = single
        && (text.is_empty() || HARMLESS.iter().any(|harmless| is(harmless)))
        && !((is(b"select") || is(b"with")) && contains(text, b"into"));
    Sniff {
        ddl: !harmless,
        setting: !single || is(b"set") || is(b"reset") || is(b"discard") || contains(text, b"set_config"),
        write: !harmless || !(text.is_empty() || ROWLESS.iter().any(|rowless| is(rowless))),
    }
}

/// Behind white space and comments.
fn skip_space(mut text: &[u8]) -> &[u8] {
    loop {
        text = text.trim_ascii_start();
        if text.starts_with(b"--") {
            let Some(end) = text.iter().position(|&byte| byte == b'\n') else {
                return &[];
            };
            text = &text[end..];
        } else if text.starts_with(b"/*") {
            // Comments nest.
            let (mut depth, mut at) = (0_usize, 0);
            loop {
                match text.get(at..at + 2) {
                    Some(b"/*") => (depth, at) = (depth + 1, at + 2),
                    Some(b"*/") => (depth, at) = (depth - 1, at + 2),
                    Some(_) => at += 1,
                    None => return &[],
                }
                if depth == 0 {
                    break;
                }
            }
            text = &text[at..];
        } else {
            return text;
        }
    }
}

/// Whether `text` holds `word` (lower case) in any case.
fn contains(text: &[u8], word: &[u8]) -> bool {
    let (first, rest) = (word[0], &word[1..]);
    let mut at = 0;
    while let Some(found) = text[at..].iter().position(|byte| byte.to_ascii_lowercase() == first) {
        at += found + 1;
        if text.len() - at < rest.len() {
            return false;
        }
        if text[at..at + rest.len()].eq_ignore_ascii_case(rest) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_looked_at_more_closely() {
        for (text, ddl, setting, write) in [
            ("select 1", false, false, false),
            ("SELECT 1;", false, false, false),
            (" /* a /* b */ ; */ -- ; create\n select 1 ; ", false, false, false),
            ("select a into b from c", true, false, true),
            ("WITH x AS (SELECT 1) SELECT * INTO y FROM x", true, false, true),
            ("insert into t values (1)", false, false, true),
            ("create table t()", true, false, true),
            ("Drop TABLE t", true, false, true),
            ("explain analyze create table t as select 1", true, false, true),
            ("select 1; create table t()", true, true, true),
            ("select ';x'", true, true, true),
            ("(select 1)", true, false, true),
            ("set work_mem = 1", false, true, false),
            ("select SET_CONFIG('a.b', '1', false)", false, true, false),
            ("begin", false, false, false),
            ("", false, false, false),
            (";", true, false, true),
            ("/* never closed", false, false, false),
            ("-- nothing", false, false, false),
        ] {
            assert_eq!(sniff(text.as_bytes()), Sniff { ddl, setting, write }, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes(text in prop::collection::vec(any::<u8>(), 0..64)) {
            sniff(&text);
        }

        #[test]
        fn comments_and_case_hide_no_ddl(
            space in "( |\n|/\\*x\\*/|--y\n){0,3}", verb in "(create|CREATE|Alter|drop|comment|grant|reindex|refresh)",
        ) {
            let text = [&space, &verb, " x"].concat();
            prop_assert!(sniff(text.as_bytes()).ddl, "{}", text);
        }
    }
}
