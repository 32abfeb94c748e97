//! What is wrong with proxy.yaml, and where.

use std::path::Path;

/// What is wrong with proxy.yaml: file, line and key where they are known, and what would be
/// right. Never a value, since a value may be a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{path}: cannot be read: {cause}")]
    Unreadable { path: String, cause: String },
    #[error("{path}:{line}:{column}: {key}{message}")]
    Invalid {
        path: String,
        line: u64,
        column: u64,
        /// `key: `, or empty where the line has none.
        key: String,
        message: String,
    },
    /// The parts contradict each other, so no single line is to blame.
    #[error("{path}: {message}")]
    Contradiction { path: String, message: String },
}

/// What the parser says, with the place in front.
pub(super) fn located(path: &Path, text: &str, error: &serde_saphyr::Error) -> ConfigError {
    let (line, column) = error
        .location()
        .map_or((1, 1), |location| (location.line(), location.column()));
    let key = usize::try_from(line)
        .ok()
        .and_then(|line| text.lines().nth(line.saturating_sub(1)))
        .and_then(|source| source.split_once(':'))
        .map(|(key, _)| key.trim().trim_start_matches("- ").to_owned())
        .filter(|key| key.chars().all(|c| c.is_alphanumeric() || "_*\"'".contains(c)))
        .map_or_else(String::new, |key| format!("{key}: "));
    // The library appends the position once more; ours stands in front.
    let message = error.without_snippet().to_string();
    let message = match message.rfind(" at line ") {
        Some(end) => message[..end].trim_end_matches([':', ',']).to_owned(),
        None => message,
    };
    ConfigError::Invalid {
        path: path.display().to_string(),
        line,
        column,
        key,
        message,
    }
}
