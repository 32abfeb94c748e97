//! Reading: lines across rotated files, and lines as they come.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The log's files, oldest first, the current one last. None where there is no log.
pub fn files(log: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = match log.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let prefix = format!("{}.", log.file_name().unwrap_or_default().to_string_lossy());
    let mut rotated = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix(&prefix).and_then(|number| {
            let digits = number.len() >= 12 && number.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| number.parse::<u64>().ok())?
        });
        if let Some(number) = number {
            rotated.push((number, log.with_file_name(name)));
        }
    }
    rotated.sort();
    let mut files: Vec<PathBuf> = rotated.into_iter().map(|(_, path)| path).collect();
    if log.exists() {
        files.push(log.to_owned());
    }
    Ok(files)
}

/// One line as it stands in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Without the newline.
    pub bytes: Vec<u8>,
    /// Whether the newline is there; only a last line may lack it.
    pub whole: bool,
}

/// Reads every file that may hold lines of `since` or later. A rotated file's last line is as old
/// as the file.
///
/// # Errors
/// The directory or a file cannot be read.
pub fn lines(log: &Path, since: Option<SystemTime>) -> io::Result<Lines> {
    let mut open: VecDeque<File> = open_files(log)?.into_iter().map(|(_, file)| file).collect();
    if let Some(since) = since {
        open.retain(|file| {
            file.metadata()
                .and_then(|data| data.modified())
                .map_or(true, |at| at >= since)
        });
    }
    Ok(Lines { open, current: None })
}

/// All files at once, so that a rotation in between neither hides one nor shows it twice.
pub(super) fn open_files(log: &Path) -> io::Result<Vec<(PathBuf, File)>> {
    for _ in 0..10 {
        let names = files(log)?;
        let mut open = Vec::new();
        for name in &names {
            match File::open(name) {
                Ok(file) => open.push((name.clone(), file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if open.len() == names.len() && files(log)? == names {
            return Ok(open);
        }
    }
    Err(io::Error::other("the log is rotated all the time"))
}

/// The lines of [`lines`].
pub struct Lines {
    open: VecDeque<File>,
    current: Option<BufReader<File>>,
}

impl Iterator for Lines {
    type Item = io::Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.current.is_none() {
                self.current = Some(BufReader::new(self.open.pop_front()?));
            }
            match self.current.as_mut().map(next_line)? {
                Ok(Some(line)) => return Some(Ok(line)),
                Ok(None) => self.current = None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

pub(super) fn next_line(reader: &mut impl BufRead) -> io::Result<Option<Line>> {
    let mut bytes = Vec::new();
    if reader.read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    let whole = bytes.pop_if(|last| *last == b'\n').is_some();
    Ok(Some(Line { bytes, whole }))
}

/// Lines that are written from now on, across rotations.
pub struct Follower {
    log: PathBuf,
    file: Option<BufReader<File>>,
    /// Of a line whose end is not there yet.
    begun: Vec<u8>,
}

impl Follower {
    /// From the end of the current file on.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn from_end(log: &Path) -> io::Result<Self> {
        let mut follower = Self {
            log: log.to_owned(),
            file: open_if_there(log)?,
            begun: Vec::new(),
        };
        follower.ready()?;
        Ok(follower)
    }

    /// The whole lines that have come since the last call; never waits.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn ready(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        loop {
            if self.file.is_none() {
                self.file = open_if_there(&self.log)?;
            }
            let Some(file) = &mut self.file else {
                return Ok(lines);
            };
            // Asked before the last look at the old file: what is written after it is in the new one.
            let rotated = is_another(file.get_ref(), &self.log)?;
            while file.read_until(b'\n', &mut self.begun)? > 0 {
                if self.begun.pop_if(|last| *last == b'\n').is_some() {
                    lines.push(std::mem::take(&mut self.begun));
                }
            }
            if !rotated {
                return Ok(lines);
            }
            self.begun.clear();
            self.file = None;
            if !self.log.exists() {
                return Ok(lines);
            }
        }
    }
}

fn open_if_there(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_another(open: &File, path: &Path) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(now) => Ok(now.ino() != open.metadata()?.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}
