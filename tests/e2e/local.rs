//! What a local process may tell the relay: of the mail that it could write to, as the system user that it runs as.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{setsockopt, sockopt::PassCred};

use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::*;

use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{as_user, mail, Scene, SOON};

const NOT_HIS: &str = "whose mail belongs to another system user";

/// Two servers on which each of these is a system user, with this number.
fn system_users(users: &[(&str, u32)], format: Format) -> Cluster {
    let setup = |name| {
        let setup = Setup::new(name, format);
        users.iter().fold(setup, |setup, (user, uid)| setup.system_user(user, *uid))
    };
    let cluster = Cluster::start(vec![setup("a"), setup("b")]);
    for server in cluster.servers() {
        for (user, uid) in users {
            let home = server.outside(&format!("/home/{user}"));
            std::fs::create_dir_all(&home).expect("a home");
            std::os::unix::fs::chown(&home, Some(*uid), Some(*uid)).expect("chown");
        }
    }
    cluster
}

fn inbox(snapshot: &Snapshot) -> Mailbox {
    let guid = &snapshot.mailboxes["INBOX"].guid;
    let byte = |at: usize| u8::from_str_radix(&guid[at..at + 2], 16).expect("hex");
    Mailbox { guid: (0..32).step_by(2).map(byte).collect(), path: vec!["INBOX".into()], ..Default::default() }
}

/// A process of this system user says so on the relay's socket, and stays connected.
fn tell(server: &Server, uid: u32, what: Vec<Kind>) -> UnixStream {
    let socket = server.outside("/run/dovetail");
    as_user(uid, move || {
        let mut stream = UnixStream::connect(socket).expect("connect to the relay");
        setsockopt(&stream, PassCred, &true).expect("SO_PASSCRED");
        let attach = Kind::Attach(Attach { process: "imap".into(), pid: std::process::id() });
        let mut bytes = Vec::new();
        for kind in std::iter::once(attach).chain(what) {
            dovetail::wire::frame::append(&kind.into(), &mut bytes).expect("a frame");
        }
        stream.write_all(&bytes).expect("write to the relay");
        stream
    })
}

fn record(user: &str, mailbox: &Mailbox, what: What) -> Kind {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as u64;
    let change = Change {
        stamp: Some(Stamp { clock, ..Default::default() }),
        user: user.into(),
        mailbox: Some(mailbox.clone()),
        ops: vec![Op { what: Some(what) }],
        ..Default::default()
    };
    Kind::Record(Record { change: Some(change), ..Default::default() })
}

fn expunge(uid: u32) -> What {
    What::Expunge(Expunge { messages: vec![MessageRange { first_uid: uid, last_uid: uid, ..Default::default() }] })
}

fn disbelieved(server: &Server) -> u64 {
    let counted = server.counters().notes;
    counted.iter().find(|note| note.name == "told_of_others").map_or(0, |note| note.count)
}

fn tell_of_their_own_mail(format: Format) {
    let (jane, john) = ("story-system-jane", "story-system-john");
    let t = Scene::on(system_users(&[(jane, 2001), (john, 2002)], format), jane);
    for (user, other) in [(jane, t.b()), (john, t.a())] {
        // By a process that was always his, one that becomes each user in turn, and again by one of his.
        t.a().imap(user).append("INBOX", &mail("his own"));
        t.a().deliver(user, &mail("LMTP's"));
        t.converged(user);
        other.imap(user).select("INBOX").ok("STORE 1 +FLAGS (\\Flagged $Mine)");
        t.converged(user);
        t.a().imap(user).ok("CREATE Box");
        t.a().imap(user).select("INBOX").ok("MOVE 2 Box");
        let both = t.converged(user);
        assert_eq!((both.messages("INBOX").len(), both.messages("Box").len()), (1, 1), "{user}");
    }
    // It was told, not looked for.
    for server in [t.a(), t.b()] {
        assert_eq!((server.counters().healed, disbelieved(server)), (0, 0), "{}", server.name());
    }
}

#[test]
fn system_users_tell_of_their_own_mail_in_sdboxes() {
    tell_of_their_own_mail(Format::Sdbox);
}

#[test]
fn system_users_tell_of_their_own_mail_in_maildirs() {
    tell_of_their_own_mail(Format::Maildir);
}

#[test]
fn what_a_system_user_tells_of_anothers_mail_is_not_believed() {
    let (jane, john) = ("story-believed-jane", "story-believed-john");
    let t = Scene::on(system_users(&[(jane, 2001), (john, 2002)], Format::Sdbox), jane);
    t.expects_in_log(NOT_HIS);
    t.a().deliver(jane, &mail("kept"));
    let inbox = inbox(&t.settled());

    // That it is gone, that there is another one, and that nobody has copies of hers.
    let save = Save { guid: "made-up".into(), size: 2, body: b"x\n".to_vec(), body_inline: true, ..Default::default() };
    let nobody = UserPeers::default();
    let claims = vec![
        Kind::Intent(Intent { user: jane.into(), mailbox: Some(inbox.clone()), peers: Some(nobody) }),
        record(jane, &inbox, expunge(1)),
        record(jane, &Mailbox { uid_next: 9, ..inbox.clone() }, What::Save(save)),
    ];
    let _connection = tell(t.a(), 2002, claims);
    wait_until(SOON, "the relay does not believe it", || disbelieved(t.a()) == 2);
    t.a().wait_for_log("of system user 2002 tells of user story-believed-jane");

    t.a().deliver(jane, &mail("next"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
    assert_eq!(t.a().imap(jane).select("INBOX").uids(), [1, 2]);

    // The same words from one of her own processes are true.
    let _connection = tell(t.a(), 2001, vec![record(jane, &inbox, expunge(1))]);
    wait_until(SOON, "b has believed it", || t.b().imap(jane).select("INBOX").uids() == [2]);
}

#[test]
fn what_is_told_of_users_who_do_not_exist_is_dropped() {
    let jane = "story-nobody-jane";
    let t =
        Scene::on(Cluster::start(["a", "b"].map(|name| Setup::new(name, Format::Sdbox).only_user(jane)).into()), jane);
    t.expects_in_log(NOT_HIS);
    t.a().deliver(jane, &mail("hers"));
    let inbox = inbox(&t.settled());
    let claims = (0..50).map(|n| record(&format!("nobody-{n}"), &inbox, expunge(1))).collect();
    let connection = tell(t.a(), 2002, claims);
    wait_until(SOON, "the relay has dropped it", || disbelieved(t.a()) == 50);
    drop(connection);
    let status = t.a().status();
    assert_eq!((status[0]["failed"].as_str(), status[0]["pending"].as_str()), ("0", "0"), "{status:?}");
    assert!(t.a().has_looked());
    t.a().deliver(jane, &mail("another"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
}

/// The user that these of the server's processes really are, and what they may as root; in hexadecimal, as the kernel has it.
fn privileges(server: &Server, service: &str) -> Vec<(String, String)> {
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("it is there");
        line.split_whitespace().next().expect("a value").to_owned()
    };
    let of = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        (field(&status, "Uid:"), field(&status, "CapPrm:"))
    };
    server.pids(service).into_iter().map(of).collect()
}

#[test]
fn where_all_mail_is_one_system_users_nothing_of_ours_is_root() {
    let setup = |name| {
        let service = "service dovetail-worker {\n  user = mail\n}\n";
        Setup::new(name, Format::Sdbox).extra(service, service)
    };
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-no-root");
    t.a().deliver(&t.user, &mail("from a"));
    t.settled();
    t.b().imap(&t.user).select("INBOX").ok("STORE 1 +FLAGS (\\Flagged)");
    // One that is looked for.
    t.a().untold(&["save", "-u", &t.user, "-m", "INBOX"], &mail("untold"));
    t.a().imap(&t.user).append("INBOX", &mail("told"));
    assert_eq!(t.settled().messages("INBOX").len(), 3);
    nothing_of_ours_is_root(&t);
    only_the_users_uid_is_believed(&t);
}

/// The one system user's processes tell of every user, and those of another of none.
fn only_the_users_uid_is_believed(t: &Scene) {
    t.expects_in_log(NOT_HIS);
    let inbox = inbox(&t.settled());
    let vmail = std::fs::metadata(t.a().outside(&format!("/home/{}", t.user))).expect("a home").uid();
    let _other = tell(t.a(), 2002, vec![record(&t.user, &inbox, expunge(1))]);
    wait_until(SOON, "the relay does not believe it", || disbelieved(t.a()) == 1);
    t.a().deliver(&t.user, &mail("next"));
    assert_eq!(t.settled().messages("INBOX").len(), 4);
    let _vmails = tell(t.a(), vmail, vec![record(&t.user, &inbox, expunge(1))]);
    wait_until(SOON, "b has believed it", || t.b().imap(&t.user).select("INBOX").uids() == [2, 3, 4]);
    assert_eq!(disbelieved(t.a()), 1);
}

fn nothing_of_ours_is_root(t: &Scene) {
    for server in t.servers() {
        for service in ["dovetail", "dovetail-worker"] {
            let all = privileges(server, service);
            assert!(!all.is_empty());
            for (uid, capabilities) in all {
                assert_ne!(uid, "0", "{service}");
                assert_eq!(capabilities.trim_start_matches('0'), "", "{service} as {uid}");
            }
        }
    }
}

#[test]
fn workers_serve_the_relay_alone_whatever_the_mode_of_their_socket() {
    let open =
        "service dovetail-worker {\n  process_limit = 10\n  unix_listener dovetail-worker {\n    mode = 0666\n  }\n}\n";
    let setup = |name| Setup::new(name, Format::Sdbox).extra(open, open);
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-worker-socket");
    t.expects_in_log("wants to be served, which only root and the relay's own user may");
    t.a().deliver(&t.user, &mail("hers"));
    t.settled();
    let socket = t.a().outside("/run/dovetail-worker");
    let request = Kind::BodyRequest(BodyRequest { user: t.user.clone(), uid: 1, window: 1_000, ..Default::default() });
    let answer = as_user(2002, move || {
        let mut stream = UnixStream::connect(socket).expect("connect to a worker");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        let mut bytes = Vec::new();
        dovetail::wire::frame::append(&request.into(), &mut bytes).expect("a frame");
        // It may be closed already.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
            _ => answer,
        }
    });
    assert!(answer.is_empty(), "{answer:?}");
    t.a().deliver(&t.user, &mail("next"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
}
