//! The net difference that a round's changes make to one table. Pure.
//!
//! Every change consumes one old image and produces one new one. So, whatever the order in
//! which triggers, transactions and sessions interleaved,
//!
//! > rows now = rows before − all old images + all new images
//!
//! as multisets. What stands on both sides cancels: what is left must be there exactly once for
//! each old image, and is added for each new one.

use std::collections::HashMap;

/// An image: one row as the server writes it.
pub type Image<'a> = &'a [u8];

/// What is left of a table's changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference<'a> {
    /// A TRUNCATE came: what was there before is gone, whatever it was.
    pub cleared: bool,
    /// Old images that are left, each as often as it must be found.
    pub gone: Vec<Image<'a>>,
    /// New images that are left, each as often as it must be added.
    pub come: Vec<Image<'a>>,
}

impl Difference<'_> {
    pub fn is_empty(&self) -> bool {
        !self.cleared && self.gone.is_empty() && self.come.is_empty()
    }

    pub fn rows(&self) -> usize {
        self.gone.len() + self.come.len()
    }
}

/// The net difference of `(old, new)` images, in the order of their first appearance: it
/// decides nothing, and keeps the secondary's rows roughly where the primary has them.
pub fn net<'a>(changes: impl IntoIterator<Item = (Option<Image<'a>>, Option<Image<'a>>)>) -> Difference<'a> {
    let mut entries: Vec<(Image<'a>, i64)> = Vec::new();
    let mut index: HashMap<Image<'a>, usize> = HashMap::new();
    let mut count = |image: Image<'a>, by: i64| {
        let at = *index.entry(image).or_insert_with(|| {
            entries.push((image, 0));
            entries.len() - 1
        });
        entries[at].1 += by;
    };
    for (old, new) in changes {
        if old == new {
            continue;
        }
        if let Some(old) = old {
            count(old, -1);
        }
        if let Some(new) = new {
            count(new, 1);
        }
    }
    let mut difference = Difference::default();
    for (image, left) in entries {
        let side = if left < 0 {
            &mut difference.gone
        } else {
            &mut difference.come
        };
        side.extend(std::iter::repeat_n(image, left.unsigned_abs() as usize));
    }
    difference
}

/// A difference by the way it is written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Paired<'a> {
    pub deletes: Vec<Image<'a>>,
    /// Old and new image of a row that keeps its key.
    pub updates: Vec<(Image<'a>, Image<'a>)>,
    pub inserts: Vec<Image<'a>>,
}

/// Joins an old and a new image with the same key into an update, which the server can write
/// without touching indexes. Only for tables whose key is their only unique or exclusion
/// constraint: with a second one, an update could meet a value that another update has yet to
/// give up, while deletes that all come first cannot.
pub fn pair<'a>(difference: &Difference<'a>, key: impl Fn(Image<'a>) -> Option<Vec<u8>>) -> Paired<'a> {
    let mut paired = Paired::default();
    let mut olds: HashMap<Vec<u8>, usize> = HashMap::with_capacity(difference.gone.len());
    let mut kept = vec![false; difference.gone.len()];
    for (at, old) in difference.gone.iter().enumerate() {
        if let Some(key) = key(old) {
            olds.entry(key).or_insert(at);
        }
    }
    for &new in &difference.come {
        match key(new).and_then(|key| olds.remove(&key)) {
            Some(at) => {
                kept[at] = true;
                paired.updates.push((difference.gone[at], new));
            }
            None => paired.inserts.push(new),
        }
    }
    let deletes = difference.gone.iter().zip(kept).filter(|(_, kept)| !kept);
    paired.deletes.extend(deletes.map(|(old, _)| *old));
    paired
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Pair = (Option<&'static str>, Option<&'static str>);

    fn check(changes: &[Pair], gone: &[&str], come: &[&str]) {
        let bytes = |text: &'static str| text.as_bytes();
        let difference = net(changes.iter().map(|(old, new)| (old.map(bytes), new.map(bytes))));
        let texts = |images: &[Image<'_>]| -> Vec<String> {
            images
                .iter()
                .map(|image| String::from_utf8_lossy(image).into_owned())
                .collect()
        };
        assert_eq!(texts(&difference.gone), gone, "gone of {changes:?}");
        assert_eq!(texts(&difference.come), come, "come of {changes:?}");
    }

    #[test]
    fn what_cancels_and_what_is_left() {
        check(&[], &[], &[]);
        check(&[(None, Some("a"))], &[], &["a"]);
        check(&[(Some("a"), None)], &["a"], &[]);
        check(&[(None, Some("a")), (Some("a"), None)], &[], &[]);
        // Deleted and put back.
        check(&[(Some("a"), None), (None, Some("a"))], &[], &[]);
        // A chain of updates is one.
        check(&[(Some("a"), Some("b")), (Some("b"), Some("c"))], &["a"], &["c"]);
        // The same chain as an application's trigger may make it appear: the later first.
        check(&[(Some("b"), Some("c")), (Some("a"), Some("b"))], &["a"], &["c"]);
        // There and back.
        check(&[(Some("a"), Some("b")), (Some("b"), Some("a"))], &[], &[]);
        // An update that changes nothing needs no row.
        check(&[(Some("a"), Some("a"))], &[], &[]);
        // Two rows alike, in a table without a key.
        check(&[(None, Some("a")), (None, Some("a")), (Some("a"), None)], &[], &["a"]);
        check(&[(Some("a"), None), (Some("a"), None)], &["a", "a"], &[]);
        // Swapped keys.
        check(
            &[(Some("1x"), Some("2x")), (Some("2y"), Some("1y"))],
            &["1x", "2y"],
            &["2x", "1y"],
        );
    }

    #[test]
    fn pairs_by_key() {
        let difference = Difference {
            cleared: false,
            gone: vec![b"1a", b"2a", b"3a"],
            come: vec![b"2b", b"4b", b"1b"],
        };
        let paired = pair(&difference, |image| Some(image[..1].to_vec()));
        assert_eq!(paired.deletes, [b"3a"]);
        assert_eq!(paired.updates, [(&b"2a"[..], &b"2b"[..]), (b"1a", b"1b")]);
        assert_eq!(paired.inserts, [b"4b"]);
        // No key can be read from the image: nothing is paired, nothing is lost.
        let paired = pair(&difference, |_| None);
        assert_eq!(
            (paired.deletes.len(), paired.updates.len(), paired.inserts.len()),
            (3, 0, 3)
        );
    }

    proptest! {
        /// Against the naive model: rows changed one by one in a list. The journal's order is
        /// shuffled, which must not matter.
        #[test]
        fn equals_the_naive_model(
            start in vec(0_u8..6, 0..12),
            steps in vec((any::<prop::sample::Index>(), prop::option::of(0_u8..6), any::<bool>()), 0..40),
            shuffle in vec(any::<u32>(), 40),
        ) {
            let mut rows = start.clone();
            let mut changes: Vec<(Option<u8>, Option<u8>)> = Vec::new();
            for (at, value, insert) in steps {
                if insert || rows.is_empty() {
                    let new = value.unwrap_or(0);
                    rows.push(new);
                    changes.push((None, Some(new)));
                } else {
                    let at = at.index(rows.len());
                    let old = rows.swap_remove(at);
                    if let Some(new) = value {
                        rows.push(new);
                    }
                    changes.push((Some(old), value));
                }
            }
            let mut order: Vec<usize> = (0..changes.len()).collect();
            order.sort_by_key(|&index| shuffle[index]);
            let names: Vec<[u8; 1]> = (0..6).map(|value| [value]).collect();
            let image = |value: Option<u8>| value.map(|value| &names[value as usize][..]);
            let difference = net(order.iter().map(|&index| (image(changes[index].0), image(changes[index].1))));

            let mut mirrored = start;
            for old in &difference.gone {
                let found = mirrored.iter().position(|row| *row == old[0]);
                prop_assert!(found.is_some(), "an old image that is not there");
                mirrored.swap_remove(found.unwrap());
            }
            mirrored.extend(difference.come.iter().map(|image| image[0]));
            mirrored.sort_unstable();
            rows.sort_unstable();
            prop_assert_eq!(mirrored, rows);
        }

        /// Pairing keeps both multisets.
        #[test]
        fn pairing_loses_nothing(gone in vec((0_u8..8, 0_u8..4), 0..20), come in vec((0_u8..8, 0_u8..4), 0..20)) {
            let gone: Vec<[u8; 2]> = gone.into_iter().map(|(key, value)| [key, value]).collect();
            let come: Vec<[u8; 2]> = come.into_iter().map(|(key, value)| [key, value]).collect();
            let difference = net(gone.iter().map(|image| (Some(&image[..]), None)).chain(come.iter().map(|image| (None, Some(&image[..])))));
            let paired = pair(&difference, |image| Some(image[..1].to_vec()));
            let mut olds = paired.deletes.clone();
            olds.extend(paired.updates.iter().map(|update| update.0));
            let mut news = paired.inserts.clone();
            news.extend(paired.updates.iter().map(|update| update.1));
            for (mut left, mut right) in [(olds, difference.gone), (news, difference.come)] {
                left.sort_unstable();
                right.sort_unstable();
                prop_assert_eq!(left, right);
            }
        }
    }
}
