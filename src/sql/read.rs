//! Decides by sqlparser's AST whether a query is a read, and collects what it uses.
//!
//! sqlparser never sees the statement itself but a plain rendering of our own tokens: constants
//! are replaced, comments dropped, TABLE t written out. So it cannot disagree with the server
//! about where a constant ends, needs no client encoding, and what a constant holds costs it
//! nothing. What it cannot parse is not a read.

use std::collections::HashSet;
use std::ops::ControlFlow;

use sqlparser::ast::{
    DataType, Distinct, Expr, Function, FunctionArgumentClause, FunctionArguments, Ident, ObjectName, OrderByKind,
    Query as AstQuery, Select, SetExpr, Statement, TableFactor, Value, Visit, Visitor, WindowType,
};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::{Parser, ParserError};

use super::class::{FunctionUse, OrderKey, QualifiedName, ReadFacts, RelationUse, Unstable};
use super::classify::plain_string;
use super::cursor::is_word;
use super::lexer::{LexSettings, Lexer, StringKind, TokenKind};

/// A longer rendering (constants do not count) is not parsed: time and memory stay bounded.
const RENDERED_BYTES_MAX: usize = 128 * 1024;
/// Long chains of operators become trees as deep as the chain, whose destructors recurse.
const OPERATORS_MAX: usize = 1500;
/// sqlparser backtracks over parentheses; real statements stay far below.
const PARENS_MAX: usize = 40;
const RECURSION_MAX: usize = 60;
/// As deep as a thread's own stack surely bears, at some 50 kB a level in debug builds.
const RECURSION_SHALLOW: usize = 16;
/// Room for [`RECURSION_MAX`]; only touched pages cost memory.
const DEEP_STACK_BYTES: usize = 32 * 1024 * 1024;

pub(super) enum Query {
    Read(ReadFacts),
    /// DML in WITH or at the top.
    Write,
    /// A read that locks rows: the server does not let read-only transactions do that.
    Locking(ReadFacts),
    NotUnderstood,
}

pub(super) fn read(statement: &[u8], settings: LexSettings) -> Query {
    let mut facts = ReadFacts::default();
    let Some(rendered) = render(statement, settings, &mut facts) else {
        return Query::NotUnderstood;
    };
    match collect(&rendered, facts, RECURSION_SHALLOW) {
        Err((facts, ParserError::RecursionLimitExceeded)) => {
            // sqlparser's own guard against deep stacks leaves less room than its frames take.
            let deep = || collect(&rendered, facts, RECURSION_MAX);
            stacker::grow(DEEP_STACK_BYTES, deep).unwrap_or(Query::NotUnderstood)
        }
        read => read.unwrap_or(Query::NotUnderstood),
    }
}

/// Parses and walks over the tree; gives the facts back where it cannot be parsed.
fn collect(rendered: &str, facts: ReadFacts, recursion_max: usize) -> Result<Query, (ReadFacts, ParserError)> {
    let parsed = Parser::new(&PostgreSqlDialect {})
        .with_recursion_limit(recursion_max)
        .try_with_sql(rendered)
        .and_then(|mut parser| parser.parse_statements());
    let statements = match parsed {
        Ok(statements) => statements,
        Err(error) => return Err((facts, error)),
    };
    let [Statement::Query(query)] = &statements[..] else {
        return Ok(Query::NotUnderstood);
    };
    let mut collector = Collector {
        facts,
        ctes: HashSet::new(),
        ordered_input: Vec::new(),
    };
    if query.visit(&mut collector).is_break() {
        return Ok(Query::Write);
    }
    let mut facts = collector.facts;
    (facts.ordered, facts.limited) = top_level(query);
    facts.order_keys = order_keys(query);
    for relation in &mut facts.relations {
        relation.perhaps_cte = relation.name.schema.is_none() && collector.ctes.contains(&relation.name.name);
    }
    Ok(if facts.locks {
        Query::Locking(facts)
    } else {
        Query::Read(facts)
    })
}

/// The statement as sqlparser shall see it; facts that tokens tell are noted on the way.
fn render(statement: &[u8], settings: LexSettings, facts: &mut ReadFacts) -> Option<String> {
    let mut rendered = String::with_capacity(statement.len().min(4096));
    let (mut operators, mut depth) = (0_usize, 0_usize);
    // What the token before means for this one: a name after AS or a dot is a mere label, ONLY
    // after FROM, JOIN, a comma or a parenthesis is that of inheritance.
    let (mut naming, mut from_item, mut unicode) = (false, false, false);
    let mut symbol_end = usize::MAX;
    let mut tokens = Lexer::new(statement, settings);
    while let Some(token) = tokens.next() {
        let bytes = &statement[token.span.clone()];
        if !token.complete {
            return None;
        }
        let is = |word| is_word(statement, &token, word);
        match token.kind {
            TokenKind::Blank => {
                rendered.push(' ');
                continue;
            }
            TokenKind::String(kind) => {
                if let Some(value) = plain_string(token.kind, bytes) {
                    facts.clock |= is_clock_constant(&value);
                }
                rendered.push_str(match kind {
                    StringKind::Bit => "B'0'",
                    StringKind::Hex => "X'0'",
                    StringKind::Plain | StringKind::Escape | StringKind::Unicode | StringKind::Dollar => "'s'",
                });
                if kind == StringKind::Unicode {
                    unicode = true;
                    continue;
                }
            }
            TokenKind::Word if unicode && is("UESCAPE") => {
                // UESCAPE 'c' belongs to the constant before it.
                tokens.by_ref().find(|token| token.kind != TokenKind::Blank)?;
                unicode = false;
                continue;
            }
            TokenKind::Word if is("ONLY") && from_item => continue,
            TokenKind::Word if is("TABLE") && !naming => rendered.push_str("SELECT * FROM"),
            TokenKind::Word | TokenKind::QuotedWord => {
                let text = String::from_utf8_lossy(bytes);
                if text.contains(char::REPLACEMENT_CHARACTER) {
                    facts.undecoded_names = true;
                }
                if token.kind == TokenKind::Word && !naming {
                    let word = text.to_ascii_lowercase();
                    facts.clock |= CLOCK_WORDS.contains(&word.as_str());
                    facts.session |= SESSION_WORDS.contains(&word.as_str());
                    operators += usize::from(CHAINING_WORDS.contains(&word.as_str()));
                }
                rendered.push_str(&text);
            }
            TokenKind::UnicodeQuotedWord => {
                facts.undecoded_names = true;
                rendered.push_str("\"u\"");
            }
            // Short whole numbers may be positions in ORDER BY; no other number tells anything.
            TokenKind::Number if bytes.len() <= 4 && bytes.iter().all(u8::is_ascii_digit) => {
                rendered.push(' ');
                rendered.extend(bytes.iter().map(|&digit| char::from(digit)));
            }
            TokenKind::Number => rendered.push_str(" 1"),
            TokenKind::OpenParen => {
                depth += 1;
                rendered.push('(');
            }
            TokenKind::CloseParen => {
                depth = depth.checked_sub(1)?;
                rendered.push(')');
            }
            TokenKind::Symbol => {
                operators += 1;
                // Symbols without a blank between them are one operator.
                match facts.operators.last_mut().filter(|_| symbol_end == token.span.start) {
                    Some(operator) => operator.push_str(std::str::from_utf8(bytes).ok()?),
                    None => facts.operators.push(std::str::from_utf8(bytes).ok()?.to_owned()),
                }
                symbol_end = token.span.end;
                rendered.push_str(std::str::from_utf8(bytes).ok()?);
            }
            TokenKind::Parameter | TokenKind::Semicolon | TokenKind::Comma | TokenKind::Dot => {
                operators += usize::from(token.kind == TokenKind::Dot);
                rendered.push_str(std::str::from_utf8(bytes).ok()?);
            }
        }
        if depth > PARENS_MAX || operators > OPERATORS_MAX || rendered.len() > RENDERED_BYTES_MAX {
            return None;
        }
        naming = token.kind == TokenKind::Dot || is("AS");
        from_item = matches!(token.kind, TokenKind::Comma | TokenKind::OpenParen) || is("FROM") || is("JOIN");
        unicode = false;
    }
    facts.operators.sort_unstable();
    facts.operators.dedup();
    Some(rendered)
}

/// Reserved words of the server that stand for the time.
const CLOCK_WORDS: &[&str] = &[
    "current_timestamp",
    "current_date",
    "current_time",
    "localtime",
    "localtimestamp",
];

/// Reserved words of the server that stand for who is asking, and where.
const SESSION_WORDS: &[&str] = &[
    "current_user",
    "session_user",
    "system_user",
    "user",
    "current_role",
    "current_catalog",
    "current_schema",
];

/// Words that chain expressions or queries to trees as deep as the chain.
const CHAINING_WORDS: &[&str] = &[
    "and",
    "or",
    "union",
    "except",
    "intersect",
    "is",
    "isnull",
    "notnull",
    "like",
    "ilike",
    "similar",
    "collate",
    "at",
    "between",
    "in",
];

/// `'now'::timestamptz` and the like: constants that the server reads its clock for.
fn is_clock_constant(value: &str) -> bool {
    let value = value.trim();
    value.len() <= 9
        && ["now", "today", "tomorrow", "yesterday"]
            .iter()
            .any(|word| value.eq_ignore_ascii_case(word))
}

/// Whether the outermost query is ordered and limited, looking through its own parentheses.
fn top_level(query: &AstQuery) -> (bool, bool) {
    let (mut ordered, mut limited) = (false, false);
    let mut query = query;
    loop {
        ordered |= query.order_by.is_some();
        limited |= is_limited(query);
        match &*query.body {
            SetExpr::Query(inner) => query = inner,
            _ => return (ordered, limited),
        }
    }
}

/// The outermost ORDER BY's keys, where all of them are output columns by name or position.
fn order_keys(query: &AstQuery) -> Option<Vec<OrderKey>> {
    let Some(order_by) = &query.order_by else {
        return match &*query.body {
            SetExpr::Query(inner) => order_keys(inner),
            _ => None,
        };
    };
    let OrderByKind::Expressions(keys) = &order_by.kind else {
        return None;
    };
    keys.iter()
        .map(|key| match &key.expr {
            Expr::Identifier(name) => Some(OrderKey::Name(fold(name))),
            Expr::CompoundIdentifier(names) => names.last().map(|name| OrderKey::Name(fold(name))),
            Expr::Value(value) => match &value.value {
                Value::Number(number, _) => number.parse().ok().map(OrderKey::Position),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

const fn is_limited(query: &AstQuery) -> bool {
    query.limit_clause.is_some() || query.fetch.is_some()
}

struct Collector {
    facts: ReadFacts,
    ctes: HashSet<String>,
    /// For each SELECT around the current node: it reads one ordered subquery and nothing else,
    /// so that its aggregates see the rows in that order.
    ordered_input: Vec<bool>,
}

impl Collector {
    fn relation(&mut self, name: &ObjectName) {
        let Some(name) = qualified(name) else {
            self.facts.undecoded_names = true;
            return;
        };
        if !self.facts.relations.iter().any(|known| known.name == name) {
            self.facts.relations.push(RelationUse {
                name,
                perhaps_cte: false,
            });
        }
    }

    fn function(&mut self, name: &ObjectName, arguments: usize) {
        let Some(name) = qualified(name) else {
            self.facts.undecoded_names = true;
            return;
        };
        let function = FunctionUse { name, arguments };
        if !self.facts.functions.contains(&function) {
            self.facts.functions.push(function);
        }
    }

    fn unstable(&mut self, unstable: Unstable) {
        self.facts.unstable.get_or_insert(unstable);
    }

    fn note_order_dependence(&mut self, function: &Function) {
        let Some(name) = qualified(&function.name) else { return };
        let ordered_inside = !function.within_group.is_empty()
            || matches!(&function.args, FunctionArguments::List(list)
                if list.clauses.iter().any(|clause| matches!(clause, FunctionArgumentClause::OrderBy(_))));
        let ordered_window = match &function.over {
            None => false,
            Some(WindowType::WindowSpec(spec)) => !spec.order_by.is_empty() || spec.window_name.is_some(),
            Some(WindowType::NamedWindow(_)) => true,
        };
        let depends = if function.over.is_some() {
            !ordered_window && (ORDERED_WINDOWS.contains(&&*name.name) || ORDERED_AGGREGATES.contains(&&*name.name))
        } else {
            ORDERED_AGGREGATES.contains(&&*name.name)
                && !ordered_inside
                && !self.ordered_input.last().copied().unwrap_or_default()
        };
        if depends {
            self.unstable(Unstable::OrderDependentFunction);
        }
    }

    fn column(&mut self, name: Option<&Ident>) {
        if let Some(name) = name {
            self.facts.system_columns |= ["ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"]
                .iter()
                .any(|column| name.value.eq_ignore_ascii_case(column));
        }
    }
}

/// Aggregates whose result shows the order of their input.
const ORDERED_AGGREGATES: &[&str] = &[
    "array_agg",
    "string_agg",
    "json_agg",
    "jsonb_agg",
    "json_agg_strict",
    "jsonb_agg_strict",
    "json_object_agg",
    "json_arrayagg",
    "json_objectagg",
    "xmlagg",
];

/// Window functions whose result shows the order of the rows in the window.
const ORDERED_WINDOWS: &[&str] = &[
    "row_number",
    "ntile",
    "lag",
    "lead",
    "first_value",
    "last_value",
    "nth_value",
    "percent_rank",
    "cume_dist",
];

impl Visitor for Collector {
    /// A write was found.
    type Break = ();

    fn pre_visit_statement(&mut self, _: &Statement) -> ControlFlow<()> {
        // The outermost query is visited as a query: a statement inside it is DML.
        ControlFlow::Break(())
    }

    fn pre_visit_query(&mut self, query: &AstQuery) -> ControlFlow<()> {
        if let Some(with) = &query.with {
            for cte in &with.cte_tables {
                self.ctes.insert(fold(&cte.alias.name));
            }
        }
        self.facts.locks |= !query.locks.is_empty();
        if is_limited(query) && !top_level(query).0 {
            self.unstable(Unstable::LimitWithoutOrder);
        }
        if let SetExpr::Select(select) = &*query.body
            && matches!(select.distinct, Some(Distinct::On(_)))
            && query.order_by.is_none()
        {
            self.unstable(Unstable::DistinctOnWithoutOrder);
        }
        // Shapes of other dialects, which the server refuses.
        let foreign = query.for_clause.is_some()
            || query.settings.is_some()
            || query.format_clause.is_some()
            || !query.pipe_operators.is_empty();
        if foreign || matches!(*query.body, SetExpr::Table(_)) {
            self.facts.undecoded_names = true;
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<()> {
        if select.into.is_some() {
            return ControlFlow::Break(());
        }
        let ordered_input = match &select.from[..] {
            [only] if only.joins.is_empty() => match &only.relation {
                TableFactor::Derived { subquery, .. } => top_level(subquery).0,
                _ => false,
            },
            _ => false,
        };
        self.ordered_input.push(ordered_input);
        ControlFlow::Continue(())
    }

    fn post_visit_select(&mut self, _: &Select) -> ControlFlow<()> {
        self.ordered_input.pop();
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { name, args, sample, .. } => {
                match args {
                    Some(arguments) => self.function(name, arguments.args.len()),
                    None => self.relation(name),
                }
                if sample.is_some() {
                    self.unstable(Unstable::Sample);
                }
            }
            TableFactor::Function { name, args, .. } => self.function(name, args.len()),
            TableFactor::UNNEST { .. }
            | TableFactor::Derived { .. }
            | TableFactor::NestedJoin { .. }
            | TableFactor::JsonTable { .. } => {}
            // Of other dialects; the server refuses them or means something else.
            _ => self.facts.undecoded_names = true,
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        match expr {
            Expr::Function(function) => {
                let arguments = match &function.args {
                    FunctionArguments::None => 0,
                    FunctionArguments::Subquery(_) => 1,
                    FunctionArguments::List(list) => list.args.len(),
                };
                // CURRENT_USER and its like come without arguments: tokens told of them.
                if function.args != FunctionArguments::None {
                    self.function(&function.name, arguments);
                }
                self.note_order_dependence(function);
            }
            Expr::Identifier(name) => self.column(Some(name)),
            Expr::CompoundIdentifier(names) => self.column(names.last()),
            Expr::Cast {
                data_type: DataType::Custom(name, _),
                ..
            } => self.facts.casts.extend(qualified(name).map(|name| name.name)),
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

fn fold(ident: &Ident) -> String {
    match ident.quote_style {
        Some(_) => ident.value.clone(),
        None => ident.value.to_ascii_lowercase(),
    }
}

/// The name with its schema; a database's name before it is the one connected to.
fn qualified(name: &ObjectName) -> Option<QualifiedName> {
    let mut parts = name.0.iter().rev().map(|part| part.as_ident());
    Some(QualifiedName {
        name: fold(parts.next()??),
        schema: match parts.next() {
            Some(part) => Some(fold(part?)),
            None => None,
        },
    })
}
