//! Remembers the scripts of texts seen before: applications send the same texts over and over.
//!
//! Bounded twice: at most [`TEXTS_MAX`] texts and [`BYTES_MAX`] bytes of them; a text longer
//! than [`TEXT_BYTES_MAX`] is analysed each time. Eviction is crude on purpose: there are two
//! generations; when the newer is full, the older is emptied and becomes the newer. A text
//! found in the older moves to the newer, so what is used survives, and a hit in the newer one
//! writes nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::analyze_as;
use super::class::Script;
use super::lexer::LexSettings;

const TEXTS_MAX: usize = 20_000;
const BYTES_MAX: usize = 16 * 1024 * 1024;
/// Longer texts are mostly bulk inserts with their values spelled out: never seen again.
const TEXT_BYTES_MAX: usize = 16 * 1024;

/// Shared by all sessions.
#[derive(Default)]
pub struct StatementCache {
    generations: [Generation; 2],
    /// Index of the newer generation; changed only while `turning` is held.
    newer: AtomicUsize,
    turning: Mutex<()>,
}

#[derive(Default)]
struct Generation {
    /// By a hash of text and settings; the text itself is compared on every hit.
    texts: DashMap<u64, Entry>,
    bytes: AtomicUsize,
}

#[derive(Clone)]
struct Entry {
    text: Arc<[u8]>,
    settings: LexSettings,
    script: Arc<Script>,
}

impl StatementCache {
    /// The script of a text under default settings.
    pub fn get(&self, text: &[u8]) -> Arc<Script> {
        self.get_as(text, LexSettings::default())
    }

    /// The script of a text under a session's settings. A hit allocates nothing.
    pub fn get_as(&self, text: &[u8], settings: LexSettings) -> Arc<Script> {
        if text.len() > TEXT_BYTES_MAX {
            return Arc::new(analyze_as(text, settings));
        }
        let seed = u64::from(settings.standard_conforming_strings) | (settings.encoding as u64) << 1;
        let hash = xxh3_64_with_seed(text, seed);
        let newer = self.newer.load(Ordering::Relaxed);
        if let Some(entry) = self.generations[newer].texts.get(&hash)
            && *entry.text == *text
            && entry.settings == settings
        {
            return entry.script.clone();
        }
        let kept = self.generations[1 - newer].texts.get(&hash).map(|entry| entry.clone());
        let entry = match kept {
            Some(entry) if *entry.text == *text && entry.settings == settings => entry,
            _ => Entry {
                text: text.into(),
                settings,
                script: Arc::new(analyze_as(text, settings)),
            },
        };
        let script = entry.script.clone();
        self.keep(hash, entry);
        script
    }

    /// Texts kept, for metrics.
    pub fn len(&self) -> usize {
        self.generations.iter().map(|generation| generation.texts.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn keep(&self, hash: u64, entry: Entry) {
        let weight = entry.text.len();
        let newer = self.newer.load(Ordering::Relaxed);
        let mut generation = &self.generations[newer];
        if generation.texts.len() >= TEXTS_MAX / 2 || generation.bytes.load(Ordering::Relaxed) + weight > BYTES_MAX / 2
        {
            let _turning = self.turning.lock().unwrap_or_else(PoisonError::into_inner);
            // Another session may have turned it meanwhile; once is enough.
            if self.newer.load(Ordering::Relaxed) == newer {
                let older = &self.generations[1 - newer];
                older.texts.clear();
                older.bytes.store(0, Ordering::Relaxed);
                self.newer.store(1 - newer, Ordering::Relaxed);
            }
            generation = &self.generations[self.newer.load(Ordering::Relaxed)];
        }
        // Of two texts with one hash the later one stays; the other is analysed each time.
        let replaced = generation.texts.insert(hash, entry);
        generation.bytes.fetch_add(weight, Ordering::Relaxed);
        if let Some(replaced) = replaced {
            generation.bytes.fetch_sub(replaced.text.len(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_look_gives_the_same_script() {
        let cache = StatementCache::default();
        let first = cache.get(b"select 1");
        assert!(Arc::ptr_eq(&first, &cache.get(b"select 1")));
        let other = LexSettings {
            standard_conforming_strings: false,
            ..LexSettings::default()
        };
        assert!(!Arc::ptr_eq(&first, &cache.get_as(b"select 1", other)));
    }

    #[test]
    fn it_stays_within_its_bounds() {
        let cache = StatementCache::default();
        let kept = cache.get(b"commit");
        for number in 0..TEXTS_MAX * 2 {
            cache.get(format!("set x.y = {number}").as_bytes());
            if number % 1000 == 0 {
                assert!(Arc::ptr_eq(&kept, &cache.get(b"commit")), "what is used survives");
            }
        }
        assert!(cache.len() <= TEXTS_MAX);
        let long = format!("set x.y = '{}'", "x".repeat(TEXT_BYTES_MAX - 20));
        for number in 0..3000 {
            cache.get(long.replace("x.y", &format!("x.y{number}")).as_bytes());
        }
        let bytes: usize = cache
            .generations
            .iter()
            .map(|generation| generation.bytes.load(Ordering::Relaxed))
            .sum();
        assert!(bytes <= BYTES_MAX);
        let before = cache.len();
        cache.get("x".repeat(TEXT_BYTES_MAX + 1).as_bytes());
        assert_eq!(cache.len(), before);
    }
}
