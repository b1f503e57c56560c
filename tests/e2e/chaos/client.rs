//! IMAP and LMTP clients that live with servers that die: a lost connection is a result, not a panic.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::cluster::{holds_within, Server, PASSWORD};

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

fn connect(server: &Server, port: u16) -> Result<BufReader<TcpStream>> {
    let stream = server.connect(port).map_err(lost)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE)).map_err(lost)?;
    stream.set_nodelay(true).map_err(lost)?;
    Ok(BufReader::new(stream))
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

pub struct Imap {
    stream: BufReader<TcpStream>,
    tags: u32,
}

pub struct Answer {
    /// Untagged lines without the "* ", literals included.
    pub untagged: Vec<Vec<u8>>,
    /// The tagged line without its tag.
    pub result: String,
}

impl Answer {
    pub fn is_ok(&self) -> bool {
        self.result.starts_with("OK")
    }
}

/// A mail of an APPEND.
pub struct Appended<'a> {
    pub flags: &'a str,
    pub text: &'a [u8],
}

impl Imap {
    pub fn login(server: &Server, user: &str) -> Imap {
        until_it_works(&format!("IMAP for {user}"), || {
            let mut imap = Imap { stream: connect(server, server.ports.imap)?, tags: 0 };
            imap.line()?;
            // A NO is authentication that is on its way up.
            let answer = imap.command(&format!("LOGIN {user} {PASSWORD}"))?;
            answer.is_ok().then_some(imap).ok_or(Lost)
        })
    }

    pub fn command(&mut self, command: &str) -> Result<Answer> {
        self.command_bytes(command.as_bytes())
    }

    pub fn append(&mut self, mailbox: &str, mails: &[Appended]) -> Result<Answer> {
        let mut command = format!("APPEND {mailbox}").into_bytes();
        for Appended { flags, text } in mails {
            command.extend_from_slice(format!(" ({flags}) {{{}+}}\r\n", text.len()).as_bytes());
            command.extend_from_slice(text);
        }
        self.command_bytes(&command)
    }

    fn command_bytes(&mut self, command: &[u8]) -> Result<Answer> {
        self.tags += 1;
        let tag = format!("t{} ", self.tags);
        let out = [tag.as_bytes(), command, b"\r\n"].concat();
        self.stream.get_mut().write_all(&out).map_err(lost)?;
        let mut untagged = Vec::new();
        loop {
            let line = self.line()?;
            if let Some(rest) = line.strip_prefix(b"* ") {
                untagged.push(rest.to_vec());
            } else if let Some(rest) = line.strip_prefix(tag.as_bytes()) {
                return Ok(Answer { untagged, result: String::from_utf8_lossy(rest).into_owned() });
            }
        }
    }

    /// A line with the literals that it holds.
    fn line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            let start = line.len();
            self.stream.read_until(b'\n', &mut line).map_err(lost)?;
            if !line[start..].ends_with(b"\r\n") {
                return Err(Lost);
            }
            let Some(size) = literal_size(&line[start..]) else { break };
            let start = line.len();
            line.resize(start + size, 0);
            self.stream.read_exact(&mut line[start..]).map_err(lost)?;
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }
}

fn literal_size(line: &[u8]) -> Option<usize> {
    let rest = line.strip_suffix(b"}\r\n")?;
    let open = rest.iter().rposition(|b| *b == b'{')?;
    std::str::from_utf8(&rest[open + 1..]).ok()?.parse().ok()
}

/// The literal in a line.
pub fn literal(line: &[u8]) -> Option<&[u8]> {
    let start = line.windows(3).position(|w| w == b"}\r\n")? + 3;
    let size = literal_size(&line[..start])?;
    line.get(start..start + size)
}

/// Delivers a mail; the reply that says what became of it.
pub fn deliver(server: &Server, user: &str, text: &[u8]) -> Result<String> {
    let mut stream = until_it_works(&format!("LMTP for {user}"), || {
        let mut stream = connect(server, server.ports.lmtp)?;
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
