//! What statements are, decided from their text alone: no I/O, no clock, no catalog but the one
//! handed in.
//!
//! Sessions [`glance`] at a text and ask [`StatementCache`] for its [`Script`]; the shadow reads ask [`shadowable`]
//! and [`fingerprint`]; `pgtandem explain` asks [`explain`]. Splitting and the recognition of
//! DDL stand on our own [`lexer`] and never on what sqlparser can parse; whether a statement is
//! a read is decided by sqlparser's AST, and what it cannot parse is never taken for one.

pub mod lexer;

mod cache;
mod class;
mod classify;
mod comparable;
mod cursor;
mod ddl;
mod explain;
mod expression;
mod fingerprint;
mod glance;
mod limit;
mod read;
mod rehearsable;
mod settings;
mod split;
#[cfg(test)]
mod tests;
mod writes;

pub use cache::StatementCache;
pub use class::{
    Class, CopyFrom, CopyTo, Ddl, DdlKind, Declare, Discard, Execute, Fetch, FetchRows, FunctionUse, NotMirrored,
    OrderKey, Prepare, QualifiedName, ReadFacts, RelationUse, Reset, Script, Set, SetWhat, Statement,
    TransactionControl, Unstable,
};
pub use classify::classify;
pub use comparable::{
    FUNCTIONS_QUERY, FunctionCatalog, FunctionVolatility, NotComparable, RELATIONS_QUERY, RelationKind,
    VOLATILE_OTHERS_QUERY, Volatility, shadowable, single_read,
};
pub use ddl::{Detach, detach, place_for_if_exists};
pub use explain::{CanaryAnswer, CanaryShare, ExplainContext, ExplainedStatement, Explanation, Mirrored, explain};
pub use expression::is_one_expression;
pub use fingerprint::{Fingerprint, FingerprintId, fingerprint, fingerprint_as, fingerprint_id};
pub use glance::{Glance, glance};
pub use lexer::{Encoding, LexSettings};
pub use limit::{Widened, widen_limit};
pub use rehearsable::{LeftOut, Part, REACH_QUERY, Reach, is_steady, part, read_may_matter};
pub use settings::{SettingChange, custom_setting_names, setting_changes};
pub use writes::{Writes, facts_may_write, may_write};

/// Splits and classifies a text under default settings. Any bytes will do.
pub fn analyze(text: &[u8]) -> Script {
    analyze_as(text, LexSettings::default())
}

/// Splits and classifies a text under a session's settings.
pub fn analyze_as(text: &[u8], settings: LexSettings) -> Script {
    let (spans, unterminated) = split::split(text, settings);
    let statements = spans
        .into_iter()
        .map(|span| Statement {
            class: classify(&text[span.clone()], settings),
            span,
        })
        .collect();
    Script::new(statements, unterminated)
}
