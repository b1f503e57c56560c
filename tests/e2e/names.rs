//! Names of mailboxes: all that Dovecot takes, on servers that write them in different ways.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cluster::imap::Imap;
use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, Scene, SOON};

/// A change that can never be applied is tried three times.
const SET_ASIDE_DEADLINE: Duration = Duration::from_secs(60);

/// How two servers write names.
#[derive(Clone, Copy)]
enum Pair {
    /// Both by slashes.
    Slashes,
    /// The second by dots, below the prefix that servers with dots mostly have.
    Prefixed,
    /// The first by dots; the second by slashes in a storage that separates by dots.
    Dots,
    /// The second by dots, too, both in storages that take long names.
    Long,
}

fn cluster(pair: Pair) -> Arc<Cluster> {
    static CLUSTERS: [OnceLock<Arc<Cluster>>; 4] = [const { OnceLock::new() }; 4];
    CLUSTERS[pair as usize].get_or_init(|| Arc::new(start(pair))).clone()
}

fn start(pair: Pair) -> Cluster {
    let [a, b] = match pair {
        Pair::Slashes => [Setup::new("a", Format::Sdbox), Setup::new("b", Format::Mdbox)],
        Pair::Prefixed => [Setup::new("a", Format::Sdbox), Setup::new("b", Format::Maildir).names("INBOX.", '.')],
        Pair::Dots => [Setup::new("a", Format::Mdbox).names("", '.'), Setup::new("b", Format::Maildir)],
        Pair::Long => [Setup::new("a", Format::Sdbox), Setup::new("b", Format::Mdbox).names("INBOX.", '.')],
    };
    let cluster = Cluster::start(vec![a, b]);
    match pair {
        Pair::Slashes => cluster,
        // A maildir has no folders for what is only above a mailbox, and none that stay when that is gone.
        Pair::Prefixed | Pair::Dots | Pair::Long => cluster.ignoring_empty_folders(),
    }
}

/// In modified UTF-7 (RFC 3501, 5.1.3), quoted.
fn quoted(name: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+,";
    let mut out = String::from("\"");
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        let foreign = rest.find(|c| (' '..='~').contains(&c)).unwrap_or(rest.len());
        if foreign == 0 {
            match c {
                '&' => out += "&-",
                '"' | '\\' => out.extend(['\\', c]),
                _ => out.push(c),
            }
            rest = &rest[1..];
            continue;
        }
        let bits = rest[..foreign].encode_utf16().flat_map(|unit| (0..16).rev().map(move |bit| unit >> bit & 1));
        let bits: Vec<u16> = bits.collect();
        out.push('&');
        for digit in bits.chunks(6) {
            let value = digit.iter().fold(0, |value, bit| value << 1 | bit) << (6 - digit.len());
            out.push(char::from(DIGITS[usize::from(value)]));
        }
        out.push('-');
        rest = &rest[foreign..];
    }
    out + "\""
}

/// As the snapshot says it.
fn common(parts: &[&str]) -> String {
    parts.join("/")
}

fn given_a_user(pair: Pair, name: &str) -> Scene {
    let t = Scene::shared(cluster(pair), &format!("story-name-{name}-{}", pair as usize));
    t.a().deliver(&t.user, &mail("welcome"));
    t.settled();
    t
}

/// A mailbox lives under this name: it is made, subscribed to, gets mail on both, is renamed to and fro, and goes.
fn a_mailbox_lives(pair: Pair, name: &str, parts: &[&str]) {
    let t = given_a_user(pair, name);
    let (here, there) = (t.a(), t.b());
    {
        let imap_name = |server: &Server, parts: &[&str]| quoted(&server.mailbox(parts));
        let mut imap = here.imap(&t.user);
        imap.ok(&format!("CREATE {}", imap_name(here, parts)));
        imap.ok(&format!("SUBSCRIBE {}", imap_name(here, parts)));
        imap.append(&imap_name(here, parts), &mail("one"));
        let made = t.settled();
        let whole = common(parts);
        assert_eq!((made.messages(&whole).len(), &made.subscriptions), (1, &vec![whole.clone()]), "{:?}", made.names);

        // Given that the other one is used under its name there.
        there.lda_to(&t.user, &there.mailbox(parts), &mail("two"));
        there.imap(&t.user).select(&imap_name(there, parts)).ok("STORE 1:* +FLAGS (\\Seen)");
        assert_eq!(t.settled().messages(&whole).len(), 2);
        let child = [parts, &["a.b %"]].concat();
        there.imap(&t.user).append_new(&imap_name(there, &child), &mail("child"));
        assert_eq!(t.settled().messages(&common(&child)).len(), 1);

        let mut theirs = there.imap(&t.user);
        theirs.ok(&format!("RENAME {} {}", imap_name(there, parts), imap_name(there, &["Plain"])));
        let renamed = t.settled();
        assert_eq!((renamed.messages("Plain").len(), renamed.messages("Plain/a.b %").len()), (2, 1));
        assert_eq!(renamed.mailboxes["Plain"].guid, made.mailboxes[&whole].guid);
        imap.ok(&format!("RENAME {} {}", imap_name(here, &["Plain"]), imap_name(here, parts)));
        assert_eq!(t.settled().messages(&common(&child)).len(), 1);

        theirs.ok(&format!("UNSUBSCRIBE {}", imap_name(there, parts)));
        theirs.ok(&format!("DELETE {}", imap_name(there, &child)));
        theirs.ok(&format!("DELETE {}", imap_name(there, parts)));
        let gone = t.settled();
        assert!(gone.subscriptions.is_empty() && !gone.mailboxes.contains_key(&whole), "{:?}", gone.names);
        // What was above it.
        for above in (1..parts.len()).rev().filter(|above| parts[..*above] != ["INBOX"]) {
            imap.command(&format!("DELETE {}", imap_name(here, &parts[..above])));
            theirs.command(&format!("DELETE {}", imap_name(there, &parts[..above])));
        }
        t.settled();
    }
}

/// Each is a test for every pair.
macro_rules! names {
    ($( $(#[$doc:meta])* $name:ident: $parts:expr; )*) => {
        names!(@pair slashes Slashes, $($name $parts)*);
        names!(@pair dots_with_a_prefix Prefixed, $($name $parts)*);
        names!(@pair dots_and_a_maildir_with_slashes Dots, $($name $parts)*);
    };
    (@pair $module:ident $pair:ident, $($name:ident $parts:expr)*) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    super::a_mailbox_lives(super::Pair::$pair, stringify!($name), &$parts);
                }
            )*
        }
    };
}

names! {
    with_spaces: ["two  words", " and more "];
    with_percent_signs: ["50%", "%%41 %2f %25"];
    with_an_ampersand: ["Q&A", "&", "&-"];
    with_quotes: ["\"quoted\"", "it's"];
    with_backslashes: ["back\\slash", "\\"];
    with_stars: ["a*b", "*"];
    that_are_not_ascii: ["Entwürfe", "台北", "日本語 & ☺𝄞"];
    with_dots: ["v1.2", ".hidden", "a..b"];
    with_what_looks_like_an_escaped_dot: ["%2e", "v1%2e2", "%252e"];
    of_children_of_inbox: ["INBOX", "Child", "Grandchild"];
}

/// Each is a test for every pair, too.
macro_rules! stories {
    ($( $(#[$doc:meta])* fn $name:ident($t:ident) $body:block )*) => {
        $( $(#[$doc])* fn $name($t: &Scene) $body )*
        stories!(@pair slashes_too Slashes, $($name)*);
        stories!(@pair dots_with_a_prefix_too Prefixed, $($name)*);
        stories!(@pair dots_and_a_maildir_with_slashes_too Dots, $($name)*);
    };
    (@pair $module:ident $pair:ident, $($name:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    super::$name(&super::given_a_user(super::Pair::$pair, stringify!($name)));
                }
            )*
        }
    };
}

stories! {
    fn inbox_is_one_in_any_case(t) {
        let mut imap = t.a().imap(&t.user);
        imap.append("inbox", &mail("two"));
        imap.ok("SUBSCRIBE Inbox");
        assert!(!imap.command("CREATE inBOX").is_ok());
        t.b().lda_to(&t.user, "iNbOx", &mail("three"));
        let mut theirs = t.b().imap(&t.user).select("Inbox");
        theirs.ok("STORE 1 +FLAGS (\\Flagged)");
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), &snapshot.subscriptions[..]), (3, &["INBOX".to_owned()][..]));
        theirs.ok("UNSUBSCRIBE INBOX");
        let child = t.a().mailbox(&["INBOX", "Child"]).replacen("INBOX", "inbox", 1);
        imap.append_new(&quoted(&child), &mail("child"));
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX/Child").len(), snapshot.subscriptions.len()), (1, 0), "{:?}", snapshot.names);
    }

    /// Its GUID is that of each user's INBOX. On a maildir, and below its prefix, Dovecot itself refuses it.
    fn inbox_cannot_be_renamed(t) {
        for server in t.servers() {
            let answer = server.imap(&t.user).command(&format!("RENAME INBOX {}", quoted(&server.mailbox(&["Old"]))));
            assert!(answer.result.starts_with("NO"), "{}", answer.result);
        }
        t.a().deliver(&t.user, &mail("after"));
        assert_eq!(t.settled().messages("INBOX").len(), 2);
    }

    fn names_that_differ_in_what_stands_for_a_dot_stay_apart(t) {
        let mut imap = t.a().imap(&t.user);
        let names = ["a.b", "a_b", "a%2eb", "a%252eb", "ab"];
        for name in names {
            imap.append_new(&quoted(&t.a().mailbox(&[name])), &mail(name));
            imap.ok(&format!("SUBSCRIBE {}", quoted(&t.a().mailbox(&[name]))));
        }
        let mut theirs = t.b().imap(&t.user);
        let snapshot = t.settled();
        assert_eq!((snapshot.mailboxes.len(), snapshot.subscriptions.len()), (1 + names.len(), names.len()));
        for (n, name) in names.iter().enumerate() {
            theirs.append(&quoted(&t.b().mailbox(&[name])), &mail("again"));
            theirs.ok(&format!("UNSUBSCRIBE {}", quoted(&t.b().mailbox(&[name]))));
            let snapshot = t.settled();
            assert_eq!((snapshot.messages(name).len(), snapshot.subscriptions.len()), (2, names.len() - n - 1));
        }
    }

    /// In UTF-8, as admins type it.
    fn doveadm_makes_a_mailbox_that_is_not_ascii(t) {
        let [made, renamed] = ["Entwürfe & Ähnliches", "台北.2024"];
        let doveadm = |verb: &[&str], names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| t.a().mailbox(&[name])).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            t.a().doveadm(&[&["mailbox"], verb, &["-u", &t.user], &names].concat());
        };
        doveadm(&["create", "-s"], &[made]);
        t.settled();
        t.b().lda_to(&t.user, &t.b().mailbox(&[made]), &mail("draft"));
        assert_eq!(t.settled().messages(made).len(), 1);
        doveadm(&["rename", "-s"], &[made, renamed]);
        let snapshot = t.settled();
        assert_eq!((snapshot.messages(renamed).len(), &snapshot.subscriptions[..]), (1, &[renamed.to_owned()][..]));
    }
}

/// A file's name has up to 255 bytes. A maildir has the whole name in one.
fn a_mailbox_lives_whose_name_has_490_bytes(pair: Pair) {
    let [first, second, third] = ["ü".repeat(45), "y".repeat(250), "z".repeat(148)];
    let parts = [&first[..], &second, &third];
    assert_eq!(common(&parts).len(), 490);
    a_mailbox_lives(pair, "long", &parts);
}

#[test]
fn a_name_of_490_bytes() {
    a_mailbox_lives_whose_name_has_490_bytes(Pair::Slashes);
}

#[test]
fn a_name_of_490_bytes_with_slashes_and_with_dots() {
    a_mailbox_lives_whose_name_has_490_bytes(Pair::Long);
}

#[test]
fn a_name_that_is_too_long_for_the_peers_storage_is_listed_with_the_reason() {
    let t = Scene::on(start(Pair::Prefixed), "story-name-too-long");
    t.expects_in_log("dovetail");
    let name = quoted(&common(&[&"x".repeat(200), &"y".repeat(200)]));
    t.a().imap(&t.user).append_new(&name, &mail("one"));
    t.a().deliver(&t.user, &mail("another"));
    wait_until(SET_ASIDE_DEADLINE, "all else goes on", || t.servers().iter().all(Server::has_nothing_pending));
    assert!(t.b().has_inbox(&t.user));
    let failed = t.b().doveadm(&["dovetail", "failed"]);
    assert!(failed.contains(&t.user) && failed.contains("too long"), "{failed}");
}

fn what_nobody_told_of_is_found(pair: Pair) {
    let t = Scene::on(start(pair), "story-name-untold");
    t.expects_in_log("dovetail");
    t.expects_in_log("killed with signal 9");
    t.a().deliver(&t.user, &mail("welcome"));
    t.settled();
    for server in t.servers() {
        let name = quoted(&server.mailbox(&["New.one", server.name()]));
        server.pids("dovetail").iter().for_each(|pid| signal(*pid, "STOP"));
        let mut imap = server.imap(&t.user);
        imap.append("INBOX", &mail("untold"));
        imap.append_new(&name, &mail("untold"));
        imap.ok(&format!("SUBSCRIBE {name}"));
        assert!(server.kill("imap") + server.kill("dovetail") >= 2);
        wait_until(SOON, "the relay is back", || server.try_status().is_some());
    }
    let snapshot = t.settled();
    assert_eq!(snapshot.messages("INBOX").len(), 3);
    assert_eq!(snapshot.subscriptions, ["New.one/a", "New.one/b"]);
}

#[test]
fn what_nobody_told_of_is_found_below_a_prefix() {
    what_nobody_told_of_is_found(Pair::Prefixed);
}

#[test]
fn what_nobody_told_of_is_found_among_names_with_dots() {
    what_nobody_told_of_is_found(Pair::Dots);
}

trait AppendNew {
    fn append_new(&mut self, mailbox: &str, mail: &[u8]);
}

impl AppendNew for Imap {
    fn append_new(&mut self, mailbox: &str, mail: &[u8]) {
        self.ok(&format!("CREATE {mailbox}"));
        self.append(mailbox, mail);
    }
}
