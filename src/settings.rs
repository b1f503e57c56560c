//! The settings: their names, defaults and meaning, the same on Dovecot 2.3 (`plugin { }`) and 2.4 (top level).
//!
//! Pure: names and values in, a [`Settings`] or full sentences out. Values are plain strings in both versions, so that a
//! mistake of ours in dovecot.conf is reported by us and mail goes on, where Dovecot would refuse to start.
#![forbid(unsafe_code)]

use std::path::PathBuf;

/// Most bytes of a body that ride along with its change: a frame holds 64 KiB, and the rest of the change needs room.
pub const INLINE_BODY_SIZE_MAX: u64 = 48 * 1024;

/// In a userdb entry, for a user who is replicated with nobody.
const NO_PEERS: &str = "-";

/// Most peers of one server.
pub const PEERS_MAX: usize = 64;

/// A server that we replicate with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its `dovetail_server`.
    pub name: String,
    /// `host:port` of its relay; an IPv6 address stands in brackets.
    pub address: String,
}

/// All settings, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of this server: unique among its peers, and for ever.
    pub server: String,
    /// Whom we replicate with. Empty: nothing is replicated.
    pub peers: Vec<Peer>,
    /// Of a user whose userdb entry says so: with which of these his mail is replicated.
    pub user_peers: Option<Vec<String>>,
    /// The relay's Unix socket.
    pub socket: PathBuf,
    /// The workers' Unix socket.
    pub worker_socket: PathBuf,
    /// Workers that the relay keeps busy with changes.
    pub workers: usize,
    /// Plugins that a worker may load, if the user has them in mail_plugins.
    pub worker_plugins: Vec<String>,
    /// Bytes of unsent records that a mail process may hold.
    pub process_queue_size: u64,
    /// Bytes of unacknowledged changes that the relay may hold.
    pub relay_queue_size: u64,
    /// Folder of the relay's journal.
    pub state_dir: PathBuf,
    /// Bytes that the journal may hold for peers that are away.
    pub journal_size: u64,
    /// Days after which it holds them no more.
    pub journal_days: u64,
    /// In which time all users are compared with the peers once, in milliseconds; None: never.
    pub compare_interval_ms: Option<u64>,
    /// Bodies up to this many bytes ride along with their change.
    pub inline_body_size: u64,
    /// When a client is told that its mail is saved.
    pub ack: Ack,
    /// For how long it waits for that at most, in milliseconds.
    pub ack_timeout_ms: u64,
    /// It is told that it is not then, and the mail is taken back.
    pub ack_may_fail: bool,
    /// Allows plaintext connections outside of loopback.
    pub insecure_plaintext: bool,
    /// None: servers talk in plaintext.
    pub tls: Option<Tls>,
}

/// When a client is told that its mail is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// When it is saved here.
    Async,
    /// When the relay has it in its journal, too.
    Relay,
    /// When so many peers have applied it, or all of the user's if these are fewer.
    Peers(u32),
}

/// Where the relay finds what it proves itself with, and by what it knows its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Certificates of those who issue the peers'; none: each peer has a fingerprint.
    pub ca: Option<PathBuf>,
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Names of peers, and SHA-256 of a certificate that is theirs.
    pub fingerprints: Vec<(String, [u8; 32])>,
}

/// Everything that can be set, for checks of unknown names and for the documentation.
pub const NAMES: [&str; 21] = [
    "dovetail_server",
    "dovetail_peers",
    "dovetail_socket",
    "dovetail_worker_socket",
    "dovetail_workers",
    "dovetail_worker_plugins",
    "dovetail_process_queue_size",
    "dovetail_relay_queue_size",
    "dovetail_state_dir",
    "dovetail_journal_size",
    "dovetail_journal_days",
    "dovetail_compare_interval",
    "dovetail_inline_body_size",
    "dovetail_ack",
    "dovetail_ack_timeout",
    "dovetail_ack_on_timeout",
    "dovetail_ca",
    "dovetail_cert",
    "dovetail_key",
    "dovetail_peer_fingerprints",
    "dovetail_insecure_plaintext",
];

impl Settings {
    /// Checks `values` (name, value), as Dovecot gave them. `hostname` names the server where it has no name.
    ///
    /// # Errors
    ///
    /// All that is wrong, a full sentence each, that names the setting.
    pub fn parse(values: &[(String, String)], hostname: &str) -> Result<Settings, Vec<String>> {
        Settings::parse_any(values, hostname, false)
    }

    /// The same for a user: his userdb entry may have replaced `dovetail_peers` by the names of those that are his.
    ///
    /// # Errors
    ///
    /// As [`Settings::parse`].
    pub fn parse_of_user(values: &[(String, String)], hostname: &str) -> Result<Settings, Vec<String>> {
        Settings::parse_any(values, hostname, true)
    }

    fn parse_any(values: &[(String, String)], hostname: &str, of_user: bool) -> Result<Settings, Vec<String>> {
        let mut errors = Vec::new();
        for (name, _) in values {
            if name != "base_dir" && name != "state_dir" && !NAMES.contains(&name.as_str()) {
                errors.push(format!("Unknown setting {name}: there is no such setting of Dovetail"));
            }
        }
        let get = |name: &str| values.iter().rev().find(|(n, _)| n == name).map_or("", |(_, v)| v.trim());
        let base_dir = PathBuf::from(Some(get("base_dir")).filter(|d| !d.is_empty()).unwrap_or("/run/dovecot"));
        let state_dir = PathBuf::from(Some(get("state_dir")).filter(|d| !d.is_empty()).unwrap_or("/var/lib/dovecot"));
        let mut take = |result: Result<u64, String>, default: u64| {
            result.unwrap_or_else(|error| {
                errors.push(error);
                default
            })
        };
        let workers = take(parse_number("dovetail_workers", get("dovetail_workers"), 3, 2, 64), 3) as usize;
        let process_queue_size = take(
            parse_size("dovetail_process_queue_size", get("dovetail_process_queue_size"), 16 << 20, 128 << 10, 1 << 30),
            0,
        );
        let relay_queue_size = take(
            parse_size("dovetail_relay_queue_size", get("dovetail_relay_queue_size"), 256 << 20, 1 << 20, 1 << 40),
            0,
        );
        let journal_size =
            take(parse_size("dovetail_journal_size", get("dovetail_journal_size"), 1 << 30, 1 << 20, 1 << 50), 0);
        let journal_days = take(parse_number("dovetail_journal_days", get("dovetail_journal_days"), 7, 1, 3650), 7);
        let inline_body_size = take(
            parse_size(
                "dovetail_inline_body_size",
                get("dovetail_inline_body_size"),
                32 << 10,
                0,
                INLINE_BODY_SIZE_MAX,
            ),
            0,
        );
        let server = match get("dovetail_server") {
            "" => hostname.split('.').next().unwrap_or_default(),
            name => name,
        };
        if let Err(why) = check_server_name(server) {
            errors.push(format!("Invalid setting dovetail_server = {server}: {why}"));
        }
        let names = if of_user { parse_user_peers(get("dovetail_peers")) } else { Ok(None) };
        let peers = match &names {
            Ok(None) => parse_peers(get("dovetail_peers"), server),
            _ => Ok(Vec::new()),
        };
        let peers = peers.unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        });
        let user_peers = names.unwrap_or_else(|error| {
            errors.push(error);
            None
        });
        let count = user_peers.is_none().then_some(peers.len());
        let ack = parse_ack(get("dovetail_ack"), count).unwrap_or_else(|error| {
            errors.push(error);
            Ack::Async
        });
        let compare_interval_ms = match get("dovetail_compare_interval") {
            "0" | "no" => None,
            value => parse_interval("dovetail_compare_interval", value).map(Some).unwrap_or_else(|error| {
                errors.push(error);
                None
            }),
        };
        let ack_timeout_ms = parse_msecs("dovetail_ack_timeout", get("dovetail_ack_timeout"), 2_000, 10, 60_000)
            .unwrap_or_else(|error| {
                errors.push(error);
                0
            });
        let ack_may_fail = match get("dovetail_ack_on_timeout") {
            "" | "ok" => false,
            "fail" => true,
            other => {
                errors.push(format!("Invalid setting dovetail_ack_on_timeout = {other}: it must be ok or fail"));
                false
            }
        };
        let insecure_plaintext = match get("dovetail_insecure_plaintext") {
            "" | "no" => false,
            "yes" => true,
            other => {
                errors.push(format!("Invalid setting dovetail_insecure_plaintext = {other}: it must be yes or no"));
                false
            }
        };
        let known = user_peers.is_none().then_some(&peers[..]);
        let tls = parse_tls(get, known).unwrap_or_else(|error| {
            errors.push(error);
            None
        });
        if insecure_plaintext && tls.is_some() {
            let why = "it makes no sense together with dovetail_cert, by which all connections are TLS";
            errors.push(format!("Invalid setting dovetail_insecure_plaintext = yes: {why}"));
        }
        let or = |value: &str, default: &str| if value.is_empty() { default.to_owned() } else { value.to_owned() };
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Settings {
            server: server.to_owned(),
            peers,
            user_peers,
            socket: base_dir.join(or(get("dovetail_socket"), "dovetail")),
            worker_socket: base_dir.join(or(get("dovetail_worker_socket"), "dovetail-worker")),
            workers,
            worker_plugins: or(get("dovetail_worker_plugins"), "acl zlib mail_compress mail_crypt quota")
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            process_queue_size,
            relay_queue_size,
            state_dir: state_dir.join(or(get("dovetail_state_dir"), "dovetail")),
            journal_size,
            journal_days,
            compare_interval_ms,
            inline_body_size,
            ack,
            ack_timeout_ms,
            ack_may_fail,
            insecure_plaintext,
            tls,
        })
    }
}

/// A server's name stands in records, in status, in other servers' settings and in names of files.
///
/// # Errors
///
/// What it must be.
pub fn check_server_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 64 {
        return Err("a server's name has 1 to 64 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err("a server's name consists of letters, digits, '-', '_' and '.'");
    }
    Ok(())
}

fn parse_peers(value: &str, server: &str) -> Result<Vec<Peer>, String> {
    let mut peers: Vec<Peer> = Vec::new();
    for word in value.split([' ', '\t', ',']).filter(|w| !w.is_empty()) {
        let wrong = |why: &str| format!("Invalid setting dovetail_peers = {value}: {word}: {why}");
        let (name, address) = word
            .split_once('=')
            .ok_or_else(|| wrong("a peer is written as name=host:port, for example mx2=10.0.0.2:4190"))?;
        check_server_name(name).map_err(&wrong)?;
        let (host, port) =
            address.rsplit_once(':').ok_or_else(|| wrong("the port is missing; write name=host:port"))?;
        if host.is_empty() || port.parse::<u16>().map_or(true, |port| port == 0) {
            return Err(wrong("host:port is expected, with a port from 1 to 65535"));
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return Err(wrong("write an IPv6 address in brackets: name=[2001:db8::1]:4190"));
        }
        if name == server {
            return Err(wrong("this is the name of this server itself (dovetail_server)"));
        }
        if peers.iter().any(|peer| peer.name == name) {
            return Err(wrong("this peer is named twice"));
        }
        peers.push(Peer { name: name.to_owned(), address: address.to_owned() });
    }
    if peers.len() > PEERS_MAX {
        return Err(format!(
            "Invalid setting dovetail_peers: {} peers, but at most {PEERS_MAX} are possible",
            peers.len()
        ));
    }
    Ok(peers)
}

/// `known`: all peers, if it is these that are set.
fn parse_tls<'a>(get: impl Fn(&str) -> &'a str, known: Option<&[Peer]>) -> Result<Option<Tls>, String> {
    let file = |name: &str| match get(name) {
        "" => Ok(None),
        // What was in the file is not said: it may be the key.
        value if !value.starts_with('/') || value.contains(char::is_control) => {
            Err(format!("Invalid setting {name}: it must be the path of a file, from / on, without '<' in front"))
        }
        value => Ok(Some(PathBuf::from(value))),
    };
    let (ca, cert, key) = (file("dovetail_ca")?, file("dovetail_cert")?, file("dovetail_key")?);
    let fingerprints = parse_fingerprints(get("dovetail_peer_fingerprints"), known)?;
    let missing = |name: &str, why: &str| Err(format!("Invalid setting {name}: it is not set, and {why}"));
    let (cert, key) = match (cert, key) {
        (Some(cert), Some(key)) => (cert, key),
        (None, Some(_)) => return missing("dovetail_cert", "dovetail_key is"),
        (Some(_), None) => return missing("dovetail_key", "dovetail_cert is"),
        (None, None) if ca.is_some() => return missing("dovetail_cert", "dovetail_ca is"),
        (None, None) if !fingerprints.is_empty() => return missing("dovetail_cert", "dovetail_peer_fingerprints is"),
        (None, None) => return Ok(None),
    };
    let without = |peer: &&Peer| !fingerprints.iter().any(|(name, _)| *name == peer.name);
    match known.and_then(|known| known.iter().find(without)) {
        Some(peer) if ca.is_none() => {
            missing("dovetail_ca", &format!("peer {} has no fingerprint in dovetail_peer_fingerprints", peer.name))
        }
        _ => Ok(Some(Tls { ca, cert, key, fingerprints })),
    }
}

fn parse_fingerprints(value: &str, known: Option<&[Peer]>) -> Result<Vec<(String, [u8; 32])>, String> {
    let words = value.split([' ', '\t', ',']).filter(|word| !word.is_empty());
    let parse = |word: &str| {
        let wrong = |why: &str| format!("Invalid setting dovetail_peer_fingerprints: {word}: {why}");
        let (name, digits) = word.split_once('=').ok_or_else(|| wrong("it is written as name=fingerprint"))?;
        if known.is_some_and(|known| !known.iter().any(|peer| peer.name == name)) {
            return Err(wrong("this peer is not in dovetail_peers"));
        }
        let digits: Vec<u8> = digits.bytes().filter(|byte| *byte != b':').collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
        let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
        match bytes.and_then(|bytes| bytes.try_into().ok()) {
            Some(fingerprint) if is_hex => Ok((name.to_owned(), fingerprint)),
            _ => Err(wrong("a fingerprint is a SHA-256 in 64 hexadecimal digits (doveadm dovetail cert show)")),
        }
    };
    words.map(parse).collect()
}

/// None: it is not a user's but the server's own, or there is none.
fn parse_user_peers(value: &str) -> Result<Option<Vec<String>>, String> {
    if value.is_empty() || value.contains('=') {
        return Ok(None);
    }
    let names = value.split([' ', '\t', ',']).filter(|word| !word.is_empty());
    let names: Vec<String> = names.filter(|name| *name != NO_PEERS).map(str::to_owned).collect();
    match names.iter().find_map(|name| check_server_name(name).err()) {
        Some(why) => Err(format!("Invalid setting dovetail_peers = {value} of the userdb: {why}")),
        None if names.len() > PEERS_MAX => Err(format!(
            "Invalid setting dovetail_peers of the userdb: {} peers, but at most {PEERS_MAX} are possible",
            names.len()
        )),
        None => Ok(Some(names)),
    }
}

/// `count`: of the peers, if it is not the user's.
fn parse_ack(value: &str, count: Option<usize>) -> Result<Ack, String> {
    let wrong = |why: &str| Err(format!("Invalid setting dovetail_ack = {value}: {why}"));
    let peers = match value {
        "" | "async" => return Ok(Ack::Async),
        "relay" => return Ok(Ack::Relay),
        value => value.strip_prefix("peers:").and_then(|number| number.parse::<u32>().ok()),
    };
    match peers {
        Some(peers) if count.is_some_and(|count| peers as usize > count) => {
            wrong("there are not so many in dovetail_peers")
        }
        Some(peers) if peers > 0 => Ok(Ack::Peers(peers)),
        _ => wrong("it must be async, relay, or peers: and a number from 1 on, for example peers:1"),
    }
}

/// A time with one of the units that Dovecot's own settings have, `s` and `ms` in short or in full.
fn parse_msecs(name: &str, value: &str, default: u64, min: u64, max: u64) -> Result<u64, String> {
    if value.is_empty() {
        return Ok(default);
    }
    let digits = value.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match value[digits.len()..].trim() {
        "" | "s" | "sec" | "secs" | "second" | "seconds" => Some(1_000),
        "ms" | "msec" | "msecs" | "millisecond" | "milliseconds" => Some(1),
        _ => None,
    };
    let msecs = factor.and_then(|factor| digits.parse::<u64>().ok()?.checked_mul(factor));
    match msecs.filter(|msecs| (min..=max).contains(msecs)) {
        Some(msecs) => Ok(msecs),
        None => Err(format!(
            "Invalid setting {name} = {value}: it must be a time from {min} ms to {} s, for example 2s or 500ms",
            max / 1_000
        )),
    }
}

/// In milliseconds; by default a day.
fn parse_interval(name: &str, value: &str) -> Result<u64, String> {
    const DAY: u64 = 86_400_000;
    if value.is_empty() {
        return Ok(DAY);
    }
    let digits = value.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match value[digits.len()..].trim() {
        "s" | "sec" | "secs" | "second" | "seconds" => Some(1_000),
        "m" | "min" | "mins" | "minute" | "minutes" => Some(60_000),
        "h" | "hour" | "hours" => Some(3_600_000),
        "d" | "day" | "days" => Some(DAY),
        _ => None,
    };
    let msecs = factor.and_then(|factor| digits.parse::<u64>().ok()?.checked_mul(factor));
    match msecs.filter(|msecs| (5_000..=3650 * DAY).contains(msecs)) {
        Some(msecs) => Ok(msecs),
        None => Err(format!(
            "Invalid setting {name} = {value}: it must be a time from 5 s to 3650 d, for example 1d or 12h, or no"
        )),
    }
}

fn parse_number(name: &str, value: &str, default: u64, min: u64, max: u64) -> Result<u64, String> {
    if value.is_empty() {
        return Ok(default);
    }
    match value.parse::<u64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("Invalid setting {name} = {value}: it must be a number from {min} to {max}")),
    }
}

/// As Dovecot's `str_parse_get_size()`: a number of bytes, or with one of the units B, k, M, G, T (powers of 1024).
fn parse_size(name: &str, value: &str, default: u64, min: u64, max: u64) -> Result<u64, String> {
    if value.is_empty() {
        return Ok(default);
    }
    let unit_at = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (digits, unit) = value.split_at(unit_at);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" | "kb" | "ki" | "kib" => Some(10),
        "m" | "mb" | "mi" | "mib" => Some(20),
        "g" | "gb" | "gi" | "gib" => Some(30),
        "t" | "tb" | "ti" | "tib" => Some(40),
        _ => None,
    };
    let bytes = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if (min..=max).contains(&bytes) => Ok(bytes),
        Some(_) => Err(format!("Invalid setting {name} = {value}: it must be from {min} to {max} bytes")),
        None => Err(format!("Invalid setting {name} = {value}: it must be a size such as 16M")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(values: &[(&str, &str)]) -> Result<Settings, Vec<String>> {
        let values: Vec<_> = values.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        Settings::parse(&values, "mx1.example.org")
    }

    #[test]
    fn nothing_set_gives_the_defaults() {
        let settings = parse(&[("base_dir", "/run/dovecot")]).unwrap();
        assert_eq!(settings.server, "mx1");
        assert!(settings.peers.is_empty());
        assert_eq!(settings.socket, PathBuf::from("/run/dovecot/dovetail"));
        assert_eq!(settings.process_queue_size, 16 << 20);
        assert_eq!(settings.relay_queue_size, 256 << 20);
        assert_eq!(settings.inline_body_size, 32 << 10);
        assert_eq!(settings.state_dir, PathBuf::from("/var/lib/dovecot/dovetail"));
        assert_eq!((settings.journal_size, settings.journal_days), (1 << 30, 7));
        assert_eq!((settings.ack, settings.ack_timeout_ms, settings.ack_may_fail), (Ack::Async, 2_000, false));
    }

    #[test]
    fn all_users_are_compared_as_often_as_the_admin_wants() {
        let day = 86_400_000;
        let every = |value| parse(&[("dovetail_compare_interval", value)]).unwrap().compare_interval_ms;
        assert_eq!(every(""), Some(day));
        assert_eq!((every("no"), every("0")), (None, None));
        for (value, msecs) in [("5s", 5_000), ("30 mins", 1_800_000), ("12h", day / 2), ("7d", 7 * day)] {
            assert_eq!(every(value), Some(msecs), "{value}");
        }
    }

    #[test]
    fn acknowledgements_are_as_the_admin_wants_them() {
        let peers = ("dovetail_peers", "b=h:1 c=h:1");
        for (value, ack) in
            [("async", Ack::Async), ("relay", Ack::Relay), ("peers:1", Ack::Peers(1)), ("peers:2", Ack::Peers(2))]
        {
            assert_eq!(parse(&[peers, ("dovetail_ack", value)]).unwrap().ack, ack);
        }
        for (value, msecs) in [("3", 3_000), ("3s", 3_000), ("3 secs", 3_000), ("250ms", 250), ("250 msecs", 250)] {
            assert_eq!(parse(&[("dovetail_ack_timeout", value)]).unwrap().ack_timeout_ms, msecs);
        }
        assert!(parse(&[("dovetail_ack_on_timeout", "fail")]).unwrap().ack_may_fail);
        // A user with fewer peers waits for those that he has.
        let of_user = [("dovetail_peers", "b"), ("dovetail_ack", "peers:2")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        assert_eq!(Settings::parse_of_user(&of_user, "mx1").unwrap().ack, Ack::Peers(2));
    }

    #[test]
    fn a_full_configuration_is_understood() {
        let settings = parse(&[
            ("dovetail_server", "a"),
            ("dovetail_peers", "b=127.0.0.1:4191  c=[::1]:4192"),
            ("dovetail_process_queue_size", "1M"),
            ("dovetail_workers", "4"),
            ("dovetail_insecure_plaintext", "yes"),
        ])
        .unwrap();
        assert_eq!(settings.peers.len(), 2);
        assert_eq!(settings.peers[1], Peer { name: "c".into(), address: "[::1]:4192".into() });
        assert_eq!(settings.process_queue_size, 1 << 20);
        assert_eq!(settings.workers, 4);
        assert!(settings.insecure_plaintext);
    }

    #[test]
    fn every_mistake_is_named_with_its_setting() {
        for (name, value, word) in [
            ("dovetail_foo", "1", "Unknown setting dovetail_foo"),
            ("dovetail_peers", "nonsense", "name=host:port"),
            ("dovetail_peers", "b=127.0.0.1", "port"),
            ("dovetail_peers", "b=::1:4190", "brackets"),
            ("dovetail_peers", "b=h:0", "port"),
            ("dovetail_peers", "mx1=127.0.0.1:1", "itself"),
            ("dovetail_peers", "b=h:1 b=h:2", "twice"),
            ("dovetail_workers", "1", "2 to 64"),
            ("dovetail_workers", "many", "2 to 64"),
            ("dovetail_process_queue_size", "16X", "16M"),
            ("dovetail_process_queue_size", "99999999999999999999", "16M"),
            ("dovetail_inline_body_size", "1M", "49152"),
            ("dovetail_server", "a b", "letters"),
            ("dovetail_ack", "peers:0", "from 1 on"),
            ("dovetail_ack", "peers", "from 1 on"),
            ("dovetail_ack", "peers:1", "not so many in dovetail_peers"),
            ("dovetail_ack_timeout", "5m", "500ms"),
            ("dovetail_ack_timeout", "0", "500ms"),
            ("dovetail_compare_interval", "1", "12h"),
            ("dovetail_compare_interval", "1s", "12h"),
            ("dovetail_compare_interval", "never", "12h"),
            ("dovetail_compare_interval", "99999999999999999999d", "12h"),
            ("dovetail_ack_on_timeout", "maybe", "ok or fail"),
            ("dovetail_insecure_plaintext", "maybe", "yes or no"),
            ("dovetail_ca", "ca.pem", "path of a file"),
            ("dovetail_cert", "/a.pem", "dovetail_key: it is not set"),
            ("dovetail_key", "/a.key", "dovetail_cert: it is not set"),
            ("dovetail_ca", "/ca.pem", "dovetail_cert: it is not set"),
            ("dovetail_peer_fingerprints", "b", "name=fingerprint"),
            ("dovetail_peer_fingerprints", "b=00", "not in dovetail_peers"),
        ] {
            let errors = parse(&[(name, value)]).unwrap_err();
            assert_eq!(errors.len(), 1, "{errors:?}");
            assert!(errors[0].contains(name) && errors[0].contains(word), "{errors:?}");
        }
    }

    const TLS: [(&str, &str); 4] = [
        ("dovetail_peers", "b=h:1"),
        ("dovetail_cert", "/a.pem"),
        ("dovetail_key", "/a.key"),
        ("dovetail_ca", "/ca.pem"),
    ];

    #[test]
    fn peers_are_known_by_an_authority_or_by_fingerprints() {
        assert_eq!(parse(&TLS[..1]).unwrap().tls, None);
        let tls = parse(&TLS).unwrap().tls.unwrap();
        assert_eq!((tls.ca, tls.key), (Some("/ca.pem".into()), "/a.key".into()));

        let digits = "0A:".repeat(31) + "ff";
        let value = format!("b={digits}");
        let pinned = ("dovetail_peer_fingerprints", value.as_str());
        let tls = parse(&[TLS[0], TLS[1], TLS[2], pinned]).unwrap().tls.unwrap();
        assert_eq!((tls.ca, tls.fingerprints[0].0.as_str()), (None, "b"));
        assert_eq!((tls.fingerprints[0].1[30], tls.fingerprints[0].1[31]), (10, 255));
    }

    #[test]
    fn half_of_what_tls_needs_is_a_mistake() {
        let more = |name: &'static str, value: &'static str| parse(&[&TLS[..], &[(name, value)]].concat()).unwrap_err();
        assert!(parse(&TLS[..3]).unwrap_err()[0].contains("dovetail_ca: it is not set, and peer b has no fingerprint"));
        assert!(
            more("dovetail_insecure_plaintext", "yes")[0].contains("dovetail_insecure_plaintext = yes: it makes no")
        );
        for digits in ["b=00", "b=+1", "b=zz", "b="] {
            assert!(more("dovetail_peer_fingerprints", digits)[0].contains("64 hexadecimal digits"));
        }
        assert!(more("dovetail_peer_fingerprints", "c=00")[0].contains("not in dovetail_peers"));
    }

    /// As Dovecot 2.3 gives it for `dovetail_key = </etc/key`.
    #[test]
    fn a_key_in_the_place_of_its_file_is_not_said() {
        let key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n-----END PRIVATE KEY-----";
        let errors = parse(&[&TLS[..], &[("dovetail_key", key)]].concat()).unwrap_err();
        assert!(errors.len() == 1 && errors[0].contains("without '<'") && !errors[0].contains("BEGIN"), "{errors:?}");
    }

    #[test]
    fn a_user_whose_peers_are_others_has_the_servers_fingerprints() {
        let digits = "b=".to_owned() + &"00".repeat(32);
        let values = [("dovetail_peers", "c"), TLS[1], TLS[2], ("dovetail_peer_fingerprints", &digits)];
        let values: Vec<_> = values.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        assert!(Settings::parse_of_user(&values, "a.test").unwrap().tls.is_some());
    }

    #[test]
    fn a_users_peers_are_names() {
        let of_user = |value: &str| Settings::parse_of_user(&[("dovetail_peers".into(), value.into())], "a.test");
        let names = |value: &str| of_user(value).unwrap().user_peers;
        assert_eq!(names("b c"), Some(vec!["b".to_owned(), "c".to_owned()]));
        assert_eq!(names("-"), Some(vec![]));
        assert_eq!(names("b=127.0.0.1:4190"), None);
        assert_eq!(names(""), None);
        assert_eq!(of_user("b=127.0.0.1:4190").unwrap().peers.len(), 1);
        assert!(of_user("b/c").unwrap_err()[0].contains("of the userdb"));
        assert!(Settings::parse(&[("dovetail_peers".into(), "b c".into())], "a.test").is_err());
    }
}
