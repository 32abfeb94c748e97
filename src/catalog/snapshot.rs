//! A transaction snapshot as `pg_snapshot` writes it: `xmin:xmax:xip,xip,…`. Pure.

use std::fmt;
use std::str::FromStr;

/// Which transactions had ended when it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    /// In progress then; ascending, all in `xmin..xmax`.
    in_progress: Vec<u64>,
}

/// A text that is not a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a transaction snapshot")]
pub struct NotASnapshot(String);

impl Snapshot {
    /// The snapshot that sees nothing: a journal read since then is read from its beginning.
    /// 3 is the first transaction id that Postgres gives out.
    pub const fn before_everything() -> Self {
        Self {
            xmin: 3,
            xmax: 3,
            in_progress: Vec::new(),
        }
    }

    /// Every transaction below had ended.
    pub const fn xmin(&self) -> u64 {
        self.xmin
    }

    /// No transaction from here on had ended.
    pub const fn xmax(&self) -> u64 {
        self.xmax
    }

    pub fn in_progress(&self) -> &[u64] {
        &self.in_progress
    }

    /// Whether the transaction had ended (committed or not).
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }

    /// Whether everything that `other` sees is seen by this one as well.
    pub fn covers(&self, other: &Self) -> bool {
        self.xmax >= other.xmax && self.in_progress.iter().all(|&xid| !other.sees(xid))
    }
}

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(text: &str) -> Result<Self, NotASnapshot> {
        let parse = || {
            let mut parts = text.split(':');
            let xmin = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let list = parts.next()?;
            let mut in_progress = Vec::new();
            for item in list.split(',').filter(|item| !item.is_empty()) {
                in_progress.push(item.parse().ok()?);
            }
            let sorted = in_progress.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = in_progress.iter().all(|xid| (xmin..xmax).contains(xid));
            (parts.next().is_none() && xmin <= xmax && sorted && inside).then_some(Self {
                xmin,
                xmax,
                in_progress,
            })
        };
        parse().ok_or_else(|| NotASnapshot(text.to_owned()))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (index, xid) in self.in_progress.iter().enumerate() {
            write!(f, "{}{xid}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().unwrap()
    }

    #[test]
    fn reads_and_writes_what_postgres_writes() {
        for text in [
            "3:3:",
            "10:20:10,14,19",
            "10:10:",
            "7:9:8",
            "18446744073709551614:18446744073709551615:",
        ] {
            assert_eq!(snapshot(text).to_string(), text);
        }
    }

    #[test]
    fn refuses_anything_else() {
        for text in [
            "",
            "1",
            "1:2",
            "2:1:",
            "1:3:2,2",
            "1:3:3",
            "1:3:0",
            "1:2:3:4",
            "a:b:c",
            "10:20:14,12",
            "1:2:x",
        ] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }

    #[test]
    fn sees() {
        let taken = snapshot("10:20:10,14");
        for (xid, seen) in [
            (3, true),
            (9, true),
            (10, false),
            (11, true),
            (14, false),
            (19, true),
            (20, false),
            (99, false),
        ] {
            assert_eq!(taken.sees(xid), seen, "{xid}");
        }
        assert!(!Snapshot::before_everything().sees(3));
    }

    #[test]
    fn covers() {
        for (this, that, answer) in [
            ("10:20:10,14", "10:20:10,14", true),
            ("10:20:10", "10:20:10,14", true),
            ("10:20:10,14", "10:20:10", false),
            ("10:21:20", "10:20:10", true),
            ("10:20:", "10:21:20", false),
            ("30:30:", "10:20:10,14", true),
            ("15:30:15", "10:16:15", true),
            ("15:30:15", "16:16:", false),
            ("3:3:", "3:3:", true),
        ] {
            assert_eq!(snapshot(this).covers(&snapshot(that)), answer, "{this} covers {that}");
        }
    }
}
