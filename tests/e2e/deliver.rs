//! New mail, by every door that Dovecot has.

use crate::cluster::imap::Appended;
use crate::scene::{mail, stories};

stories! {
    fn lmtp_delivers_a_mail(t) {
        t.here().deliver(&t.user, &mail("one"));
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("INBOX").len(), 1);
    }

    fn lmtp_delivers_three_mails_in_one_session(t) {
        let mut lmtp = t.here().lmtp();
        for subject in ["one", "two", "three"] {
            lmtp.deliver(&[&t.user], &mail(subject));
        }
        assert_eq!(t.settled().messages("INBOX").len(), 3);
    }

    fn lmtp_delivers_one_mail_to_several_users(t) {
        let users = ["1", "2", "3"].map(|n| format!("{}-{n}", t.user));
        t.here().lmtp().deliver(&[&users[0], &users[1], &users[2]], &mail("for all"));
        for user in &users {
            assert_eq!(t.converged(user).messages("INBOX").len(), 1);
        }
    }

    fn dovecot_lda_delivers_a_mail(t) {
        t.here().lda(&t.user, &mail("by lda"));
        assert_eq!(t.settled().messages("INBOX").len(), 1);
    }

    fn append_stores_flags_keywords_and_the_date(t) {
        let date = " 1-Jan-2020 12:00:00 +0130";
        let flags = "\\Seen \\Flagged \\Answered \\Draft \\Deleted $Work holiday";
        t.here().imap(&t.user).append_all("INBOX", &[Appended { flags, date, mail: &mail("kept") }]);
        let snapshot = t.settled();
        let message = snapshot.messages("INBOX")[0];
        assert_eq!(message.flags.len(), 7, "{message:?}");
        assert_eq!(message.received, "1577874600");
    }

    fn append_goes_to_another_mailbox(t) {
        let mut imap = t.here().imap(&t.user);
        imap.append("INBOX", &mail("received"));
        imap.ok("CREATE Drafts");
        imap.append("Drafts", &mail("draft"));
        assert_eq!(t.settled().messages("Drafts").len(), 1);
    }

    fn multiappend_stores_several_mails_at_once(t) {
        let (one, two, three) = (mail("one"), mail("two"), mail("three"));
        t.here().imap(&t.user).append_all("INBOX", &[
            Appended { flags: "\\Seen", date: "", mail: &one },
            Appended { flags: "", date: " 1-Feb-2021 00:00:00 +0000", mail: &two },
            Appended { flags: "todo", date: "", mail: &three },
        ]);
        let snapshot = t.settled();
        let seen: Vec<usize> = snapshot.messages("INBOX").iter().map(|m| m.flags.len()).collect();
        assert_eq!(seen, [1, 0, 1]);
    }

    fn doveadm_saves_a_mail(t) {
        t.here().doveadm_bytes(&["save", "-u", &t.user], &mail("saved"));
        assert_eq!(t.settled().messages("INBOX").len(), 1);
    }

    fn a_mail_answers_a_mail_from_the_other_side(t) {
        // Given a mail that came in here and is known there.
        t.here().deliver(&t.user, &mail("question"));
        t.settled();
        // When one comes in there, and then another here.
        t.there().deliver(&t.user, &mail("answer"));
        t.settled();
        t.here().deliver(&t.user, &mail("thanks"));
        // Then all are on both.
        let uids: Vec<u32> = t.settled().mailboxes["INBOX"].messages.keys().copied().collect();
        assert_eq!(uids, [1, 2, 3]);
    }
}
