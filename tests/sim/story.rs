//! What happens in a run, in words; only kept when somebody wants to read it.

use std::cell::RefCell;

thread_local! {
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
    static NOW_US: RefCell<u64> = const { RefCell::new(0) };
}

/// From now on this thread's run is told.
pub fn begin() {
    static LOGGER: Logger = Logger;
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
    LINES.set(Some(Vec::new()));
    set_now(0);
}

pub fn take() -> Vec<String> {
    LINES.take().unwrap_or_default()
}

pub fn set_now(now_us: u64) {
    NOW_US.set(now_us);
}

pub fn tell(words: impl FnOnce() -> String) {
    LINES.with_borrow_mut(|lines| {
        if let Some(lines) = lines {
            let now_us = NOW_US.with_borrow(|now| *now);
            lines.push(format!("{:>10.4} s  {}", now_us as f64 / 1e6, words()));
        }
    });
}

/// What the servers log belongs to it.
struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata) -> bool {
        LINES.with_borrow(Option::is_some)
    }
    fn log(&self, record: &log::Record) {
        tell(|| format!("    {}: {}", speaker(), record.args()));
    }
    fn flush(&self) {}
}

thread_local! {
    static SPEAKER: RefCell<String> = const { RefCell::new(String::new()) };
}

pub fn speaker() -> String {
    SPEAKER.with_borrow(String::clone)
}

/// Whose log it is.
pub fn speaks(server: &str) {
    SPEAKER.with_borrow_mut(|speaker| {
        speaker.clear();
        speaker.push_str(server);
    });
}
