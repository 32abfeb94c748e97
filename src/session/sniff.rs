//! A quick look at a statement's text, to spare most of them a closer one. Errs on one side only:
//! what it calls harmless is.

/// What a text may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sniff {
    /// DDL, so that it must be analyzed in mirroring phases.
    pub ddl: bool,
    /// Something that sets a setting of the session.
    pub setting: bool,
    /// Something that writes rows, as far as its words tell.
    pub write: bool,
    /// What a shadow may have to do with it.
    pub word: Word,
    /// It begins a transaction, or says what the open one may do.
    pub access: Option<Access>,
    /// COMMIT PREPARED, ROLLBACK PREPARED.
    pub ends_prepared: bool,
}

impl Sniff {
    /// Whether its runs must be noticed, however often it is run.
    pub(super) fn tells(self) -> bool {
        self.ddl || self.ends_prepared || matches!(self.access, Some(Access::ReadOnly | Access::ReadWrite))
    }
}

/// What a transaction may do (BEGIN, START TRANSACTION, SET TRANSACTION).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    ReadOnly,
    ReadWrite,
    /// What `default_transaction_read_only` says.
    Default,
}

/// The kinds of statements that shadow reads look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// SELECT, WITH, VALUES, TABLE, also in parentheses.
    Read,
    Copy,
    /// DECLARE, FETCH, MOVE, CLOSE.
    Cursor,
    /// PREPARE, EXECUTE, DEALLOCATE, DISCARD.
    Prepared,
    Other,
}

/// First words of statements that write no rows (but for functions called in them, and DML inside
/// WITH).
const ROWLESS: &[&[u8]] = &[
    b"select",
    b"with",
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

/// What writes inside WITH.
const DML: &[&[u8]] = &[b"insert", b"update", b"delete", b"merge"];

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
    let ends_prepared = single && (is(b"commit") || is(b"rollback")) && {
        let next = skip_space(&text[word.len()..]);
        let len = next.iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
        next[..len].eq_ignore_ascii_case(b"prepared")
    };
    let inside = &text[text.iter().take_while(|byte| **byte == b'(').count()..];
    let first = &inside[..inside.iter().take_while(|byte| byte.is_ascii_alphabetic()).count()];
    let first_is = |words: &[&[u8]]| words.iter().any(|wanted| first.eq_ignore_ascii_case(wanted));
    let word = if first_is(&[b"select", b"with", b"values", b"table"]) {
        Word::Read
    } else if first_is(&[b"copy"]) {
        Word::Copy
    } else if first_is(&[b"declare", b"fetch", b"move", b"close"]) {
        Word::Cursor
    } else if first_is(&[b"prepare", b"execute", b"deallocate", b"discard"]) {
        Word::Prepared
    } else {
        Word::Other
    };
    let rowless = text.is_empty() || ROWLESS.iter().any(|rowless| is(rowless)) || word == Word::Read;
    let dml = || (first_is(&[b"with"]) || inside.len() < text.len()) && DML.iter().any(|word| contains(text, word));
    Sniff {
        ddl: !harmless,
        setting: !single || is(b"set") || is(b"reset") || is(b"discard") || contains(text, b"set_config"),
        write: !(harmless || single && word == Word::Read && !contains(text, b"into")) || !rowless || dml(),
        word,
        access: if single { access(text) } else { None },
        ends_prepared,
    }
}

/// Errs towards `None`, which says nothing.
fn access(text: &[u8]) -> Option<Access> {
    let mut words = text
        .split(|byte| !byte.is_ascii_alphabetic())
        .filter(|word| !word.is_empty());
    let first = words.next()?;
    let is = |word: &[u8], wanted: &[u8]| word.eq_ignore_ascii_case(wanted);
    let begins = is(first, b"begin") || is(first, b"start");
    if !(begins || is(first, b"set") && is(words.next()?, b"transaction")) {
        return None;
    }
    if contains(text, b"/*") || contains(text, b"--") {
        return None;
    }
    let mut before: &[u8] = b"";
    for word in words {
        if is(before, b"read") && is(word, b"only") {
            return Some(Access::ReadOnly);
        }
        if is(before, b"read") && is(word, b"write") {
            return Some(Access::ReadWrite);
        }
        before = word;
    }
    begins.then_some(Access::Default)
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
    fn what_ends_a_prepared_transaction() {
        for (text, ends) in [
            ("COMMIT PREPARED 'a'", true),
            (" /* x */ rollback -- y\n Prepared 'a;' ;", false),
            (" /* x */ rollback -- y\n Prepared 'a' ; ", true),
            ("commit prepared 'a'; insert into t values (1)", false),
            ("commit", false),
            ("rollback to prepared", false),
            ("commit preparedness", false),
            ("prepare transaction 'a'", false),
        ] {
            assert_eq!(sniff(text.as_bytes()).ends_prepared, ends, "{text}");
        }
    }

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
            ("(select 1)", true, false, false),
            ("with x as (select 1) select * from x", false, false, false),
            (
                "with x as (delete from t returning 1) select * from x",
                false,
                false,
                true,
            ),
            (
                "(with x as (delete from t returning 1) select * from x)",
                true,
                false,
                true,
            ),
            ("set work_mem = 1", false, true, false),
            ("select SET_CONFIG('a.b', '1', false)", false, true, false),
            ("begin", false, false, false),
            ("", false, false, false),
            (";", true, false, true),
            ("/* never closed", false, false, false),
            ("-- nothing", false, false, false),
        ] {
            let found = sniff(text.as_bytes());
            assert_eq!((found.ddl, found.setting, found.write), (ddl, setting, write), "{text}");
        }
    }

    #[test]
    fn words_that_shadows_look_at() {
        for (text, word) in [
            ("select 1", Word::Read),
            ("((values (1)))", Word::Read),
            ("COPY t to stdout", Word::Copy),
            ("fetch 1 from c", Word::Cursor),
            ("execute p", Word::Prepared),
            ("insert into t values (1)", Word::Other),
            ("", Word::Other),
        ] {
            assert_eq!(sniff(text.as_bytes()).word, word, "{text}");
        }
    }

    #[test]
    fn what_a_transaction_may_do() {
        use Access::{Default, ReadOnly, ReadWrite};
        for (text, access) in [
            ("begin", Some(Default)),
            ("BEGIN READ ONLY", Some(ReadOnly)),
            (
                "start transaction isolation level repeatable read,\n read  only;",
                Some(ReadOnly),
            ),
            (
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
                Some(ReadOnly),
            ),
            ("begin isolation level read committed read write", Some(ReadWrite)),
            ("set transaction isolation level read committed", None),
            ("set transaction read write", Some(ReadWrite)),
            ("set session characteristics as transaction read only", None),
            ("set local a.b = 'transaction read only'", None),
            ("begin /* read only */", None),
            ("begin read only; commit; begin", None),
            ("select 'begin read only'", None),
        ] {
            assert_eq!(sniff(text.as_bytes()).access, access, "{text}");
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
