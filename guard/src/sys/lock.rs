//! Owns locking a mutex whose holder may have panicked.
//! Called by everything that shares state between tasks.
//! Must never be used where a panic can leave the state half-changed: every holder changes it in one step.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks the mutex, poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
