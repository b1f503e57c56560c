//! The server's own doveadm process, by Dovecot's doveadm protocol: a command takes milliseconds there, and a process of its own reads
//! the whole configuration first.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than any lock of a mailbox is waited for.
const TIMEOUT: Duration = Duration::from_secs(180);

pub struct Doveadm {
    stream: BufReader<UnixStream>,
}

impl Doveadm {
    /// `socket`: of the service's `unix_listener doveadm-server`.
    pub fn connect(socket: &Path) -> io::Result<Doveadm> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut doveadm = Doveadm { stream: BufReader::new(stream) };
        // Of a minor version without a log in between.
        doveadm.stream.get_mut().write_all(b"VERSION\tdoveadm-server\t1\t0\n")?;
        match &doveadm.line()?[..] {
            b"+" => Ok(doveadm),
            other => Err(refused("its greeting", other)),
        }
    }

    /// What a command prints of a user: rows of `columns` values, without their names.
    pub fn run(&mut self, user: &str, args: &[&str], columns: usize) -> io::Result<Vec<Vec<Vec<u8>>>> {
        let escaped = args.iter().map(|arg| escape(arg)).collect::<Vec<_>>().join("\t");
        // No flags.
        self.stream.get_mut().write_all(format!("\t{}\t{escaped}\n", escape(user)).as_bytes())?;
        let printed = self.line()?;
        match &self.line()?[..] {
            b"+" => {}
            other => return Err(refused(&format!("{args:?}"), other)),
        }
        let mut values: Vec<Vec<u8>> = printed.split(|byte| *byte == b'\t').map(unescape).collect();
        // Each value ends with a tab.
        values.pop();
        if values.len() % columns != 0 {
            return Err(refused(&format!("{args:?}"), &printed));
        }
        Ok(values.chunks(columns).map(<[_]>::to_vec).collect())
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line)?;
        match line.pop() {
            Some(b'\n') => Ok(line),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn refused(what: &str, answer: &[u8]) -> io::Error {
    io::Error::other(format!("{what} was answered {:?}", String::from_utf8_lossy(answer)))
}

/// Dovecot's str_tabescape().
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\0' => out.push_str("\u{1}0"),
            '\u{1}' => out.push_str("\u{1}1"),
            '\t' => out.push_str("\u{1}t"),
            '\r' => out.push_str("\u{1}r"),
            '\n' => out.push_str("\u{1}n"),
            c => out.push(c),
        }
    }
    out
}

fn unescape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.iter().copied();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            1 => match bytes.next() {
                Some(b'0') => 0,
                Some(b'1') => 1,
                Some(b't') => b'\t',
                Some(b'r') => b'\r',
                Some(b'n') => b'\n',
                other => panic!("{other:?} is no escape of Dovecot's"),
            },
            byte => byte,
        });
    }
    out
}
