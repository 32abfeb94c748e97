//! Checking: every line of every file, and where the chain breaks.

use std::fmt;
use std::io::{self, BufReader};
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::reader::{next_line, open_files};
use super::{Envelope, GENESIS, Head, MacKey, VERSION, events, hash, read_head};

/// Told beside what the chain records itself, of a line that is older than the one before it.
const CLOCK_WENT_BACK: &str = "clock_went_back";
/// Clocks are set right all the time by less.
const CLOCK_MAY_STEP: time::Duration = time::Duration::SECOND;

/// What checking a log found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// Whether the chain is whole from its first line to its head.
    pub intact: bool,
    pub files: Vec<FileVerified>,
    pub lines: u64,
    /// Lines whose MAC was checked and right.
    pub signed: u64,
    pub head: Head,
    pub broken: Vec<Broken>,
    pub head_file: HeadFile,
    /// Where a head that was kept is; absent where none was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Bytes of an unfinished last line: written at this moment, or left by a writer that was
    /// killed; the next start sets them aside and records it.
    pub torn_bytes: u64,
    /// What the chain itself records of its past: set aside, missing, torn. Part of the chain, no
    /// breaks of it.
    pub incidents: Vec<Incident>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileVerified {
    pub name: String,
    pub lines: u64,
    pub first: u64,
    pub last: u64,
}

/// A place where the chain does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Broken {
    pub file: String,
    /// In the file, from 1.
    pub line: u64,
    pub what: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Incident {
    pub seq: u64,
    pub time: String,
    pub event: String,
    pub details: Value,
}

/// Where a head is that somebody kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// It is the line of this number: nothing up to there was changed, and nothing cut off.
    Line(u64),
    /// The log's first line follows it: what was up to there is in files that are not here.
    BeforeTheFirst,
    /// It is nowhere.
    Missing,
}

/// What `<log>.head` says of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadFile {
    /// There is none (and no line).
    None,
    /// It is the log's head, or a line shortly before it.
    Agrees,
    /// It names a line that the log does not have: lines are missing at the end.
    Ahead,
    /// It names a line that is another one in the log.
    Differs,
}

/// Checks the whole log.
///
/// # Errors
/// A file cannot be read.
pub fn verify(log: &Path, mac_key: Option<&MacKey>) -> io::Result<Verification> {
    verify_against(log, mac_key, None)
}

/// The same, and that it goes on from a head that was kept: the hash of a line.
///
/// # Errors
/// A file cannot be read.
pub fn verify_against(log: &Path, mac_key: Option<&MacKey>, kept: Option<&str>) -> io::Result<Verification> {
    // Before the log, which may grow meanwhile: so it is never ahead of what is read.
    let known = read_head(log)?;
    let mut check = Check::new(mac_key, known.as_ref(), kept);
    for (path, file) in open_files(log)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut reader = BufReader::new(file);
        check.begin_file(name);
        while let Some(line) = next_line(&mut reader)? {
            if line.whole {
                check.line(&line.bytes);
            } else if path == log {
                check.torn_bytes = line.bytes.len() as u64;
            } else {
                check.file_line += 1;
                check.broken("the file ends in an unfinished line".into());
            }
        }
        check.end_file();
    }
    Ok(check.finish())
}

struct Check<'a> {
    mac_key: Option<&'a MacKey>,
    known: Option<&'a Head>,
    known_found: Option<bool>,
    kept: Option<&'a str>,
    kept_found: Option<Kept>,
    /// When the line before was written.
    time: Option<OffsetDateTime>,
    /// Of the line before; its hash is what it really is, whatever the next line says.
    head: Option<Head>,
    /// A break was told of and not yet left behind.
    lost: bool,
    file: FileVerified,
    file_line: u64,
    files: Vec<FileVerified>,
    lines: u64,
    signed: u64,
    broken: Vec<Broken>,
    incidents: Vec<Incident>,
    torn_bytes: u64,
}

impl<'a> Check<'a> {
    fn new(mac_key: Option<&'a MacKey>, known: Option<&'a Head>, kept: Option<&'a str>) -> Self {
        Self {
            mac_key,
            known,
            known_found: None,
            kept,
            kept_found: None,
            time: None,
            head: None,
            lost: false,
            file: FileVerified {
                name: String::new(),
                lines: 0,
                first: 0,
                last: 0,
            },
            file_line: 0,
            files: Vec::new(),
            lines: 0,
            signed: 0,
            broken: Vec::new(),
            incidents: Vec::new(),
            torn_bytes: 0,
        }
    }

    fn begin_file(&mut self, name: String) {
        self.file_line = 0;
        self.file = FileVerified {
            name,
            lines: 0,
            first: 0,
            last: 0,
        };
    }

    fn end_file(&mut self) {
        self.files.push(self.file.clone());
    }

    fn broken(&mut self, what: String) {
        self.broken.push(Broken {
            file: self.file.name.clone(),
            line: self.file_line,
            what,
        });
    }

    fn line(&mut self, bytes: &[u8]) {
        self.file_line += 1;
        self.lines += 1;
        self.file.lines += 1;
        let envelope = match serde_json::from_slice::<Envelope>(bytes) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.broken(format!("is no line of a chain: {error}"));
                // What follows can only be held against itself.
                self.lost = true;
                return;
            }
        };
        if envelope.version > VERSION {
            self.broken(format!(
                "has version {}, this program knows {VERSION}",
                envelope.version
            ));
        }
        self.link(&envelope);
        self.sign(&envelope, bytes);
        let head = Head {
            seq: envelope.seq,
            hash: hash(bytes),
        };
        if let Some(known) = self.known.filter(|known| known.seq == head.seq) {
            self.known_found = Some(*known == head);
        }
        if self.kept == Some(head.hash.as_str()) {
            self.kept_found = Some(Kept::Line(head.seq));
        }
        self.clock(&envelope);
        if self.file.lines == 1 {
            self.file.first = envelope.seq;
        }
        self.file.last = envelope.seq;
        if [events::TORN, events::LINES_MISSING, events::SET_ASIDE].contains(&envelope.event.as_str()) {
            self.incident(envelope, bytes);
        }
        self.head = Some(head);
    }

    /// That this line follows the one before.
    fn link(&mut self, envelope: &Envelope) {
        if std::mem::take(&mut self.lost) {
            return;
        }
        match self.head.clone() {
            None if envelope.seq == 1 && envelope.prev == GENESIS => {}
            None if self.kept == Some(envelope.prev.as_str()) => self.kept_found = Some(Kept::BeforeTheFirst),
            None => self.broken(format!(
                "the chain begins with line number {}: what was before it is not here",
                envelope.seq
            )),
            Some(before) => {
                if envelope.seq != before.seq + 1 {
                    self.broken(format!(
                        "line number {} follows number {}: lines were removed, repeated or put elsewhere",
                        envelope.seq, before.seq
                    ));
                } else if envelope.prev != before.hash {
                    self.broken(format!(
                        "line number {} does not carry the hash of number {}: one of the two was changed",
                        envelope.seq, before.seq
                    ));
                }
            }
        }
    }

    /// A line that says that it is older than the one before it: no break, but whoever goes by times
    /// must know.
    fn clock(&mut self, envelope: &Envelope) {
        let Ok(time) = OffsetDateTime::parse(&envelope.time, &Rfc3339) else {
            return;
        };
        let before = self.time.replace(time);
        if let Some(before) = before.filter(|before| *before - time > CLOCK_MAY_STEP) {
            self.incidents.push(Incident {
                seq: envelope.seq,
                time: envelope.time.clone(),
                event: CLOCK_WENT_BACK.into(),
                details: json!({ "seconds": (before - time).as_seconds_f64() }),
            });
        }
    }

    fn sign(&mut self, envelope: &Envelope, bytes: &[u8]) {
        let (Some(key), Some(mac)) = (self.mac_key, &envelope.mac) else {
            if self.mac_key.is_some() && self.signed > 0 {
                self.broken(format!(
                    "line number {} carries no MAC, others before it do",
                    envelope.seq
                ));
            }
            return;
        };
        let suffix = format!(",\"mac\":\"{mac}\"}}");
        let right = bytes.strip_suffix(suffix.as_bytes()).is_some_and(|signed| {
            let mut signed = signed.to_owned();
            signed.push(b'}');
            key.sign(&signed) == *mac
        });
        if right {
            self.signed += 1;
        } else {
            self.broken(format!("line number {}: its MAC is wrong", envelope.seq));
        }
    }

    fn incident(&mut self, envelope: Envelope, bytes: &[u8]) {
        let mut details: Value = serde_json::from_slice(bytes).unwrap_or_default();
        if let Some(map) = details.as_object_mut() {
            for key in ["version", "seq", "time", "event", "prev", "mac"] {
                map.shift_remove(key);
            }
        }
        self.incidents.push(Incident {
            seq: envelope.seq,
            time: envelope.time,
            event: envelope.event,
            details,
        });
    }

    fn finish(mut self) -> Verification {
        let known = self.known;
        let kept = self.kept.map(|kept| {
            if self.kept_found.is_none() {
                self.broken(format!(
                    "the head that was kept, {kept}, is none of its lines: lines were cut off or changed, or it is another log"
                ));
            }
            self.kept_found.unwrap_or(Kept::Missing)
        });
        let head = self.head.clone().unwrap_or_else(Head::genesis);
        let head_file = match (known, self.known_found) {
            (None, _) => HeadFile::None,
            (Some(known), None) if known.seq > head.seq => HeadFile::Ahead,
            (Some(_), Some(true)) => HeadFile::Agrees,
            (Some(known), None) if known.seq == 0 => HeadFile::Agrees,
            (Some(_), Some(false) | None) => HeadFile::Differs,
        };
        match (head_file, known) {
            (HeadFile::Ahead, Some(known)) => self.broken(format!(
                "the log ends with line number {}, the file beside it knows of number {}: lines are missing at the end",
                head.seq, known.seq
            )),
            (HeadFile::Differs, Some(known)) => self.broken(format!(
                "line number {} is another one than the file beside the log knows",
                known.seq
            )),
            _ => {}
        }
        Verification {
            intact: self.broken.is_empty(),
            files: self.files,
            lines: self.lines,
            signed: self.signed,
            head,
            broken: self.broken,
            head_file,
            kept,
            torn_bytes: self.torn_bytes,
            incidents: self.incidents,
        }
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            writeln!(
                f,
                "{}: {} lines, numbers {} to {}",
                file.name, file.lines, file.first, file.last
            )?;
        }
        for incident in &self.incidents {
            writeln!(
                f,
                "recorded  number {} at {}: {} {}",
                incident.seq, incident.time, incident.event, incident.details
            )?;
        }
        for broken in &self.broken {
            writeln!(f, "BROKEN    {}:{}: {}", broken.file, broken.line, broken.what)?;
        }
        match self.kept {
            Some(Kept::Line(seq)) => writeln!(f, "the head that was kept is line number {seq}")?,
            Some(Kept::BeforeTheFirst) => {
                writeln!(
                    f,
                    "the first line follows the head that was kept: what was up to there is not here"
                )?;
            }
            Some(Kept::Missing) | None => {}
        }
        if self.torn_bytes > 0 {
            writeln!(
                f,
                "an unfinished last line of {} bytes: being written, or left by a writer that was killed",
                self.torn_bytes
            )?;
        }
        if self.signed > 0 {
            writeln!(f, "{} lines with a right MAC", self.signed)?;
        }
        write!(
            f,
            "{}: {} lines, head {} {}",
            if self.intact { "intact" } else { "NOT INTACT" },
            self.lines,
            self.head.seq,
            self.head.hash
        )
    }
}
