//! Users who are compared with their peers, and what is remembered of them meanwhile.

use std::time::Duration;

use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{
    Ack, Answer, Change, Intent, Mailbox, MailboxDigest, Name, RangeDigest, Record, Stamp, Surveyed, UserPeers,
};

use super::house::*;

/// Server c, which the peers a and b connect to.
fn third(house: &House, edit: impl FnOnce(&mut dovetail::relay::Config)) -> Server {
    house.server_with("c", &[("a", "127.0.0.1:9".into()), ("b", "127.0.0.1:9".into())], edit)
}

/// The next comparison of the server, which is with this peer, finds nothing.
fn is_compared(server: &Server, peer: &mut Wire) {
    let (worker, survey) = server.next_survey();
    worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
    answers(peer);
}

/// The peer has the same.
fn answers(peer: &mut Wire) {
    let question = peer.next_question();
    peer.send(Kind::Answer(Answer { id: question.id, ..Default::default() }));
}

fn without_ops() -> Change {
    Change { ops: vec![], ..save("jane", 1) }
}

/// Whose is listed, and with which peers he is to be compared for it.
fn listed(server: &Server) -> Vec<String> {
    server.failed().into_iter().map(|entry| format!("{}:{}", entry.user, entry.peer)).collect()
}

#[test]
fn what_is_listed_of_a_peer_that_is_away_stays_when_others_are_compared_in_the_background() {
    let house = House::new();
    let c = third(&house, |config| config.compare_interval_ms = Some(10));
    let mut a = c.connect_as_peer("a");
    let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq: 1, clock: 1, vector: vec![] });
    let malformed = Kind::Change(Change { stamp, ..without_ops() });
    for _ in 0..2 {
        a.send(malformed.clone());
        a.next_refusal();
    }
    a.send(malformed);
    until("it is set aside", || listed(&c) == ["jane:a"]);
    drop(a);
    until("a is away", || c.peer("a").state != "connected");

    c.process("lmtp").save_with_span("jane", 1, (100, 200));
    let mut b = c.connect_as_peer("b");
    let change = b.next_change();
    b.send(Kind::Ack(Ack { epoch: change.epoch, seqs: vec![change.seq], heard_clock: 0 }));
    // When the second one begins, the first one is over.
    is_compared(&c, &mut b);
    c.next_survey();
    assert_eq!(listed(&c), ["jane:a"]);
}

#[test]
fn what_fails_once_more_while_its_user_is_compared_is_not_forgotten() {
    let house = House::new();
    let c = third(&house, |_| {});
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    let mut imap = c.process("imap");
    let mut fails = |records: u64| {
        imap.send(Kind::Record(Record { change: Some(without_ops()), ..Default::default() }));
        until("it is heard", || c.status().counters.unwrap().records == records);
    };
    let mailboxes = || c.failed().into_iter().map(|entry| entry.mailbox_guid).collect::<Vec<_>>();
    fails(1);
    assert_eq!(mailboxes(), [[1; 16]]);
    std::thread::scope(|scope| {
        let resync = scope.spawn(|| c.resync("jane"));
        is_compared(&c, &mut a);
        let (worker, survey) = c.next_survey();
        fails(2);
        worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
        answers(&mut b);
        assert_eq!(resync.join().unwrap(), Ok(()));
        assert_eq!(mailboxes(), [[1; 16]], "only that it was asked for is over");

        let resync = scope.spawn(|| c.resync("jane"));
        is_compared(&c, &mut a);
        is_compared(&c, &mut b);
        assert_eq!(resync.join().unwrap(), Ok(()));
        assert!(mailboxes().is_empty());
    });
}

#[test]
fn who_is_listed_is_compared_with_those_who_are_there_and_with_the_others_when_they_come() {
    let house = House::new();
    let c = third(&house, |config| config.compare_listed_after_us = Some(0));
    let mut b = c.connect_as_peer("b");
    let mut imap = c.process("imap");
    imap.send(Kind::Record(Record { change: Some(without_ops()), ..Default::default() }));
    until("it is listed", || listed(&c) == ["jane:"]);
    is_compared(&c, &mut b);
    until("only a is left", || listed(&c) == ["jane:a"]);
    let progress = c.progress();
    assert_eq!((progress.users, progress.users_done, progress.is_running), (1, 1, false), "nothing goes on meanwhile");
    let lacks = c.wait_for_peers("jane");
    assert!(lacks.iter().any(|lack| lack.reason.contains("server a, which is not connected")), "{lacks:?}");

    let mut a = c.connect_as_peer("a");
    is_compared(&c, &mut a);
    is_compared(&c, &mut b);
    until("nobody is left", || listed(&c).is_empty());
    assert!(c.wait_for_peers("jane").is_empty());
}

/// With whom he is to be compared is listed instead.
#[test]
fn whoever_has_no_peer_that_is_there_holds_up_nobody() {
    let house = House::new();
    let c = third(&house, |config| config.compare_listed_after_us = Some(0));
    let mut b = c.connect_as_peer("b");
    let mut imap = c.process("imap");
    let peers = Some(UserPeers { all: false, servers: vec!["a".into()], uid: None });
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: None, peers }));
    imap.send(Kind::Record(Record { change: Some(without_ops()), ..Default::default() }));
    until("it is known that he is to be compared with a", || listed(&c) == ["jane:a"]);
    imap.send(Kind::Record(Record { change: Some(Change { ops: vec![], ..save("joe", 1) }), ..Default::default() }));
    is_compared(&c, &mut b);
    until("joe's turn is over", || listed(&c) == ["jane:a", "joe:a"]);
    // He gets another peer for the one that is away.
    let peers = Some(UserPeers { all: false, servers: vec!["b".into()], uid: None });
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: None, peers }));
    is_compared(&c, &mut b);
    until("he is compared with all of his", || listed(&c) == ["joe:a"]);
}

#[test]
fn what_differs_each_time_in_another_way_is_told_as_that() {
    let house = House::new();
    let c = house.server("c", &[("b", "127.0.0.1:9".into())]);
    let mut b = c.connect_as_peer("b");
    std::thread::scope(|scope| {
        let resync = scope.spawn(|| c.resync("jane"));
        let mut looks = 0;
        while !resync.is_finished() {
            let Some((mut worker, survey)) = c.try_next_survey(Duration::from_millis(10)) else { continue };
            looks += 1;
            let (guid, path) = (vec![looks; 16], vec![format!("box {looks}")]);
            let mailbox = Some(Mailbox { guid, path, uid_validity: 1, uid_next: 1, ..Default::default() });
            let mailboxes = vec![MailboxDigest { mailbox, ..Default::default() }];
            worker.send(Kind::Surveyed(Surveyed { job: survey.job, more: true, mailboxes, ..Default::default() }));
            worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
            answers(&mut b);
        }
        let error = "user jane, server b: something else differs each time";
        assert_eq!(resync.join().unwrap(), Err(error.to_owned()));
    });
}

/// What was told may be told once more: it is known again.
#[test]
fn a_worker_that_goes_away_over_what_it_is_to_tell_is_no_end_of_the_comparison() {
    let house = House::new();
    let c = house.server("c", &[("b", "127.0.0.1:9".into())]);
    let mut b = c.connect_as_peer("b");
    std::thread::scope(|scope| {
        let resync = scope.spawn(|| c.resync("jane"));
        // Nobody there is subscribed to it, as is found twice.
        for _ in 0..2 {
            let (mut worker, survey) = c.next_survey();
            let subscribed = vec![Name { path: vec!["Work".into()] }];
            worker.send(Kind::Surveyed(Surveyed { job: survey.job, more: true, subscribed, ..Default::default() }));
            worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
            answers(&mut b);
        }
        drop(c.next_tell());
        is_compared(&c, &mut b);
        assert_eq!(resync.join().unwrap(), Ok(()));
    });
}

/// Both are asked for the contents only behind the list, in ranges.
#[test]
fn a_peer_that_does_not_know_how_to_compare_bodies_is_named() {
    let house = House::new();
    let c = house.server("c", &[("b", "127.0.0.1:9".into())]);
    let mut b = c.connect_as_peer("b");
    let list = || {
        let (guid, path) = (vec![1; 16], vec!["INBOX".into()]);
        let mailbox = Some(Mailbox { guid, path, uid_validity: 1, uid_next: 2, ..Default::default() });
        let mailboxes = vec![MailboxDigest { mailbox, messages: 1, digest: 7, ..Default::default() }];
        Surveyed { more: true, mailboxes, ..Default::default() }
    };
    std::thread::scope(|scope| {
        let resync = scope.spawn(|| c.resync_bodies("jane"));
        let (mut worker, survey) = c.next_survey();
        assert!(!survey.bodies);
        worker.send(Kind::Surveyed(Surveyed { job: survey.job, ..list() }));
        worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
        let id = b.next_question().id;
        b.send(Kind::Answer(Answer { id, more: true, surveyed: Some(list()), ..Default::default() }));
        b.send(Kind::Answer(Answer { id, ..Default::default() }));

        let (mut worker, survey) = c.next_survey();
        assert!(survey.bodies && !survey.messages);
        let ranges = vec![RangeDigest { range: Some(survey.ranges[0]), messages: 1, digest: 8 }];
        let found = Surveyed { more: true, ranges, ..Default::default() };
        worker.send(Kind::Surveyed(Surveyed { job: survey.job, bodies: true, ..found.clone() }));
        worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
        let question = b.next_question();
        assert!(question.survey.is_some_and(|survey| survey.bodies));
        b.send(Kind::Answer(Answer { id: question.id, more: true, surveyed: Some(found), ..Default::default() }));
        b.send(Kind::Answer(Answer { id: question.id, ..Default::default() }));
        let error = "user jane, server b: its version of Dovetail does not compare bodies";
        assert_eq!(resync.join().unwrap(), Err(error.to_owned()));
    });
}
