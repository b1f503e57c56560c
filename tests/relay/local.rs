//! Local processes that nobody trusts: whatever they say, the relay goes on for the others.

use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::{AckWanted, Attach, Expunge, Looked, Mailbox, Record, Span, UserPeers};

use crate::relay::house::*;
use crate::relay::tls::{lines, lines_with};

/// The system user whose mail the test's users have; nobody who tells of them is that one.
const OWNER: u32 = 2001;
const OTHER: u32 = 2002;

fn attach() -> Kind {
    Kind::Attach(Attach { process: "imap".into(), pid: 4711 })
}

/// Tells that something was written to mailboxes of all these users.
fn written(users: impl IntoIterator<Item = String>) -> Kind {
    let span = |user| Span { user, mailbox_guid: vec![1; 16], log_seq: 2, begin: 0, end: 8, ..Default::default() };
    Kind::Record(Record { spans: users.into_iter().map(span).collect(), ..Default::default() })
}

/// The next look is at this user's mailboxes, whose system user the worker says, if there is one.
fn finds_owner(server: &Server, uid: Option<u32>) -> String {
    let (mut worker, look) = server.next_look();
    if uid.is_some() {
        let peers = Some(UserPeers { all: true, uid, ..Default::default() });
        worker.send(Kind::Looked(Looked { job: look.job, more: true, peers, ..Default::default() }));
    }
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    look.user
}

#[test]
fn of_users_who_do_not_exist_each_is_looked_for_once() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let users = || (0..4).map(|n| format!("made-up-{n}"));
    let _process = b.untrusted(OTHER, &[attach(), written(users())]);
    let mut asked: Vec<String> = users().map(|_| finds_owner(&b, None)).collect();
    asked.sort();
    assert_eq!(asked, users().collect::<Vec<_>>());
    until("the record is dropped", || b.noted("told_of_others") == 4);
}

#[test]
fn who_tells_of_many_users_at_once_is_sent_away() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut process = b.untrusted(OTHER, &[attach(), written((0..40).map(|n| format!("made-up-{n}")))]);
    assert!(process.is_closed());
    assert_eq!(b.status().counters.unwrap().malformed, 1);
}

#[test]
fn who_does_not_read_its_answers_is_not_read() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let save_and_wait = |id| {
        let ack = Some(AckWanted { id, peers: 1, timeout_ms: 60_000 });
        Kind::Record(Record { change: Some(save("jane", 1)), ack, ..Default::default() })
    };
    let mut process = b.untrusted(OTHER, &[attach(), save_and_wait(0)]);
    assert_eq!(finds_owner(&b, Some(OWNER)), "jane");
    // Rounds in which nothing more is read from it, if nothing ever is.
    let (mut sent, mut quiet) = (0, 0);
    while quiet < 100 {
        let before = sent;
        process.send_while_there_is_room(|| {
            sent += 1;
            save_and_wait(sent)
        });
        // The last one did not go.
        sent -= 1;
        quiet = if sent == before { quiet + 1 } else { 0 };
        assert!(sent < 200_000, "its answers are kept, however many they are");
        b.status();
    }
    // All are there when it does.
    for id in 0..=sent {
        match process.next() {
            Kind::Acked(acked) => assert_eq!(acked.id, id),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn of_a_user_who_tells_what_cannot_be_sent_not_every_mailbox_is_listed() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut process = b.process("imap");
    let mut bad = |guid: Vec<u8>| {
        let mailbox = Mailbox { guid, path: vec![String::new()], ..Default::default() };
        let change = change("jane", mailbox, What::Expunge(Expunge::default()));
        process.send(Kind::Record(Record { change: Some(change), ..Default::default() }));
    };
    (0..300u16).for_each(|n| bad([&n.to_be_bytes()[..], &[1; 14]].concat()));
    bad(vec![1; 50_000]);
    until("all are counted", || b.noted("bad_change") == 301);
    let listed = b.failed();
    assert_eq!(listed.len(), 101);
    assert!(listed.iter().all(|entry| [0, 16].contains(&entry.mailbox_guid.len())));
    assert_eq!(listed.iter().filter(|entry| entry.mailbox_guid.is_empty()).count(), 1);
}

#[test]
fn who_does_not_say_which_process_it_is_is_sent_away() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut said = b.untrusted(OTHER, &[attach()]);
    let mut silent = b.untrusted(OTHER, &[]);
    let mut half = b.untrusted(OTHER, &[]);
    half.send_bytes(&[1, 0, 0]);
    assert!(silent.is_closed() && half.is_closed());
    assert_eq!(b.status().counters.unwrap().malformed, 2);
    said.send(written(["jane".to_owned()]));
    assert_eq!(finds_owner(&b, Some(OWNER)), "jane");
}

#[test]
fn no_system_user_keeps_processes_of_others_or_peers_out() {
    let house = House::new();
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| config.client_limit = 20);
    let _crowd: Vec<Wire> = (0..40).map(|_| b.untrusted(OTHER, &[attach()])).collect();
    until("half of what there is room for is not theirs", || b.closed() == 30);

    let _imap = b.untrusted(OWNER, &[attach(), written(["jane".to_owned()])]);
    assert_eq!(finds_owner(&b, Some(OWNER)), "jane");
    until("one of the crowd has gone for it", || b.closed() == 31);
    let _peer = b.connect_as_peer("a");
    assert_eq!(b.peer("a").state, "connected");
}

#[test]
fn of_a_flood_of_bad_processes_the_log_says_little() {
    lines();
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let name = "flooding-the-log";
    for _ in 0..200 {
        let mut bad = b.untrusted(OTHER, &[Kind::Attach(Attach { process: name.into(), pid: 4711 }), attach()]);
        assert!(bad.is_closed());
    }
    assert_eq!(b.status().counters.unwrap().malformed, 200);
    assert!((20..40).contains(&lines_with(name)), "{} lines", lines_with(name));
}
