//! The harness itself, against a Dovecot without our plugin.

use crate::cluster::{Cluster, Format, Setup, Snapshot};

#[test]
fn a_plain_dovecot_takes_a_mail_and_gives_it_back() {
    for format in [Format::Sdbox, Format::Mdbox, Format::Maildir] {
        // Given a server as the distribution ships it.
        let cluster = Cluster::start(vec![Setup::new("a", format).without_plugin()]);
        let server = cluster.a();

        // When a mail with awkward lines is delivered.
        let mail = b"Subject: awkward\r\n\r\n.\r\n..dots\r\ntab\there\n\r\nend\r\n";
        server.deliver("user", mail);
        server.lda("user", b"Subject: by lda\n\nhello\n");

        // Then every client sees it.
        let mut imap = server.imap("user").select("INBOX");
        let answer = imap.ok("FETCH 1 BODY.PEEK[]");
        let body = String::from_utf8_lossy(answer.literal().expect("a body")).into_owned();
        assert!(body.ends_with("Subject: awkward\r\n\r\n.\r\n..dots\r\ntab\there\r\n\r\nend\r\n"), "{body:?}");
        assert_eq!(server.pop3("user").command_lines("LIST").len(), 2);
        let snapshot = Snapshot::take(server, "user", true);
        assert_eq!(snapshot.messages("INBOX").len(), 2);
        let bodies = server.bodies("user");
        assert_eq!(bodies.len(), 2);
        assert_eq!(server.pids("auth").len(), 1);
        assert_eq!(server.new_complaints(&[]), Vec::<String>::new());

        // And it can be stopped and started again.
        server.stop();
        server.start();
        assert_eq!(Snapshot::take(server, "user", true), snapshot);
    }
}
