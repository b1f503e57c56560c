//! Servers that prove to each other who they are: as README sets them up, over a network.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use dovetail::settings::Tls;
use dovetail::tls::{Credentials, Session};
use dovetail::wire::frame::{self, Decoder};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::{BodyRequest, Change, Hello, Mailbox, MailboxCreate, Op, Stamp};

use crate::cluster::snapshot::table;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Version};
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
    server.doveadm(&["reload"]);
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
    t.a().doveadm(&["reload"]);
    wait_until(SOON, "A's relay trusts B no more", || {
        t.a().try_status().is_some_and(|status| {
            status.peers[0].state == "refused"
                && status.peers[0].last_error == "its certificate was not issued by dovetail_ca"
        })
    });
    t.a().deliver(&t.user, &mail("waits"));

    // When B has them, too.
    bring_certificates(t.a(), t.b());
    t.b().doveadm(&["reload"]);
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
}

impl Thief {
    /// With the key of the server `from`, on a connection to the relay of `to`.
    fn connect(from: &Server, to: &Server) -> Thief {
        let file = |name: &str| from.outside(&format!("/tls/{name}"));
        let files = Tls { ca: Some(file("ca.pem")), cert: file("a.pem"), key: file("a.key"), fingerprints: Vec::new() };
        let tls = Credentials::load(&files, "a", &["b"]).and_then(|credentials| credentials.connect("b"));
        let socket = to.connect(to.ports.relay).expect("the relay listens");
        socket.set_read_timeout(Some(SOON)).expect("setsockopt");
        let mut thief = Thief { socket, tls: tls.expect("a's files"), decoder: Decoder::new() };
        let hello = Hello { server: "a".into(), instance: b"thief".to_vec(), epoch: 1, ..Default::default() };
        thief.say(Kind::Hello(hello));
        thief
    }

    fn say(&mut self, kind: Kind) {
        let bytes = frame::encode(&kind.into()).expect("a frame");
        self.tls.write(&mut self.socket, &bytes).expect("write");
    }

    /// A mailbox that somebody has made.
    fn say_change(&mut self, user: &str, seq: u64, origin: &str) {
        let op = Op { what: Some(What::Create(MailboxCreate::default())) };
        let mailbox = Mailbox { guid: vec![7; 16], path: vec!["Evil".into()], ..Default::default() };
        self.say(Kind::Change(Change {
            stamp: Some(Stamp { origin: origin.into(), epoch: 1, seq, clock: seq, ..Default::default() }),
            user: user.into(),
            mailbox: Some(mailbox),
            ops: vec![op],
            ..Default::default()
        }));
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
                Err(error) => panic!("waited in vain for the relay: {error}"),
            }
        }
    }
}

#[test]
fn a_stolen_key_reaches_no_user_who_is_not_replicated_with_that_server() {
    let (hers, his) = ("story-thief-jane", "story-thief-joe");
    let b = Setup::new("b", Format::Sdbox).user_with_peers(hers, "a").user_with_peers(his, "-");
    let t = Scene::on(Cluster::start_apart(vec![Setup::new("a", Format::Sdbox), b]), hers);
    t.expects_in_log("dovetail");
    t.b().deliver(his, &mail("his own"));
    let guid = t.b().doveadm(&["mailbox", "status", "-u", his, "guid", "INBOX"]);
    let guid = guid.trim().rsplit('=').next().expect("a GUID").to_owned();
    let guid: Vec<u8> = (0..16).map(|at| u8::from_str_radix(&guid[2 * at..2 * at + 2], 16).expect("hex")).collect();
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
