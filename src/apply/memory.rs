//! What outlives the applier's sessions, which end with every error: how much was refused lately
//! and how often an unclear error has come back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::threshold::{ErrorWindow, TooMany};
use crate::config::Writes;

#[derive(Default)]
pub(super) struct Memory {
    window: Mutex<ErrorWindow>,
    /// After which round, and how often there.
    unclear: Mutex<(u64, u32)>,
    /// An operator said to go on after a halt.
    go_on: AtomicBool,
}

impl Memory {
    /// Whether an unclear error after this round is worth another attempt, which is counted.
    pub(super) fn try_again(&self, round: u64, writes: &Writes) -> bool {
        let mut unclear = lock(&self.unclear);
        if unclear.0 != round {
            *unclear = (round, 0);
        }
        let again = unclear.1 < writes.retry_attempts;
        unclear.1 += u32::from(again);
        again
    }

    pub(super) fn count(&self, transactions: u64, errors: u64, writes: &Writes) -> Result<(), TooMany> {
        lock(&self.window).count(Instant::now(), transactions, errors, writes)
    }

    pub(super) fn say_go_on(&self) {
        self.go_on.store(true, Ordering::SeqCst);
    }

    /// True once for each time it was said.
    pub(super) fn may_go_on(&self) -> bool {
        let said = self.go_on.swap(false, Ordering::SeqCst);
        if said {
            lock(&self.window).forget();
        }
        said
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unclear_errors_are_counted_by_round() {
        let (memory, writes) = (Memory::default(), Writes::default());
        for _ in 0..writes.retry_attempts {
            assert!(memory.try_again(7, &writes));
        }
        assert!(!memory.try_again(7, &writes));
        assert!(!memory.try_again(7, &writes), "permanent from then on");
        assert!(memory.try_again(8, &writes));
    }

    #[test]
    fn going_on_is_said_once() {
        let memory = Memory::default();
        assert!(!memory.may_go_on());
        memory.say_go_on();
        assert!(memory.may_go_on());
        assert!(!memory.may_go_on());
    }
}
