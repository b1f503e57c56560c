//! Every byte of a mail, from none to fifty million. `settled` compares them.

use crate::cluster::imap::Appended;
use crate::cluster::{Cluster, Format};
use crate::scene::{mail_of_size, stories, Scene};

stories! {
    fn bodies_around_the_sizes_where_they_travel_differently(t) {
        let sizes = [1_000, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1];
        let mut imap = t.here().imap(&t.user);
        for size in sizes {
            imap.append("INBOX", &mail_of_size(size));
        }
        let stored: Vec<usize> = {
            assert_eq!(t.settled().messages("INBOX").len(), sizes.len());
            t.there().bodies(&t.user).iter().map(|body| body.size).collect()
        };
        assert_eq!(stored, sizes);
    }

    fn bodies_of_no_and_of_one_byte(t) {
        // IMAP and LMTP do not take them; doveadm does.
        t.here().doveadm_bytes(&["save", "-u", &t.user], b"");
        t.here().doveadm_bytes(&["save", "-u", &t.user], b"x");
        let count = t.here().bodies(&t.user).len();
        assert!(count >= 1, "doveadm saved neither");
        assert_eq!(t.settled().messages("INBOX").len(), count);
    }

    fn a_body_of_a_megabyte(t) {
        t.here().imap(&t.user).append("INBOX", &mail_of_size(1 << 20));
        t.settled();
        assert_eq!(t.there().bodies(&t.user)[0].size, 1 << 20);
    }

    fn a_large_body_between_small_ones_keeps_the_order(t) {
        let mut imap = t.here().imap(&t.user);
        for size in [100, 3 << 20, 200, 40_000, 300] {
            imap.append("INBOX", &mail_of_size(size));
        }
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("INBOX").len(), 5);
    }

    fn a_large_body_copied_and_moved(t) {
        let mut imap = t.here().imap(&t.user);
        imap.ok("CREATE Archive");
        imap.append("INBOX", &mail_of_size(300_000));
        let mut imap = imap.select("INBOX");
        imap.ok("COPY 1 Archive");
        imap.ok("MOVE 1 Archive");
        assert_eq!(t.settled().messages("Archive").len(), 2);
    }

    fn line_ends_of_all_kinds(t) {
        let mut imap = t.here().imap(&t.user);
        for text in [
            "Subject: crlf\r\n\r\na\r\nb\r\n",
            "Subject: lf\n\na\nb\n",
            "Subject: mixed\r\n\r\na\nb\r\nc\rd\n\n\r\n",
            "Subject: no end\n\nlast line",
            "Subject: no body",
            "\r\n\r\nno header",
            "Subject: dots\r\n\r\n.\r\n..\r\n.a\r\n",
        ] {
            imap.append("INBOX", text.as_bytes());
        }
        t.here().deliver(&t.user, b"Subject: dots by lmtp\r\n\r\n.\r\n..\r\n.a\r\n");
        assert_eq!(t.settled().messages("INBOX").len(), 8);
    }

    fn bytes_of_all_values(t) {
        let mut text = b"Subject: binary\r\nContent-Transfer-Encoding: 8bit\r\n\r\n".to_vec();
        text.extend((1..=255u8).filter(|b| !b"\r\n".contains(b)));
        text.extend_from_slice("\r\nGrüße, 你好\r\n".as_bytes());
        t.here().imap(&t.user).append("INBOX", &text);
        t.here().deliver(&t.user, &text);
        assert_eq!(t.settled().messages("INBOX").len(), 2);
    }

    fn nul_bytes_where_dovecot_takes_them(t) {
        let text = b"Subject: nul\r\nContent-Transfer-Encoding: binary\r\n\r\na\0b\0\0c\r\n";
        t.here().doveadm_bytes(&["save", "-u", &t.user], text);
        let answer =
            t.here().imap(&t.user).try_append_all("INBOX", &[Appended { flags: "", date: "", mail: text }]);
        let expected = if answer.is_ok() { 2 } else { 1 };
        assert_eq!(t.settled().messages("INBOX").len(), expected);
    }
}

/// Slow for its size, so only for one pair in which the formats differ and one in which they do not.
fn fifty_megabytes(a: Format, b: Format) {
    let t = Scene::on(Cluster::pair(a, b), "story-large");
    let size = 50_000_000;
    t.here().imap(&t.user).append("INBOX", &mail_of_size(size));
    t.settled();
    assert_eq!(t.there().bodies(&t.user)[0].size, size);
    t.there().imap(&t.user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen)");
    t.settled();
}

#[test]
fn a_body_of_fifty_megabytes_sdbox_to_sdbox() {
    fifty_megabytes(Format::Sdbox, Format::Sdbox);
}

#[test]
fn a_body_of_fifty_megabytes_maildir_to_mdbox() {
    fifty_megabytes(Format::Maildir, Format::Mdbox);
}
