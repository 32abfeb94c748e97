//! Writing: one process at a time, a line whole or not at all, also when it is killed or the disk
//! is full.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Map, Value, json};
use sha2::Sha256;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use super::{Envelope, Head, VERSION, beside, events, files, hash, head_path, hex, now, read_head};

/// When lines are forced to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Before the line counts as written.
    Always,
    /// So long after it at most.
    Every(Duration),
    /// When the operating system likes to. Killing the process loses nothing all the same.
    Never,
}

/// Signs each line. Who does not know it cannot write lines that look right.
#[derive(Clone, PartialEq, Eq)]
pub struct MacKey(Vec<u8>);

impl MacKey {
    pub fn new(key: &[u8]) -> Self {
        Self(key.to_owned())
    }

    /// HMAC-SHA-256, in hex.
    pub(super) fn sign(&self, bytes: &[u8]) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else {
            return String::new();
        };
        mac.update(bytes);
        hex(&mac.finalize().into_bytes())
    }
}

impl std::fmt::Debug for MacKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MacKey(…)")
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub path: PathBuf,
    /// A file that would become longer is rotated.
    pub max_bytes: u64,
    /// So is one whose first line is older.
    pub max_age: Duration,
    pub fsync: Fsync,
    pub mac_key: Option<MacKey>,
}

/// An open log. Dropping it lets others write.
pub struct Chain {
    options: Options,
    /// Locked as long as this lives.
    head_file: File,
    file: File,
    /// Of whole lines; a line that was written in part lies beyond and is cut off.
    bytes: u64,
    /// Of the file's first line.
    began: OffsetDateTime,
    head: Head,
    /// Since when there are lines that may not be on the disk.
    unsynced_since: Option<Instant>,
}

impl Chain {
    /// Opens the log for writing, and sets aside and records what a writer that was killed, or
    /// somebody else, left wrong at its end. `opened` becomes the keys of the line that tells of
    /// this opening.
    ///
    /// # Errors
    /// Another process writes it ([`io::ErrorKind::WouldBlock`]), or the files cannot be written.
    pub fn open(options: Options, opened: Map<String, Value>) -> io::Result<Self> {
        let head_file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(head_path(&options.path))?;
        head_file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(io::ErrorKind::WouldBlock, "another process writes this log"),
            TryLockError::Error(error) => error,
        })?;
        let known = read_head(&options.path)?;
        let found = look_at_end(&options.path)?;
        let mut chain = Self {
            file: open_append(&options.path)?,
            head_file,
            bytes: found.bytes,
            began: found.began.unwrap_or_else(OffsetDateTime::now_utc),
            head: found.head.clone(),
            unsynced_since: None,
            options,
        };
        for incident in found.incidents {
            chain.append(incident.event, incident.body)?;
        }
        if let Some(known) = known
            && (known.seq > found.head.seq || (known.seq == found.head.seq && known != found.head))
        {
            let body = json!({
                "expected": known,
                "found": found.head,
                "note": "the file beside the log knows of lines that the log does not have: they were removed or changed, or the machine lost what was not yet on its disk",
            });
            chain.append(events::LINES_MISSING, object(body))?;
        }
        chain.append(events::OPENED, opened)?;
        Ok(chain)
    }

    pub const fn head(&self) -> &Head {
        &self.head
    }

    /// Of the current file.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes one line. After an error nothing of it is in the log, or [`Chain::open`] is needed
    /// to find out.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn append(&mut self, event: &str, body: Map<String, Value>) -> io::Result<&Head> {
        let mut line = self.line(event, body)?;
        let head = Head {
            seq: self.head.seq + 1,
            hash: hash(&line),
        };
        line.push(b'\n');
        self.rotate_before(line.len() as u64)?;
        if let Err(error) = self.file.write_all(&line) {
            // What was written of it goes again; where even that fails, it is a torn line.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += line.len() as u64;
        self.head = head;
        self.unsynced_since.get_or_insert_with(Instant::now);
        // It may be behind the log, never ahead of it; so an error here does no harm.
        self.write_head().ok();
        match self.options.fsync {
            Fsync::Always => self.sync()?,
            Fsync::Every(_) | Fsync::Never => {}
        }
        Ok(&self.head)
    }

    fn line(&self, event: &str, body: Map<String, Value>) -> io::Result<Vec<u8>> {
        let mut map = Map::new();
        map.insert("version".into(), VERSION.into());
        map.insert("seq".into(), (self.head.seq + 1).into());
        map.insert("time".into(), now().into());
        map.insert("event".into(), event.into());
        for (key, value) in body {
            // The chain's own keys are not an event's to set.
            map.entry(key).or_insert(value);
        }
        map.insert("prev".into(), self.head.hash.clone().into());
        let mut line = serde_json::to_vec(&map)?;
        if let Some(key) = &self.options.mac_key {
            let mac = key.sign(&line);
            line.pop();
            write!(line, ",\"mac\":\"{mac}\"}}")?;
        }
        Ok(line)
    }

    /// When [`sync`](Self::sync) is due, where lines wait for it.
    pub fn sync_due(&self) -> Option<Instant> {
        match self.options.fsync {
            Fsync::Every(interval) => self.unsynced_since.map(|since| since + interval),
            Fsync::Always | Fsync::Never => None,
        }
    }

    /// Forces everything to the disk.
    ///
    /// # Errors
    /// The disk says so; what it has then is not known.
    pub fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.head_file.sync_data()?;
        self.unsynced_since = None;
        Ok(())
    }

    /// A whole file is named after the number of its first line, so that names sort as lines do.
    fn rotate_before(&mut self, coming: u64) -> io::Result<()> {
        let now = OffsetDateTime::now_utc();
        if self.bytes == 0 {
            self.began = now;
            return Ok(());
        }
        let age = Duration::try_from(now - self.began).unwrap_or_default();
        if self.bytes + coming <= self.options.max_bytes && age < self.options.max_age {
            return Ok(());
        }
        self.sync()?;
        let first = first_seq(&self.options.path)?.unwrap_or(self.head.seq);
        let rotated = beside(&self.options.path, &format!(".{first:012}"));
        if rotated.exists() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is there already", rotated.display()),
            ));
        }
        std::fs::rename(&self.options.path, &rotated)?;
        self.file = open_append(&self.options.path)?;
        sync_directory(&self.options.path);
        self.bytes = 0;
        self.began = now;
        Ok(())
    }

    fn write_head(&self) -> io::Result<()> {
        let mut text = serde_json::to_vec(&self.head)?;
        // Always of one length, so that writing over an older one leaves nothing of it.
        text.resize(127, b' ');
        text.push(b'\n');
        self.head_file.write_all_at(&text, 0)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.options.fsync != Fsync::Never {
            self.sync().ok();
        }
    }
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// A new or renamed file is on the disk when its directory is; where that cannot be had, the head
/// tells of what was lost.
fn sync_directory(path: &Path) {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Err(error) = File::open(directory).and_then(|directory| directory.sync_all()) {
        tracing::warn!(%error, path = %directory.display(), "a directory could not be forced to the disk");
    }
}

struct Found {
    head: Head,
    bytes: u64,
    began: Option<OffsetDateTime>,
    incidents: Vec<Recorded>,
}

struct Recorded {
    event: &'static str,
    body: Map<String, Value>,
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Where the chain ends, after what is no whole line has been set aside.
fn look_at_end(path: &Path) -> io::Result<Found> {
    let mut incidents = Vec::new();
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return rotated_end(path, incidents),
        Err(error) => return Err(error),
    };
    let (last, whole_bytes) = last_line(&mut file)?;
    let length = file.metadata()?.len();
    if length > whole_bytes {
        incidents.push(set_torn_aside(path, &mut file, whole_bytes)?);
    }
    if whole_bytes == 0 {
        return rotated_end(path, incidents);
    }
    let Ok(envelope) = serde_json::from_slice::<Envelope>(&last) else {
        incidents.push(set_file_aside(path)?);
        return rotated_end(path, incidents);
    };
    Ok(Found {
        head: Head {
            seq: envelope.seq,
            hash: hash(&last),
        },
        bytes: whole_bytes,
        began: first_envelope(path)?.and_then(|first| OffsetDateTime::parse(&first.time, &Rfc3339).ok()),
        incidents,
    })
}

/// The current file is new: the chain goes on from the last rotated one.
fn rotated_end(path: &Path, incidents: Vec<Recorded>) -> io::Result<Found> {
    let mut head = Head::genesis();
    if let Some(last_file) = files(path)?.into_iter().rfind(|file| file != path) {
        let (last, _) = last_line(&mut File::open(&last_file)?)?;
        if let Ok(envelope) = serde_json::from_slice::<Envelope>(&last) {
            head = Head {
                seq: envelope.seq,
                hash: hash(&last),
            };
        }
    }
    Ok(Found {
        head,
        bytes: 0,
        began: None,
        incidents,
    })
}

fn set_torn_aside(path: &Path, file: &mut File, whole_bytes: u64) -> io::Result<Recorded> {
    let mut torn = Vec::new();
    file.seek(SeekFrom::Start(whole_bytes))?;
    file.read_to_end(&mut torn)?;
    let kept_in = free_name(path, "torn");
    let mut aside = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&kept_in)?;
    aside.write_all(&torn)?;
    aside.sync_all()?;
    file.set_len(whole_bytes)?;
    file.sync_all()?;
    tracing::warn!(bytes = torn.len(), kept_in = %kept_in.display(), "the mismatch log ended in an unfinished line; set aside");
    Ok(Recorded {
        event: events::TORN,
        body: object(json!({
            "bytes": torn.len(),
            "sha256": hash(&torn),
            "kept_in": name_of(&kept_in),
        })),
    })
}

fn set_file_aside(path: &Path) -> io::Result<Recorded> {
    let kept_in = free_name(path, "unreadable");
    let contents = std::fs::read(path)?;
    std::fs::rename(path, &kept_in)?;
    tracing::warn!(kept_in = %kept_in.display(), "the mismatch log's last line is none of a chain; the file was set aside");
    Ok(Recorded {
        event: events::SET_ASIDE,
        body: object(json!({
            "bytes": contents.len(),
            "sha256": hash(&contents),
            "kept_in": name_of(&kept_in),
            "note": "its last line is none of a chain: written by an earlier version, or by somebody else",
        })),
    })
}

/// A name that no file has yet.
fn free_name(path: &Path, what: &str) -> PathBuf {
    let stamp = OffsetDateTime::now_utc().unix_timestamp();
    let mut name = beside(path, &format!(".{what}-{stamp}"));
    for n in 1.. {
        if !name.exists() {
            break;
        }
        name = beside(path, &format!(".{what}-{stamp}-{n}"));
    }
    name
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The last whole line, and how many bytes the whole lines have.
fn last_line(file: &mut File) -> io::Result<(Vec<u8>, u64)> {
    const STEP: u64 = 64 * 1024;
    let length = file.metadata()?.len();
    let mut tail = Vec::new();
    let mut from = length;
    loop {
        let step = STEP.min(from);
        from -= step;
        let mut piece = vec![0; usize::try_from(step).unwrap_or_default()];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut piece)?;
        piece.extend_from_slice(&tail);
        tail = piece;
        let Some(end) = tail.iter().rposition(|byte| *byte == b'\n') else {
            if from == 0 {
                return Ok((Vec::new(), 0));
            }
            continue;
        };
        let start = tail[..end].iter().rposition(|byte| *byte == b'\n');
        match (start, from) {
            (Some(start), _) => return Ok((tail[start + 1..end].to_owned(), from + end as u64 + 1)),
            (None, 0) => return Ok((tail[..end].to_owned(), end as u64 + 1)),
            (None, _) => {}
        }
    }
}

fn first_envelope(path: &Path) -> io::Result<Option<Envelope>> {
    let mut line = Vec::new();
    io::BufRead::read_until(&mut io::BufReader::new(File::open(path)?), b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line).ok())
}

fn first_seq(path: &Path) -> io::Result<Option<u64>> {
    Ok(first_envelope(path)?.map(|envelope| envelope.seq))
}
