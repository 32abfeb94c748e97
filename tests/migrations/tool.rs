//! The migration tools, run by `tool.py`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;

/// A running `tool.py`. It ends when dropped.
pub(crate) struct Tool {
    name: &'static str,
    process: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    /// All that the tool printed.
    pub(crate) output: String,
}

impl Tool {
    /// `name` is the tool's and its project's, a folder beside this file; `url` is the database's.
    pub(crate) fn start(name: &'static str, url: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(python(root));
        // No settings of whoever runs the tests.
        for (variable, _) in std::env::vars_os() {
            if variable.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(variable);
            }
        }
        let mut process = command
            .arg(root.join("tests/migrations/tool.py"))
            .current_dir(root.join("tests/migrations").join(name))
            .env("SHOP_URL", url)
            .env("PYTHONPATH", ".")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("DJANGO_SETTINGS_MODULE", "shop.settings")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            name,
            commands: process.stdin.take(),
            answers: BufReader::new(process.stdout.take().unwrap()),
            process,
        }
    }

    /// One command line, whatever comes of it.
    pub(crate) fn outcome(&mut self, line: &str) -> Outcome {
        let arguments: Vec<&str> = std::iter::once(self.name).chain(line.split_whitespace()).collect();
        let commands = self.commands.as_mut().unwrap();
        writeln!(commands, "{}", serde_json::to_string(&arguments).unwrap()).unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{} {line}: {error}: {answer}", self.name))
    }

    /// One command line that succeeds; what it printed.
    pub(crate) fn run(&mut self, line: &str) -> String {
        let outcome = self.outcome(line);
        assert_eq!(outcome.code, 0, "{} {line}:\n{}", self.name, outcome.output);
        outcome.output
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.process.wait().ok();
    }
}

/// As scripts/install-drivers wrote it down.
fn python(root: &Path) -> String {
    let list = std::fs::read_to_string(root.join(".servers/drivers/paths")).unwrap_or_default();
    match list.lines().find_map(|line| line.strip_prefix("python=")) {
        Some(path) => path.to_owned(),
        None => {
            panic!("Python is not installed for the migration tests; run scripts/install-drivers (`make test` does)")
        }
    }
}
