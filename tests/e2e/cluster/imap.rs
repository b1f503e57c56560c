//! A small IMAP client (RFC 3501): commands with literals, answers as they came with their literals inside.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::PASSWORD;

pub struct Imap {
    stream: BufReader<TcpStream>,
    tags: u32,
}

/// All that came in answer to one command.
#[derive(Debug)]
pub struct Answer {
    /// Untagged lines without the "* ", literals included.
    pub untagged: Vec<Vec<u8>>,
    /// The tagged line without its tag: `OK ...`, `NO ...`, `BAD ...`.
    pub result: String,
}

impl Answer {
    pub fn is_ok(&self) -> bool {
        self.result.starts_with("OK")
    }

    /// Untagged lines as text.
    pub fn lines(&self) -> Vec<String> {
        self.untagged.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.lines().iter().any(|line| line.contains(text))
    }

    /// The first literal: a fetched body.
    pub fn literal(&self) -> Option<&[u8]> {
        self.untagged.iter().find_map(|line| literal(line))
    }

    /// The number in `* n EXISTS`.
    pub fn exists(&self) -> Option<u32> {
        self.lines().iter().rev().find_map(|line| line.strip_suffix(" EXISTS")?.parse().ok())
    }
}

/// One message of an APPEND.
pub struct Appended<'a> {
    pub flags: &'a str,
    /// Such as `" 1-Jan-2020 12:00:00 +0100"`; empty: now.
    pub date: &'a str,
    pub mail: &'a [u8],
}

impl Imap {
    pub fn login(stream: TcpStream, user: &str) -> Imap {
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
        let mut imap = Imap::greeted(stream).expect("IMAP greeting");
        imap.ok(&login_command(user));
        imap
    }

    /// Not logged in yet.
    pub fn greeted(stream: TcpStream) -> io::Result<Imap> {
        stream.set_nodelay(true)?;
        let mut imap = Imap { stream: BufReader::new(stream), tags: 0 };
        imap.line()?;
        Ok(imap)
    }

    /// Logs in and selects a mailbox.
    pub fn select(mut self, mailbox: &str) -> Imap {
        self.ok(&format!("SELECT {mailbox}"));
        self
    }

    /// Panics unless the command is answered OK.
    pub fn ok(&mut self, command: &str) -> Answer {
        let answer = self.command(command);
        assert!(answer.is_ok(), "IMAP: {command} was answered {}", answer.result);
        answer
    }

    pub fn command(&mut self, command: &str) -> Answer {
        self.try_command(command).unwrap_or_else(|error| panic!("IMAP: {command}: {error}"))
    }

    /// Fails if the connection ends before the answer.
    pub fn try_command(&mut self, command: &str) -> io::Result<Answer> {
        self.command_bytes(command.as_bytes())
    }

    fn command_bytes(&mut self, command: &[u8]) -> io::Result<Answer> {
        self.tags += 1;
        let tag = format!("t{} ", self.tags);
        self.stream.get_mut().write_all(&[tag.as_bytes(), command, b"\r\n"].concat())?;
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

    pub fn append(&mut self, mailbox: &str, mail: &[u8]) -> Answer {
        self.append_all(mailbox, &[Appended { flags: "", date: "", mail }])
    }

    /// APPEND, or MULTIAPPEND (RFC 3502) for more than one message. Mails with NULs go as literal8 (RFC 3516).
    pub fn append_all(&mut self, mailbox: &str, messages: &[Appended]) -> Answer {
        let answer = self.try_append_all(mailbox, messages);
        assert!(answer.is_ok(), "IMAP: APPEND {mailbox} was answered {}", answer.result);
        answer
    }

    /// Whatever is answered.
    pub fn try_append_all(&mut self, mailbox: &str, messages: &[Appended]) -> Answer {
        let answer = self.append_unless_lost(mailbox, messages);
        answer.unwrap_or_else(|error| panic!("IMAP: APPEND {mailbox}: {error}"))
    }

    /// Fails if the connection ends before the answer.
    pub fn append_unless_lost(&mut self, mailbox: &str, messages: &[Appended]) -> io::Result<Answer> {
        let mut command = format!("APPEND {mailbox}").into_bytes();
        for Appended { flags, date, mail } in messages {
            if !flags.is_empty() {
                command.extend_from_slice(format!(" ({flags})").as_bytes());
            }
            if !date.is_empty() {
                command.extend_from_slice(format!(" \"{date}\"").as_bytes());
            }
            let binary = if mail.contains(&0) { "~" } else { "" };
            // LITERAL+: the server does not have to ask for it.
            command.extend_from_slice(format!(" {binary}{{{}+}}\r\n", mail.len()).as_bytes());
            command.extend_from_slice(mail);
        }
        self.command_bytes(&command)
    }

    /// UIDs of all messages in the selected mailbox.
    pub fn uids(&mut self) -> Vec<u32> {
        let answer = self.ok("UID SEARCH ALL");
        let line = answer.lines().into_iter().find(|line| line.starts_with("SEARCH")).unwrap_or_default();
        line.split_whitespace().skip(1).filter_map(|uid| uid.parse().ok()).collect()
    }

    /// A line without its end, with the literals that it holds and what follows them.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            let start = line.len();
            self.stream.read_until(b'\n', &mut line)?;
            if !line[start..].ends_with(b"\r\n") {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "the connection was closed"));
            }
            let Some(size) = literal_size(&line[start..]) else { break };
            let start = line.len();
            line.resize(start + size, 0);
            self.stream.read_exact(&mut line[start..])?;
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }
}

pub fn login_command(user: &str) -> String {
    format!("LOGIN {user} {PASSWORD}")
}

/// The first literal in a line.
pub fn literal(line: &[u8]) -> Option<&[u8]> {
    let start = line.windows(3).position(|w| w == b"}\r\n")? + 3;
    let size = literal_size(&line[..start])?;
    line.get(start..start + size)
}

/// Size of the literal that a line announces at its end: `... {123}\r\n`.
fn literal_size(line: &[u8]) -> Option<usize> {
    let rest = line.strip_suffix(b"}\r\n")?;
    let open = rest.iter().rposition(|b| *b == b'{')?;
    std::str::from_utf8(&rest[open + 1..]).ok()?.parse().ok()
}
