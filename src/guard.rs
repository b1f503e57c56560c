//! The panic boundary: nothing of ours may unwind into C, and no panic of ours may end a user's session.

use std::panic::{catch_unwind, AssertUnwindSafe};

/// Runs `f`; if it panics, logs that with `what` and answers `failure`.
pub fn guard<T>(what: &str, failure: T, f: impl FnOnce() -> T) -> T {
    catch(what, f).unwrap_or(failure)
}

/// Runs `f`; None if it panics, which is logged with `what`.
pub fn catch<T>(what: &str, f: impl FnOnce() -> T) -> Option<T> {
    let run = || {
        provoke(what);
        f()
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(value) => Some(value),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "unknown panic".into());
            log::error!("Internal error in {what}: {text} - mail goes on");
            None
        }
    }
}

/// Where the tests want a panic, see tests/e2e/panics.rs. In a build without this feature there is nothing of it.
#[cfg(not(feature = "panics"))]
pub fn provoke(_what: &str) {}

/// Panics if there is a file of this name in the folder DOVETAIL_PANICS, and removes it.
#[cfg(feature = "panics")]
pub fn provoke(what: &str) {
    let Some(folder) = std::env::var_os("DOVETAIL_PANICS") else { return };
    if std::fs::remove_file(std::path::Path::new(&folder).join(what)).is_ok() {
        panic!("provoked");
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
