//! Every byte of a mail, from none to fifty million. `settled` compares them.

use std::process::Command;

use crate::cluster::imap::Appended;
use crate::cluster::{Cluster, Format, Setup};
use crate::scene::{mail_of_size, stories, Scene};

/// Dovecot stores CRLF as LF (mail_save_crlf).
fn stored_size(text: &[u8]) -> usize {
    text.len() - text.windows(2).filter(|pair| pair == b"\r\n").count()
}

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
        assert_eq!(t.settled().messages("INBOX").len(), 2);
        let stored: Vec<usize> = t.there().bodies(&t.user).iter().map(|body| body.size).collect();
        assert_eq!(stored, [0, 1]);
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
        assert_eq!(t.there().bodies(&t.user)[0].size, stored_size(text));
    }

    fn a_large_body_of_any_bytes_and_line_ends(t) {
        let mut text = b"Subject: large\r\n\nmixed\r\n".to_vec();
        text.extend((0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8));
        t.here().doveadm_bytes(&["save", "-u", &t.user], &text);
        assert_eq!(t.settled().messages("INBOX").len(), 1);
        assert_eq!(t.there().bodies(&t.user)[0].size, stored_size(&text));
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

const CHANGED_WHEN_STORED_23: &str = "
mail_plugins = $mail_plugins mail_crypt zlib
plugin {
  mail_crypt_global_private_key = <{DIR}/private.pem
  mail_crypt_global_public_key = <{DIR}/public.pem
  mail_crypt_save_version = 2
  zlib_save = gz
}
";

const CHANGED_WHEN_STORED_24: &str = "
mail_plugins {
  mail_crypt = yes
  mail_compress = yes
}
mail_compress_write_method = gz
crypt_global_public_key_file = {DIR}/public.pem
crypt_global_private_key main {
  crypt_private_key_file = {DIR}/private.pem
}
";

fn openssl(arguments: &[&str], input: &str) -> String {
    use std::io::Write;
    use std::process::Stdio;
    let mut openssl = Command::new("openssl");
    let mut child = openssl
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("openssl reads");
    let output = child.wait_with_output().expect("openssl");
    assert!(output.status.success(), "openssl {arguments:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("PEM")
}

/// A small body is copied while it is written: before anything compresses or encrypts it.
fn bodies_that_are_compressed_and_encrypted(format: Format, user: &str) {
    let setup = |name| {
        let private = openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"], "");
        let public = openssl(&["pkey", "-pubout"], &private);
        Setup::new(name, format)
            .file("private.pem", &private)
            .file("public.pem", &public)
            .extra(CHANGED_WHEN_STORED_23, CHANGED_WHEN_STORED_24)
    };
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), user);
    let sizes = [100, 20_000, 200_000];
    for size in sizes {
        t.a().imap(user).append("INBOX", &mail_of_size(size));
        t.a().deliver(user, &mail_of_size(size));
    }
    assert_eq!(t.settled().messages("INBOX").len(), 2 * sizes.len());
    for server in [t.a(), t.b()] {
        let search = Command::new("grep")
            .args(["-rl", "--exclude=dovecot.index*", "Subject: sized"])
            .arg(server.outside("/home"))
            .output()
            .expect("grep");
        assert_eq!(String::from_utf8_lossy(&search.stdout), "", "stored as plain text");
        let of_appended = server.bodies(user).iter().filter(|body| sizes.contains(&body.size)).count();
        assert!(of_appended >= sizes.len(), "{} has other bodies", server.name());
    }
}

#[test]
fn compressed_and_encrypted_bodies_in_sdbox() {
    bodies_that_are_compressed_and_encrypted(Format::Sdbox, "story-encrypted-sdbox");
}

#[test]
fn compressed_and_encrypted_bodies_in_maildir() {
    bodies_that_are_compressed_and_encrypted(Format::Maildir, "story-encrypted-maildir");
}
