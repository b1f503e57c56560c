//! IMAP and LMTP clients that live with servers that die: a lost connection is a result, not a panic.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::time::Duration;

pub use crate::cluster::imap::{literal, Answer, Appended};
use crate::cluster::{holds_within, imap, Server};

/// Far above any answer's time, the locks included that Dovecot respects when their process was killed: maildir's
/// dovecot-uidlist.lock for two minutes, the lock of a new dovecot.index.log for three.
const ANSWER_DEADLINE: Duration = Duration::from_secs(240);
/// While this server is stopped, clients of the other one may do their steps.
const CONNECT_DEADLINE: Duration = Duration::from_secs(120);

/// The connection ended before the answer came.
#[derive(Debug)]
pub struct Lost;

type Result<T> = std::result::Result<T, Lost>;

/// A connection that is cut is lost; one on which nothing comes is a fault of the server.
fn lost(error: io::Error) -> Lost {
    let hangs = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    assert!(!hangs, "the server did not answer within {ANSWER_DEADLINE:?}");
    Lost
}

fn connect(server: &Server, port: u16) -> Result<TcpStream> {
    let stream = server.connect(port).map_err(lost)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE)).map_err(lost)?;
    stream.set_nodelay(true).map_err(lost)?;
    Ok(stream)
}

/// Tries until the server, which may be on its way up again, takes it.
fn until_it_works<T>(what: &str, mut attempt: impl FnMut() -> Result<T>) -> T {
    let mut made = None;
    let works = holds_within(CONNECT_DEADLINE, || {
        made = attempt().ok();
        made.is_some()
    });
    assert!(works, "{what}: no connection within {CONNECT_DEADLINE:?}");
    made.expect("it works")
}

pub struct Imap(imap::Imap);

impl Imap {
    pub fn login(server: &Server, user: &str) -> Imap {
        until_it_works(&format!("IMAP for {user}"), || {
            let mut imap = Imap(imap::Imap::greeted(connect(server, server.ports.imap)?).map_err(lost)?);
            // A NO is authentication that is on its way up.
            let answer = imap.command(&imap::login_command(user))?;
            answer.is_ok().then_some(imap).ok_or(Lost)
        })
    }

    pub fn command(&mut self, command: &str) -> Result<Answer> {
        self.0.try_command(command).map_err(lost)
    }

    pub fn append(&mut self, mailbox: &str, mails: &[Appended]) -> Result<Answer> {
        self.0.append_unless_lost(mailbox, mails).map_err(lost)
    }
}

/// Delivers a mail; the reply that says what became of it.
pub fn deliver(server: &Server, user: &str, text: &[u8]) -> Result<String> {
    let mut stream = until_it_works(&format!("LMTP for {user}"), || {
        let mut stream = BufReader::new(connect(server, server.ports.lmtp)?);
        let greeted =
            reply(&mut stream)?.starts_with("220") && say(&mut stream, "LHLO client.test\r\n")?.starts_with("250");
        greeted.then_some(stream).ok_or(Lost)
    });
    say(&mut stream, "MAIL FROM:<sender@client.test>\r\n")?;
    for line in [format!("RCPT TO:<{user}>\r\n"), "DATA\r\n".into()] {
        let answer = say(&mut stream, &line)?;
        if !answer.starts_with('2') && !answer.starts_with("354") {
            return Ok(answer);
        }
    }
    // No line of ours begins with a dot.
    stream.get_mut().write_all(&[text, b".\r\n"].concat()).map_err(lost)?;
    reply(&mut stream)
}

fn say(stream: &mut BufReader<TcpStream>, line: &str) -> Result<String> {
    stream.get_mut().write_all(line.as_bytes()).map_err(lost)?;
    reply(stream)
}

fn reply(stream: &mut BufReader<TcpStream>) -> Result<String> {
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).map_err(lost)?;
        if !line.ends_with("\r\n") {
            return Err(Lost);
        }
        if line.as_bytes().get(3) != Some(&b'-') {
            return Ok(line.trim_end().to_owned());
        }
    }
}
