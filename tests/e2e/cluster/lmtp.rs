//! A small LMTP client (RFC 2033).

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

pub struct Lmtp {
    stream: BufReader<TcpStream>,
}

impl Lmtp {
    pub fn greeted(stream: TcpStream) -> Lmtp {
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
        stream.set_nodelay(true).expect("nodelay");
        let mut lmtp = Lmtp { stream: BufReader::new(stream) };
        lmtp.expect("220");
        let reply = lmtp.ask("LHLO client.test");
        assert!(reply.starts_with("250"), "LMTP: LHLO was answered by {reply}");
        lmtp
    }

    /// Delivers one mail to all of `users`; panics unless it is taken for each.
    pub fn deliver(&mut self, users: &[&str], mail: &[u8]) {
        for (user, reply) in users.iter().zip(self.try_deliver(users, mail)) {
            assert!(reply.starts_with("250"), "LMTP refused the mail for {user}: {reply}");
        }
    }

    /// One reply for each of `users`: the same for all if Dovecot is shutting down (421) before it has the mail.
    pub fn try_deliver(&mut self, users: &[&str], mail: &[u8]) -> Vec<String> {
        let recipients = users.iter().map(|user| (format!("RCPT TO:<{user}>"), "250"));
        let envelope = std::iter::once(("MAIL FROM:<sender@client.test>".to_owned(), "250")).chain(recipients);
        for (line, expected) in envelope.chain([("DATA".to_owned(), "354")]) {
            let reply = self.ask(&line);
            if reply.starts_with("421") {
                return vec![reply; users.len()];
            }
            assert!(reply.starts_with(expected), "LMTP: {line} was answered by {reply}");
        }
        self.send(&dot_stuffed(mail));
        users.iter().map(|_| self.reply()).collect()
    }

    fn ask(&mut self, line: &str) -> String {
        self.send(format!("{line}\r\n").as_bytes());
        self.reply()
    }

    fn expect(&mut self, expected: &str) {
        let reply = self.reply();
        assert!(reply.starts_with(expected), "LMTP greeting: {reply}");
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("LMTP write");
    }

    /// The last line of a reply.
    fn reply(&mut self) -> String {
        loop {
            let mut line = String::new();
            let n = self.stream.read_line(&mut line).expect("LMTP read");
            assert!(n > 0, "LMTP closed the connection");
            if line.as_bytes().get(3) != Some(&b'-') {
                return line.trim_end().to_owned();
            }
        }
    }
}

fn dot_stuffed(mail: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(mail.len() + 64);
    for line in mail.split_inclusive(|b| *b == b'\n') {
        if line.starts_with(b".") {
            out.push(b'.');
        }
        out.extend_from_slice(line);
    }
    if !out.is_empty() && !out.ends_with(b"\r\n") {
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b".\r\n");
    out
}
