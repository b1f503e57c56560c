//! Servers that prove to each other who they are: as README sets them up, over a network.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dovetail::settings::Tls;
use dovetail::tls::{Credentials, Session};
use dovetail::wire::frame::{self, Decoder};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::*;

use crate::cluster::checker::Checker;
use crate::cluster::snapshot::table;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot, Version};
use crate::scene::{mail, Scene, SOON};

/// Where the settings of this chapter come from, once they are written.
const INCLUDE: &str = "!include_try {DIR}/tls.conf\n";

fn setup(name: &str) -> Setup {
    Setup::new(name, Format::Sdbox).insecure().extra(INCLUDE, INCLUDE)
}

fn folder(server: &Server) -> String {
    format!("{}/made", server.dir())
}

/// What an admin writes, instead of what the other tests have.
fn turn_on(server: &Server) {
    let (folder, name) = (folder(server), server.name());
    let mut settings = format!("dovetail_ca = {folder}/ca.pem\n");
    settings += &format!("dovetail_cert = {folder}/{name}.pem\ndovetail_key = {folder}/{name}.key\n");
    settings += "dovetail_insecure_plaintext =\n";
    configure(server, &settings);
}

fn configure(server: &Server, settings: &str) {
    let text = match server.version() {
        Version::V23 => format!("plugin {{\n{settings}}}\n"),
        Version::V24 => settings.to_owned(),
    };
    fs::write(server.outside("/tls.conf"), text).expect("tls.conf");
    server.reload();
}

/// Three commands: an authority, two certificates, and b's own to b.
fn make_certificates(a: &Server, b: &Server) {
    a.doveadm(&["dovetail", "cert", "init", "-d", &folder(a)]);
    a.doveadm(&["dovetail", "cert", "issue", "-d", &folder(a), "a", "b"]);
    bring_certificates(a, b);
}

fn bring_certificates(a: &Server, b: &Server) {
    fs::create_dir_all(b.outside("/made")).expect("mkdir");
    for file in ["ca.pem", "b.pem", "b.key"] {
        fs::copy(a.outside(&format!("/made/{file}")), b.outside(&format!("/made/{file}"))).expect(file);
    }
}

fn wait_for_connection(t: &Scene) {
    for server in t.servers() {
        wait_until(SOON, &format!("{} is connected", server.name()), || {
            server.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "connected"))
        });
    }
}

fn logged(server: &Server, text: &str) -> usize {
    server.log().lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_pair_that_is_set_up_with_three_commands_replicates_over_a_network() {
    let t = Scene::on(Cluster::start_apart(vec![setup("a"), setup("b")]), "story-tls");
    t.expects_in_log("dovetail");
    make_certificates(t.a(), t.b());
    t.servers().iter().for_each(turn_on);
    wait_for_connection(&t);
    t.a().deliver(&t.user, &mail("from a"));
    t.settled();
    t.b().deliver(&t.user, &mail("from b"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
    for server in t.servers() {
        assert_eq!(logged(server, "refuses to listen"), 0, "{}", server.log());
    }

    // Who speaks no TLS hears nothing, and the two go on.
    let mut stranger = t.b().connect(t.b().ports.relay).expect("the relay listens");
    assert_eq!(answer(&mut stranger, &[1, 0, 0, 2, 0, 0])[0], 0x15, "an alert");
    t.b().wait_for_log("A server that connected as a peer from 127.0.0.1 is turned away: it does not speak TLS.");
    t.a().deliver(&t.user, &mail("again"));
    assert_eq!(t.settled().messages("INBOX").len(), 3);
}

fn answer(socket: &mut TcpStream, bytes: &[u8]) -> Vec<u8> {
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("setsockopt");
    socket.write_all(bytes).expect("write");
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    answer
}

#[test]
fn new_certificates_are_used_after_a_reload() {
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-tls-reload");
    t.expects_in_log("dovetail");
    make_certificates(t.a(), t.b());
    t.servers().iter().for_each(turn_on);
    t.a().deliver(&t.user, &mail("first"));
    t.settled();

    // Given an authority and certificates that are new on A only.
    let mut imap = t.a().imap(&t.user).select("INBOX");
    fs::remove_dir_all(t.a().outside("/made")).expect("rm");
    let old = t.b().outside("/made/ca.pem");
    let old = fs::read(old).expect("ca.pem");
    t.a().doveadm(&["dovetail", "cert", "init", "-d", &folder(t.a())]);
    t.a().doveadm(&["dovetail", "cert", "issue", "-d", &folder(t.a()), "a", "b"]);
    assert_ne!(fs::read(t.a().outside("/made/ca.pem")).expect("ca.pem"), old);
    t.a().reload();
    wait_until(SOON, "A's relay trusts B no more", || {
        t.a().try_status().is_some_and(|status| {
            status.peers[0].state == "refused"
                && status.peers[0].last_error == "its certificate was not issued by dovetail_ca"
        })
    });
    t.a().deliver(&t.user, &mail("waits"));

    // When B has them, too.
    bring_certificates(t.a(), t.b());
    t.b().reload();
    wait_for_connection(&t);
    assert_eq!(t.settled().messages("INBOX").len(), 2);
    // The session was not ended.
    imap.ok("NOOP");
}

#[test]
fn certificates_are_made_for_their_owner_only_and_never_overwritten() {
    let t = Scene::on(Cluster::start(vec![setup("a")]), "story-tls-cert");
    t.expects_in_log("dovetail");
    let folder = folder(t.a());
    let cert = |args: &[&str]| t.a().try_doveadm(&[&["dovetail", "cert"], args].concat());
    let refused = |args: &[&str], reason: &str| {
        let output = cert(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(reason), "{args:?}: {error}");
    };
    refused(&["issue", "-d", &folder, "a"], "there is no authority yet: doveadm dovetail cert init");
    t.a().doveadm(&["dovetail", "cert", "init", "-d", &folder]);
    t.a().doveadm(&["dovetail", "cert", "issue", "-d", &folder, "a", "mx2.example"]);
    let mode = |file: &str| {
        fs::metadata(t.a().outside(&format!("/made{file}"))).expect("a file").permissions().mode() & 0o7777
    };
    assert_eq!([mode(""), mode("/ca.key"), mode("/a.key"), mode("/mx2.example.key")], [0o700, 0o600, 0o600, 0o600]);

    let key = fs::read(t.a().outside("/made/ca.key")).expect("a key");
    refused(&["init", "-d", &folder], "ca.pem: it is there already, and is not overwritten");
    refused(&["issue", "-d", &folder, "a"], "a.pem: it is there already, and is not overwritten");
    refused(&["issue", "-d", &folder, "../b"], "'../b': a server's name consists of");
    refused(&["issue", "-d", &folder, "ca"], "'ca': it is the authority's");
    refused(&["issue", "-d", &folder], "The names of servers must be given");
    assert_eq!(fs::read(t.a().outside("/made/ca.key")).expect("a key"), key);

    // Its folder is that of the setting, if nobody says another one.
    turn_on(t.a());
    let shown = t.a().doveadm(&["-f", "tab", "dovetail", "cert", "show"]);
    let rows: Vec<_> = table(&shown).collect();
    let servers: Vec<&str> = rows.iter().map(|row| row["server"].as_str()).collect();
    assert_eq!(servers, ["-", "a", "mx2.example"], "{shown}");
    for row in &rows {
        assert!(row["expires"].starts_with("20") && row["expires"].len() == 10, "{shown}");
        assert_eq!(row["sha256"].len(), 64, "{shown}");
    }
}

#[test]
fn a_key_that_everybody_can_read_stops_replication_and_no_mail() {
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-tls-key");
    t.expects_in_log("dovetail");
    make_certificates(t.a(), t.b());
    let key = t.a().outside("/made/a.key");
    fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("chmod");
    turn_on(t.a());
    t.a().wait_for_log("/made/a.key: everybody on this machine may use it (mode 644): chmod 600 it, or make a new one");
    t.a().deliver(&t.user, &mail("stays"));
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 1);

    // As Dovecot's own ssl_key is written: the key is in nobody's log.
    let text = fs::read_to_string(&key).expect("a key");
    let secret = text.lines().nth(1).expect("a line").to_owned();
    if t.a().version() == Version::V23 {
        let folder = folder(t.a());
        configure(t.a(), &format!("dovetail_cert = {folder}/a.pem\ndovetail_key = <{folder}/a.key\n"));
        t.a().wait_for_log(
            "Invalid setting dovetail_key: it must be the path of a file, from / on, without '<' in front",
        );
    }
    assert!(!t.a().log().contains(&secret));
}

/// Somebody with a peer's key.
struct Thief {
    socket: TcpStream,
    tls: Session,
    decoder: Decoder,
    epoch: u64,
}

impl Thief {
    /// With the key of the server `from`, on a connection to the relay of `to`.
    fn connect(from: &Server, to: &Server) -> Thief {
        let file = |name: &str| from.outside(&format!("/tls/{name}"));
        let files = Tls { ca: Some(file("ca.pem")), cert: file("a.pem"), key: file("a.key"), fingerprints: Vec::new() };
        let tls = Credentials::load(&files, "a", &["b"]).and_then(|credentials| credentials.connect("b"));
        let socket = to.connect(to.ports.relay).expect("the relay listens");
        socket.set_read_timeout(Some(SOON)).expect("setsockopt");
        // Later than the server's own: an earlier one is not let in.
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_micros() as u64;
        let mut thief = Thief { socket, tls: tls.expect("a's files"), decoder: Decoder::new(), epoch };
        let hello = Hello { server: "a".into(), instance: b"thief".to_vec(), epoch, ..Default::default() };
        thief.say(Kind::Hello(hello));
        thief
    }

    fn say(&mut self, kind: Kind) {
        let bytes = frame::encode(&kind.into()).expect("a frame");
        self.tls.write(&mut self.socket, &bytes).expect("write");
    }

    /// A mailbox that somebody has made.
    fn say_change(&mut self, user: &str, seq: u64, origin: &str) {
        self.say(change(user, (self.epoch, seq), origin, &["Evil"], What::Create(MailboxCreate::default())));
    }

    /// The reason for which it is refused, if it ever was. In the end it is acknowledged: done, or set aside.
    fn try_change(&mut self, user: &str, seq: u64, path: &[&str], what: What) -> String {
        let mut reason = String::new();
        for _ in 0..10 {
            self.say(change(user, (self.epoch, seq), "a", path, what.clone()));
            let answer = self.hear(|kind| match kind {
                Kind::Refused(refused) if refused.seq == seq => Some(Some(refused.error)),
                Kind::Ack(ack) if ack.seqs.contains(&seq) => Some(None),
                _ => None,
            });
            match answer.unwrap_or_else(|| panic!("{path:?}: the connection was closed")) {
                Some(error) => reason = error,
                None => return reason,
            }
        }
        panic!("{path:?}: it is refused again and again: {reason}")
    }

    /// So many bytes of frames, as fast as they are taken.
    fn flood(&mut self, frame: &[u8], count: usize) {
        let many = frame.repeat(1_000);
        (0..count.div_ceil(1_000)).for_each(|_| self.write(&many));
    }

    fn write(&mut self, mut rest: &[u8]) {
        while !rest.is_empty() {
            let taken = self.tls.write(&mut self.socket, rest).expect("write");
            rest = &rest[taken..];
        }
    }

    /// The next frame of these; none at the connection's end.
    fn hear<T>(&mut self, mut wanted: impl FnMut(Kind) -> Option<T>) -> Option<T> {
        loop {
            while let Some(frame) = self.decoder.next().expect("frames") {
                if let Some(found) = frame.kind.and_then(&mut wanted) {
                    return Some(found);
                }
            }
            let decoder = &mut self.decoder;
            match self.tls.read(&mut self.socket, &mut [0; 65_536], |bytes| decoder.push(bytes)) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("waited in vain for the relay: {error}"),
            }
        }
    }
}

fn change(user: &str, (epoch, seq): (u64, u64), origin: &str, path: &[&str], what: What) -> Kind {
    let path = path.iter().map(|part| (*part).to_owned()).collect();
    Kind::Change(Change {
        stamp: Some(Stamp { origin: origin.into(), epoch, seq, clock: seq, ..Default::default() }),
        user: user.into(),
        mailbox: Some(Mailbox { guid: vec![seq as u8; 16], path, ..Default::default() }),
        ops: vec![Op { what: Some(what) }],
        ..Default::default()
    })
}

fn guid_of_inbox(server: &Server, user: &str) -> Vec<u8> {
    let guid = server.doveadm(&["mailbox", "status", "-u", user, "guid", "INBOX"]);
    let guid = guid.trim().rsplit('=').next().expect("a GUID");
    (0..16).map(|at| u8::from_str_radix(&guid[2 * at..2 * at + 2], 16).expect("hex")).collect()
}

#[test]
fn a_stolen_key_reaches_no_user_who_is_not_replicated_with_that_server() {
    let (hers, his) = ("story-thief-jane", "story-thief-joe");
    let b = Setup::new("b", Format::Sdbox).user_with_peers(hers, "a").user_with_peers(his, "-");
    let t = Scene::on(Cluster::start_apart(vec![Setup::new("a", Format::Sdbox), b]), hers);
    t.expects_in_log("dovetail");
    t.b().deliver(his, &mail("his own"));
    let guid = guid_of_inbox(t.b(), his);
    t.a().stop();
    wait_until(SOON, "A's connection has ended", || t.b().status()[0]["state"] != "connected");

    let mut thief = Thief::connect(t.a(), t.b());
    thief.say_change(his, 1, "a");
    let refused = thief.hear(|kind| match kind {
        Kind::Refused(refused) => Some(refused),
        _ => None,
    });
    let reason = "server a is not among the user's peers here";
    assert!(refused.is_some_and(|refused| refused.user == his && refused.error.contains(reason)));
    t.b().wait_for_log(reason);
    thief.say(Kind::BodyRequest(BodyRequest {
        id: 9,
        origin: "b".into(),
        user: his.into(),
        mailbox: Some(Mailbox { guid, path: vec!["INBOX".into()], ..Default::default() }),
        uid: 1,
        window: 1 << 20,
        ..Default::default()
    }));
    let chunk = thief.hear(|kind| match kind {
        Kind::BodyChunk(chunk) => Some(chunk),
        _ => None,
    });
    assert!(chunk.is_some_and(|chunk| chunk.data.is_empty() && chunk.error.contains(reason)));
    assert!(!t.b().doveadm(&["mailbox", "list", "-u", his]).contains("Evil"));

    // Who says another server's changes as his own is cut off.
    thief.say_change(hers, 2, "b");
    assert!(thief.hear(|kind| matches!(kind, Kind::Refused(_)).then_some(())).is_none());
    t.b().wait_for_log("it sent change 2 of server 'b'");
    assert_eq!(t.b().counters().malformed, 1);

    t.a().start();
    t.a().deliver(hers, &mail("hers"));
    assert_eq!(t.settled().messages("INBOX").len(), 1);
}

/// Another user's mailboxes, as clients see those that are shared with them.
const SHARED: [&str; 2] = [
    "namespace {\n  type = shared\n  separator = /\n  prefix = user/%%u/\n  location = sdbox:%%h/sdbox\n  subscriptions = no\n  list = children\n}\n",
    "namespace shared {\n  type = shared\n  separator = /\n  prefix = user/$user/\n  mail_driver = sdbox\n  \
     mail_path = %{owner_home}/sdbox\n  subscriptions = no\n  list = children\n}\n",
];

/// All that is there but for one user's, with its size; that of an index may change when somebody looks at the mailbox.
fn files_of_others(server: &Server, user: &str) -> Vec<(PathBuf, u64)> {
    fn walk(folder: &Path, but: &Path, found: &mut Vec<(PathBuf, u64)>) {
        for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry")) {
            let metadata = entry.metadata().expect("its metadata");
            let is_index = entry.file_name().to_string_lossy().starts_with("dovecot.index");
            found.push((entry.path(), if metadata.is_file() && !is_index { metadata.len() } else { 0 }));
            if metadata.is_dir() && entry.path() != but {
                walk(&entry.path(), but, found);
            }
        }
    }
    let (mut found, home) = (Vec::new(), server.outside(&format!("/home/{user}")));
    walk(&server.outside("/home"), &home, &mut found);
    found.sort();
    found
}

fn what_a_peer_calls_a_mailbox_cannot_leave_the_users_mail(format: Format) {
    let (user, other) = ("story-tricks-joe", "story-tricks-jane");
    let b = Setup::new("b", format).extra(SHARED[0], SHARED[1]);
    let t = Scene::on(Cluster::start_apart(vec![Setup::new("a", format), b]), user);
    t.expects_in_log("dovetail");
    for of in [user, other] {
        t.a().deliver(of, &mail("first"));
        t.converged(of);
    }
    t.a().stop();
    wait_until(SOON, "A's connection has ended", || t.b().status()[0]["state"] != "connected");
    let mailboxes = Snapshot::take(t.b(), other, false).mailboxes;
    let before = files_of_others(t.b(), user);

    let mut thief = Thief::connect(t.a(), t.b());
    let long = "x".repeat(1_000);
    let paths: [&[&str]; 14] = [
        &[".."],
        &["..", "..", other, "sdbox"],
        &["a", "..", "..", "..", "b"],
        &["../../story-tricks-jane/sdbox/mailboxes/Evil"],
        &["/tmp/evil"],
        &["~", "evil"],
        &["a\0b"],
        &["a\r\nb"],
        &["", "a"],
        &["a", ""],
        &["dbox-Mails"],
        &[&long, &long, &long, &long, &long],
        &["user", other, "INBOX"],
        &["user", other, "Evil"],
    ];
    let mut seq = 0;
    for path in paths {
        let own = |path: &[&str]| path.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        let body = b"Subject: evil\n\nevil\n".to_vec();
        let save = |guid: &str| Save {
            guid: guid.into(),
            size: 20,
            body: body.clone(),
            body_inline: true,
            ..Default::default()
        };
        for (path, what) in [
            (path, What::Create(MailboxCreate::default())),
            (path, What::Save(save("evil"))),
            (path, What::Subscription(Subscription { subscribed: true })),
            (
                path,
                What::Expunge(Expunge {
                    messages: vec![MessageRange { first_uid: 1, last_uid: 1, ..Default::default() }],
                }),
            ),
            (path, What::Delete(MailboxDelete::default())),
            (&["INBOX"], What::Save(save("../../evil"))),
            (&["INBOX"], What::Rename(MailboxRename { new_path: own(path), ..Default::default() })),
        ] {
            seq += 1;
            thief.try_change(user, seq, path, what);
        }
    }
    // Nor does it make a user.
    for nobody in ["../evil", "/tmp/evil", "story-tricks-jane/../evil", ".."] {
        seq += 1;
        thief.say(change(nobody, (thief.epoch, seq), "a", &["INBOX"], What::Create(MailboxCreate::default())));
        let refused = thief.hear(|kind| match kind {
            Kind::Refused(refused) => Some((refused.seq, refused.error)),
            _ => None,
        });
        let reasons = ["unknown here", "the user's name has a part that is '.' or '..'"];
        assert!(refused.is_some_and(|(of, why)| of == seq && reasons.contains(&why.as_str())), "{nobody}");
    }
    assert_eq!(files_of_others(t.b(), user), before);
    assert_eq!(t.b().imap(other).select("INBOX").uids(), [1]);
    assert_eq!(Snapshot::take(t.b(), other, false).mailboxes, mailboxes, "what the indexes say");
    let reason = thief.try_change(user, seq + 1, &["user", other, "INBOX"], What::Create(MailboxCreate::default()));
    assert!(reason.contains("its name is one of the namespace 'user/', which is not the user's own"), "{reason}");
    drop(thief);
    t.a().start();
    t.a().deliver(other, &mail("hers"));
    assert_eq!(t.converged(other).messages("INBOX").len(), 2);
}

#[test]
fn what_a_peer_calls_a_mailbox_cannot_leave_the_users_mail_sdbox() {
    what_a_peer_calls_a_mailbox_cannot_leave_the_users_mail(Format::Sdbox);
}

#[test]
fn what_a_peer_calls_a_mailbox_cannot_leave_the_users_mail_maildir() {
    what_a_peer_calls_a_mailbox_cannot_leave_the_users_mail(Format::Maildir);
}

/// Half of the mails take less.
fn median_lag(from: &Server, to: &Server, user: &str) -> Duration {
    let mut imap = to.imap(user);
    let mut is_there = |count: usize| {
        let text = format!("(MESSAGES {count})");
        imap.ok("STATUS INBOX (MESSAGES)").lines().iter().any(|line| line.contains(&text))
    };
    let mut before = 0;
    while !is_there(before) {
        before += 1;
    }
    let mut lags: Vec<Duration> = (1..=15)
        .map(|n| {
            from.deliver(user, &mail(&format!("mail {n}")));
            let began = Instant::now();
            wait_until(SOON, "the mail is there", || is_there(before + n));
            began.elapsed()
        })
        .collect();
    lags.sort();
    lags[lags.len() / 2]
}

/// The most that it ever had.
fn memory_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the relay runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.split_whitespace().next().and_then(|kilobytes| kilobytes.parse::<u64>().ok()).expect("a number") * 1024
}

#[test]
fn a_peer_that_floods_costs_no_memory_and_holds_up_nobody() {
    let setups = ["a", "b", "c"].map(|name| Setup::new(name, Format::Sdbox));
    let t = Scene::on(Cluster::start_apart(setups.into()), "story-flood");
    t.expects_in_log("dovetail");
    let [a, b, c] = t.servers() else { panic!("three servers") };
    c.deliver(&t.user, &mail("first"));
    t.settled();
    a.stop();
    wait_until(SOON, "A's connection has ended", || {
        b.status().iter().any(|peer| peer["peer"] == "a" && peer["state"] != "connected")
    });
    let quiet = median_lag(c, b, &t.user);
    let relay = b.pids("dovetail")[0];
    let before = memory_bytes(relay);
    let inbox = guid_of_inbox(b, &t.user);

    let encoded = |kind: Kind| frame::encode(&kind.into()).expect("a frame");
    let is_over = AtomicBool::new(false);
    let (flooded, lag) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let mut thief = Thief::connect(a, b);
            // What it says waits until the handshake is over.
            thief.hear(|kind| matches!(kind, Kind::Hello(_)).then_some(()));
            // It reads no answers.
            let tiny = encoded(Kind::Ping(Ping::default()));
            let reach =
                |name: &str| Linked { servers: vec!["b".into()], reach: vec![Reach { server: name.into(), hops: 1 }] };
            let linked = [reach("far"), reach("further")].map(|linked| encoded(Kind::Linked(linked))).concat();
            let numbers = encoded(Kind::Known(Known {
                origin: "c".into(),
                epoch: 1,
                seqs: (1..=1_000).collect(),
                user: t.user.clone(),
            }));
            let bonds = |first: u64| {
                let bond = |at_us| encoded(Kind::Bond(Bond { at_us, nonce: vec![1; 16] }));
                (first..first + 1_000).flat_map(bond).collect::<Vec<u8>>()
            };
            // It takes nothing of these either.
            for id in 1..=64 {
                thief.write(&encoded(Kind::BodyRequest(BodyRequest {
                    id,
                    origin: "b".into(),
                    user: t.user.clone(),
                    mailbox: Some(Mailbox { guid: inbox.clone(), path: vec!["INBOX".into()], ..Default::default() }),
                    uid: 1,
                    window: 1,
                    ..Default::default()
                })));
            }
            let strange = [
                linked,
                encoded(Kind::Ack(Ack { epoch: 1, seqs: (1..100).collect(), ..Default::default() })),
                encoded(Kind::Known(Known {
                    origin: "c".into(),
                    epoch: 1,
                    seqs: (1..100).collect(),
                    user: t.user.clone(),
                })),
                encoded(Kind::Linked(Linked::default())),
                encoded(Kind::BodyMore(BodyMore::default())),
                encoded(Kind::Refused(Refused {
                    epoch: 1,
                    seq: 1,
                    user: "nobody".into(),
                    error: "x".repeat(1_000),
                    ..Default::default()
                })),
            ];
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) || count < 1_000_000 {
                thief.flood(&tiny, 50_000);
                strange.iter().for_each(|frame| thief.flood(frame, 1_000));
                thief.write(&numbers.repeat(10));
                thief.write(&bonds(count));
                count += 50_000;
            }
            count
        });
        let lag = median_lag(c, b, &t.user);
        is_over.store(true, Ordering::Relaxed);
        (flood.join().expect("no panic"), lag)
    });
    let after = memory_bytes(relay);
    assert_eq!(b.pids("dovetail"), [relay], "it runs still");
    let story = format!("{flooded} frames: lag {quiet:?}, then {lag:?}; memory {before}, then {after}");
    eprintln!("{story}");
    // That each of the good peer's mails came while the flood went on was seen; how fast is for people to read.
    let kept = Checker::get().map_or(0, Checker::kept_bytes);
    assert!(after < before + (16 << 20) + kept, "{story}");
    a.start();
    t.settled();
}

/// Lines that are in no log, whatever is said of the mails and keys that they are from.
#[test]
fn neither_mail_nor_keys_are_in_the_logs() {
    let debug = "log_debug = category=mail OR category=dovetail\n";
    let setup = |name| Setup::new(name, Format::Sdbox).extra(debug, debug);
    let t = Scene::on(Cluster::start_apart(vec![setup("a"), setup("b")]), "story-secrets");
    t.expects_in_log("dovetail");
    t.expects_in_log("Permission denied");
    let secret = |mark: &str| {
        format!(
            "From: xyzzy-from <xyzzy-sender@client.test>\r\nMessage-ID: <{mark}@client.test>\r\nSubject: xyzzy-subject {mark}\r\n\
             Content-Type: text/plain\r\n\r\nxyzzy-body {mark}\r\n"
        )
        .into_bytes()
    };
    t.a().deliver(&t.user, &secret("lmtp"));
    t.a().lda(&t.user, &secret("lda"));
    let mut imap = t.a().imap(&t.user);
    imap.append("INBOX", &secret("append"));
    imap.append("INBOX", &[secret("large"), vec![b'x'; 200_000]].concat());
    imap.ok("CREATE Work");
    let mut imap = imap.select("INBOX");
    imap.ok("COPY 1 Work");
    imap.ok("MOVE 2 Work");
    imap.ok("STORE 1 +FLAGS (\\Deleted $Mine)");
    imap.ok("EXPUNGE");
    t.settled();
    // Also where something fails.
    let home = t.b().outside(&format!("/home/{}", t.user));
    let away = home.with_extension("away");
    fs::rename(&home, &away).expect("rename");
    fs::write(&home, "no folder").expect("write");
    t.a().deliver(&t.user, &secret("fails"));
    wait_until(SOON, "it is refused", || t.a().log().contains("could not be applied there"));
    fs::remove_file(&home).expect("rm");
    fs::rename(&away, &home).expect("rename");
    t.converged_within(Duration::from_secs(60), &t.user);

    for server in t.servers() {
        let log = server.log();
        assert!(log.contains("Debug:"), "{log}");
        let shown = ["status", "waiting", "failed"].map(|what| server.doveadm(&["dovetail", what])).concat();
        let key = fs::read_to_string(server.outside(&format!("/tls/{}.key", server.name()))).expect("a key");
        let secrets = key.lines().filter(|line| !line.starts_with("---")).chain(["xyzzy"]);
        for secret in secrets {
            let told: Vec<&str> = log.lines().chain(shown.lines()).filter(|line| line.contains(secret)).collect();
            assert!(told.is_empty(), "{}: {told:#?}", server.name());
        }
    }
}
