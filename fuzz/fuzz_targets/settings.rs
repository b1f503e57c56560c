//! Settings of any text, one `name=value` in a line: no panic, and what is accepted can be used.

#![cfg_attr(fuzzing, no_main)]

use dovetail::settings::{check_server_name, Settings};

pub fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let values: Vec<(String, String)> = text.lines().filter_map(pair).collect();
    for parsed in [Settings::parse(&values, "host.example.org"), Settings::parse_of_user(&values, "host.example.org")] {
        match parsed {
            Ok(settings) => {
                assert_eq!(check_server_name(&settings.server), Ok(()));
                settings.peers.iter().for_each(|peer| assert_eq!(check_server_name(&peer.name), Ok(())));
            }
            Err(errors) => assert!(!errors.is_empty() && errors.iter().all(|error| !error.is_empty())),
        }
    }
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
