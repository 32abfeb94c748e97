//! How values are written where somebody may read them: as a keyed hash (equal values are
//! recognisable, none can be found by trying), plainly, or not at all; by column where configured.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::config::LoggedValues;
use crate::wire::backend;

#[derive(Clone)]
pub struct ValueWriter {
    values: LoggedValues,
    /// By the name of a result's column.
    columns: BTreeMap<String, LoggedValues>,
    key: [u8; 32],
}

impl ValueWriter {
    /// With a key of its own, which is gone with the process.
    pub fn new(values: LoggedValues) -> Self {
        Self::with_key(values, rand::random())
    }

    /// With a given key, so that equal values are recognisable across restarts.
    pub const fn with_key(values: LoggedValues, key: [u8; 32]) -> Self {
        Self {
            values,
            columns: BTreeMap::new(),
            key,
        }
    }

    /// Where some columns are to be written otherwise.
    #[must_use]
    pub fn by_column(mut self, columns: BTreeMap<String, LoggedValues>) -> Self {
        self.columns = columns;
        self
    }

    /// 64 bits of HMAC-SHA-256, in hex.
    pub(super) fn hash(&self, parts: &[&[u8]]) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else {
            return String::new();
        };
        for part in parts {
            mac.update(part);
        }
        let bytes = mac.finalize().into_bytes();
        bytes[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Tells keys apart without telling them: hashes compare only under one key.
    pub fn key_id(&self) -> String {
        self.hash(&[b"pgtandem: which key"])
    }

    /// Whether values may be seen.
    pub fn shows_values(&self) -> bool {
        self.values == LoggedValues::Plain
    }

    /// As `mismatch_log.values` has it.
    pub const fn mode(&self) -> LoggedValues {
        self.values
    }

    /// A value from elsewhere, as this log would write it; `None` where it writes none.
    pub fn text(&self, value: &str) -> Option<String> {
        self.value(self.values, value.as_bytes())
    }

    fn value(&self, how: LoggedValues, value: &[u8]) -> Option<String> {
        match how {
            LoggedValues::Plain => Some(String::from_utf8_lossy(value).into_owned()),
            LoggedValues::Hashed => Some(self.hash(&[value])),
            LoggedValues::None => None,
        }
    }

    fn of_column(&self, name: Option<&String>) -> LoggedValues {
        name.and_then(|name| self.columns.get(name))
            .copied()
            .unwrap_or(self.values)
    }

    /// The values of DataRow bodies, whose columns are named so. A value that is not to be
    /// written is `…`, a null is null; nothing where no column's values are.
    pub(super) fn rows(&self, names: &[String], rows: &[Vec<u8>]) -> Vec<Vec<Option<String>>> {
        let silent = self.values == LoggedValues::None
            && !names
                .iter()
                .any(|name| self.of_column(Some(name)) != LoggedValues::None);
        if silent {
            return Vec::new();
        }
        rows.iter()
            .map(|row| {
                backend::columns(row)
                    .enumerate()
                    .map(|(n, column)| {
                        let how = self.of_column(names.get(n));
                        column.map(|value| self.value(how, value).unwrap_or_else(|| "…".into()))
                    })
                    .collect()
            })
            .collect()
    }
}

/// Reads the key of the hashes, or draws one and keeps it in a file that only its owner reads.
///
/// # Errors
/// The file cannot be read or made; or others may read it; or it holds no key.
pub fn load_or_create_key(path: &Path) -> io::Result<[u8; 32]> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if !path.exists() {
        create_key(path)?;
    }
    let text = std::fs::read_to_string(path)?;
    if std::fs::metadata(path)?.mode() & 0o077 != 0 {
        return Err(wrong("others than its owner may read it or write it: chmod 600"));
    }
    decode(text.trim()).ok_or_else(|| wrong("is no key: 64 hexadecimal digits are one"))
}

/// Whole or not at all, and never over another process's.
fn create_key(path: &Path) -> io::Result<()> {
    let key: [u8; 32] = rand::random();
    let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let own = Path::new(&name);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(own)?;
    let written = writeln!(file, "{text}").and_then(|()| file.sync_all());
    let linked = written.and_then(|()| match std::fs::hard_link(own, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    });
    std::fs::remove_file(own).and(linked)
}

fn decode(text: &str) -> Option<[u8; 32]> {
    let mut key = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn values_as_configured() {
        let row = b"\0\x02\0\0\0\x05alice\xff\xff\xff\xff".to_vec();
        let names = ["name".to_owned(), "note".to_owned()];
        let of = |values, key| ValueWriter::with_key(values, [key; 32]).rows(&names, std::slice::from_ref(&row));
        assert_eq!(of(LoggedValues::Plain, 1), [[Some("alice".to_owned()), None]]);
        assert!(of(LoggedValues::None, 1).is_empty());
        let hashed = of(LoggedValues::Hashed, 1);
        assert_eq!(hashed[0][0].as_ref().map(String::len), Some(16));
        assert_eq!(hashed[0][1], None);
        assert_eq!(hashed, of(LoggedValues::Hashed, 1));
        assert_ne!(hashed, of(LoggedValues::Hashed, 2));
    }

    #[test]
    fn columns_of_their_own() {
        let row = b"\0\x02\0\0\0\x011\0\0\0\x05alice".to_vec();
        let names = ["id".to_owned(), "name".to_owned()];
        let of = |values, column: (&str, LoggedValues)| {
            ValueWriter::with_key(values, [1; 32])
                .by_column([(column.0.to_owned(), column.1)].into())
                .rows(&names, std::slice::from_ref(&row))
        };
        let plain_id = of(LoggedValues::Hashed, ("id", LoggedValues::Plain));
        assert_eq!(plain_id[0][0].as_deref(), Some("1"));
        assert_ne!(plain_id[0][1].as_deref(), Some("alice"));
        let no_name = of(LoggedValues::Plain, ("name", LoggedValues::None));
        assert_eq!(no_name, [[Some("1".to_owned()), Some("…".to_owned())]]);
        let only_id = of(LoggedValues::None, ("id", LoggedValues::Plain));
        assert_eq!(only_id, [[Some("1".to_owned()), Some("…".to_owned())]]);
    }

    #[test]
    fn a_key_is_made_once_and_only_its_owner_may_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mismatches.key");
        let key = load_or_create_key(&path).unwrap();
        assert_eq!(load_or_create_key(&path).unwrap(), key);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(load_or_create_key(&path).unwrap_err().to_string().contains("chmod 600"));
        std::fs::write(&path, "secret").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(load_or_create_key(&path).unwrap_err().to_string().contains("no key"));
    }
}
