//! Copies of what is below a server's folder, taken and put back while its Dovecot is stopped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Format, Server};

pub fn copy(from: &Path, to: &Path) {
    let output = Command::new("cp").arg("-a").arg(from).arg(to).output().expect("cp");
    assert!(output.status.success(), "cp: {}", String::from_utf8_lossy(&output.stderr));
}

/// A copy of what is below the server's folder there, to be put back.
pub struct Backup {
    of: PathBuf,
    pub kept: PathBuf,
}

impl Backup {
    pub fn of(server: &Server, below: &str) -> Backup {
        let of = server.outside(below);
        let kept = server.outside(&format!("/backup{}", below.replace('/', "-")));
        let _ = fs::remove_dir_all(&kept);
        copy(&of, &kept);
        Backup { of, kept }
    }

    pub fn of_mailbox(server: &Server, user: &str, mailbox: &str) -> Backup {
        Backup::of(server, &folder(server, user, mailbox))
    }

    /// The folder itself stays: it may be a disk.
    pub fn restore(&self) {
        let is_gone = |entry: fs::DirEntry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(entry.path()),
            _ => fs::remove_file(entry.path()),
        };
        fs::read_dir(&self.of).expect("what is there").flatten().try_for_each(is_gone).expect("it is removed");
        copy(&self.kept.join("."), &self.of);
    }

    /// Only the files of the index: the disk has lost their ends.
    pub fn restore_index(&self) {
        for entry in fs::read_dir(&self.kept).expect("the copy").flatten() {
            if entry.file_name().to_string_lossy().starts_with("dovecot.index") {
                fs::copy(entry.path(), self.of.join(entry.file_name())).expect("a file of the index");
            }
        }
    }
}

/// Where a mailbox lies that is not INBOX, below the server's folder.
pub fn folder(server: &Server, user: &str, mailbox: &str) -> String {
    match server.format() {
        Format::Sdbox => format!("/home/{user}/sdbox/mailboxes/{mailbox}"),
        Format::Mdbox => format!("/home/{user}/mdbox/mailboxes/{mailbox}"),
        Format::Maildir => format!("/home/{user}/Maildir/.{mailbox}"),
    }
}
