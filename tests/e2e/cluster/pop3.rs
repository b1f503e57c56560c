//! A small POP3 client (RFC 1939).

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::PASSWORD;

pub struct Pop3 {
    stream: BufReader<TcpStream>,
}

impl Pop3 {
    pub fn login(stream: TcpStream, user: &str) -> Pop3 {
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
        let mut pop3 = Pop3 { stream: BufReader::new(stream) };
        pop3.line();
        pop3.command(&format!("USER {user}"));
        pop3.command(&format!("PASS {PASSWORD}"));
        pop3
    }

    /// The first line of the answer; panics unless it is +OK.
    pub fn command(&mut self, command: &str) -> String {
        self.stream.get_mut().write_all(format!("{command}\r\n").as_bytes()).expect("POP3 write");
        let line = self.line();
        assert!(line.starts_with("+OK"), "POP3: {command} was answered by {line}");
        line
    }

    /// A command whose answer has more lines, up to the dot.
    pub fn command_lines(&mut self, command: &str) -> Vec<String> {
        self.command(command);
        let mut lines = Vec::new();
        loop {
            let line = self.line();
            if line == "." {
                return lines;
            }
            lines.push(line);
        }
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let n = self.stream.read_until(b'\n', &mut line).expect("POP3 read");
        assert!(n > 0, "POP3 closed the connection");
        String::from_utf8_lossy(&line).trim_end().to_owned()
    }
}
