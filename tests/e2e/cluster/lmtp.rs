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
        lmtp.say("LHLO client.test", "250");
        lmtp
    }

    /// Delivers one mail to all of `users`; panics unless it is taken for each.
    pub fn deliver(&mut self, users: &[&str], mail: &[u8]) {
        for (user, reply) in users.iter().zip(self.try_deliver(users, mail)) {
            assert!(reply.starts_with("250"), "LMTP refused the mail for {user}: {reply}");
        }
    }

    /// One reply for each of `users`.
    pub fn try_deliver(&mut self, users: &[&str], mail: &[u8]) -> Vec<String> {
        self.say("MAIL FROM:<sender@client.test>", "250");
        for user in users {
            self.say(&format!("RCPT TO:<{user}>"), "250");
        }
        self.say("DATA", "354");
        self.send(&dot_stuffed(mail));
        users.iter().map(|_| self.reply()).collect()
    }

    fn say(&mut self, line: &str, expected: &str) {
        self.send(format!("{line}\r\n").as_bytes());
        let reply = self.reply();
        assert!(reply.starts_with(expected), "LMTP: {line} was answered by {reply}");
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
