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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_here_and_the_failure_is_answered() {
        assert_eq!(guard("test", 1, || 2), 2);
        assert_eq!(guard("test", 1, || panic!("with {}", "words")), 1);
        assert_eq!(guard("test", 1, || std::panic::panic_any(7)), 1);
        let mut half_done = vec![1];
        guard("test", (), || {
            half_done.push(2);
            panic!("in the middle");
        });
        assert_eq!(half_done, [1, 2]);
    }
}
