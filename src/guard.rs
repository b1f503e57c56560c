//! The panic boundary: nothing of ours may unwind into C, and no panic of ours may end a user's session.

use std::panic::{catch_unwind, AssertUnwindSafe};

/// Runs `f`; if it panics, logs that with `what` and answers `failure`.
pub fn guard<T>(what: &str, failure: T, f: impl FnOnce() -> T) -> T {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(value) => value,
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "unknown panic".into());
            log::error!("Internal error in {what}: {text} - mail goes on, this change may not be replicated");
            failure
        }
    }
}
