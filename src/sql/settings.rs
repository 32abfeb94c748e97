//! Which settings a text changes, so that a session knows what to carry over at a switchover.
//!
//! The server reports only some settings to the client (ParameterStatus) and does not list
//! custom ones (`app.tenant`) in `pg_settings`: their names must be known from the texts. A
//! set_config in a function's body is not seen.

use super::class::{Class, Reset, SetWhat};
use super::classify::plain_string;
use super::cursor::Cursor;
use super::lexer::{LexSettings, TokenKind};
use super::{Script, analyze};

/// One setting that a text changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SettingChange {
    /// In lower case.
    pub name: String,
    /// Gone with its transaction. `set_config` with anything but a plain `true` counts as
    /// lasting.
    pub local: bool,
}

impl SettingChange {
    /// Settings with a dot are custom: the server knows them by having been told.
    pub fn is_custom(&self) -> bool {
        self.name.contains('.')
    }
}

/// The settings that SET, RESET and `set_config('name', …)` in a text change.
pub fn setting_changes(text: &[u8], script: &Script) -> Vec<SettingChange> {
    let mut changes = Vec::new();
    for statement in &script.statements {
        match &statement.class {
            Class::Set(set) => {
                if let SetWhat::Setting(name) = &set.what {
                    changes.push(SettingChange {
                        name: name.clone(),
                        local: set.local,
                    });
                }
            }
            Class::Reset(Reset::Setting(name)) => changes.push(SettingChange {
                name: name.clone(),
                local: false,
            }),
            Class::Read(_) | Class::Write | Class::Unknown | Class::CopyTo(_) | Class::Prepare(_) => {
                set_config_calls(statement.of(text), &mut changes);
            }
            _ => {}
        }
    }
    changes
}

/// The names of custom settings that a text sets for longer than its transaction.
pub fn custom_setting_names(text: &[u8]) -> Vec<String> {
    setting_changes(text, &analyze(text))
        .into_iter()
        .filter(|change| change.is_custom() && !change.local)
        .map(|change| change.name)
        .collect()
}

/// `set_config('name', value, local)` with a constant name.
fn set_config_calls(statement: &[u8], changes: &mut Vec<SettingChange>) {
    // Most statements have none: look for the bytes before lexing.
    if !statement
        .windows(b"set_config".len())
        .any(|window| window.eq_ignore_ascii_case(b"set_config"))
    {
        return;
    }
    let mut cursor = Cursor::new(statement, LexSettings::default());
    while cursor.peek_kind().is_some() {
        match cursor.identifier() {
            None => {
                cursor.next();
                continue;
            }
            Some(name) if name == "set_config" && cursor.eat_kind(TokenKind::OpenParen) => {}
            Some(_) => continue,
        }
        let Some(token) = cursor.next() else { return };
        let Some(name) = plain_string(token.kind, cursor.bytes(&token)) else {
            continue;
        };
        // The third argument is the last thing before the closing parenthesis.
        let (mut depth, mut last) = (1_usize, None);
        while depth > 0 {
            let Some(token) = cursor.next() else { break };
            match token.kind {
                TokenKind::OpenParen => depth += 1,
                TokenKind::CloseParen => depth -= 1,
                _ => {}
            }
            if depth > 0 {
                last = Some(cursor.bytes(&token));
            }
        }
        changes.push(SettingChange {
            name: name.to_lowercase(),
            local: last.is_some_and(|last| last.eq_ignore_ascii_case(b"true")),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        assert_eq!(custom_setting_names(text.as_bytes()), expected, "{text}");
    }

    #[test]
    fn names_of_custom_settings() {
        check("set app.tenant = 'x'", &["app.tenant"]);
        check("SET SESSION App.Tenant TO 1; set work_mem = '1MB'", &["app.tenant"]);
        check("set session.user = 1", &["session.user"]);
        check("set local app.tenant = 'x'", &[]);
        check("select set_config('app.tenant', $1, false)", &["app.tenant"]);
        check("select pg_catalog.set_config('app.tenant', f(1, true), true)", &[]);
        check("select set_config($1, 'x', false)", &[]);
        check("insert into t select set_config($$app.a$$, 'x', 't')", &["app.a"]);
        check("reset app.tenant", &["app.tenant"]);
    }
}
