//! A mailbox's path, as servers name it to each other, and its virtual name here.
use super::storage::{Namespace, Result};
use crate::change::MESSAGE_GUID_BYTES_MAX;

/// Parts of a path at most; Dovecot's own limits are on the whole name.
const PARTS_MAX: usize = 64;
/// Bytes of a virtual name at most; Dovecot's MAILBOX_LIST_NAME_MAX_LENGTH.
const NAME_BYTES_MAX: usize = 4096;
/// Stands for our separator inside of a part; dsync's default is the same.
const SEPARATOR_REPLACEMENT: char = '_';

/// The virtual name of the mailbox with this path, e.g. `Archive/2024` for `["Archive", "2024"]`.
pub fn vname(path: &[String], namespace: &Namespace) -> Result<String> {
    if let [inbox] = path {
        if inbox == "INBOX" {
            return Ok("INBOX".into());
        }
    }
    if path.is_empty() || path.len() > PARTS_MAX {
        return Err(format!("malformed mailbox path: {} parts", path.len()));
    }
    let mut vname = namespace.prefix.clone();
    for (i, part) in path.iter().enumerate() {
        if part.is_empty() || part.chars().any(char::is_control) {
            return Err("malformed mailbox path: a part is empty or has control characters".into());
        }
        if i > 0 {
            vname.push(namespace.separator);
        }
        vname.extend(part.chars().map(|c| if c == namespace.separator { SEPARATOR_REPLACEMENT } else { c }));
    }
    if vname.len() > NAME_BYTES_MAX {
        return Err(format!("malformed mailbox path: {} bytes", vname.len()));
    }
    Ok(vname)
}

/// The path of the mailbox with this virtual name, the other way round. None: it is not below the namespace.
pub fn path(vname: &str, namespace: &Namespace) -> Option<Vec<String>> {
    if vname.eq_ignore_ascii_case("INBOX") {
        return Some(vec!["INBOX".into()]);
    }
    let name = vname.strip_prefix(namespace.prefix.as_str())?;
    Some(name.split(namespace.separator).map(str::to_owned).collect())
}

/// Checks a message's GUID: maildir makes it the name of a file.
pub fn check_message_guid(guid: &str) -> Result<()> {
    let bad = |c: char| c.is_control() || c == '/' || c == ':';
    if guid.is_empty() || guid.len() > MESSAGE_GUID_BYTES_MAX || guid.starts_with('.') || guid.contains(bad) {
        return Err("malformed change: a message's GUID cannot be one".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &[&str], prefix: &str, separator: char) -> Result<String> {
        let path: Vec<String> = path.iter().map(|p| p.to_string()).collect();
        vname(&path, &Namespace { prefix: prefix.into(), separator })
    }

    #[test]
    fn inbox_has_no_prefix_but_mailboxes_below_it_do() {
        assert_eq!(name(&["INBOX"], "INBOX.", '.').unwrap(), "INBOX");
        assert_eq!(name(&["INBOX", "a"], "INBOX.", '.').unwrap(), "INBOX.INBOX.a");
        assert_eq!(name(&["a", "b"], "INBOX.", '.').unwrap(), "INBOX.a.b");
        assert_eq!(name(&["a", "b"], "", '/').unwrap(), "a/b");
    }

    #[test]
    fn a_virtual_name_has_its_path() {
        let path = |vname: &str, prefix: &str, separator| {
            path(vname, &Namespace { prefix: prefix.into(), separator }).map(|path| path.join(" "))
        };
        assert_eq!(path("a/b c", "", '/').unwrap(), "a b c");
        assert_eq!(path("INBOX.a.b", "INBOX.", '.').unwrap(), "a b");
        assert_eq!(path("inbox", "INBOX.", '.').unwrap(), "INBOX");
        assert_eq!(path("other.a", "INBOX.", '.'), None);
    }

    #[test]
    fn a_part_cannot_become_two() {
        assert_eq!(name(&["a.b", "c/d"], "", '.').unwrap(), "a_b.c/d");
    }

    #[test]
    fn a_message_guid_cannot_leave_its_folder() {
        assert!(check_message_guid("1795477334.M123P456.mx1,S=12").is_ok());
        assert!(check_message_guid("d30cca35decd046bb179000083ecc375").is_ok());
        for bad in ["", "../../etc/passwd", ".", "a:2,S", "a\nb", &"x".repeat(256)] {
            assert!(check_message_guid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_paths_are_refused() {
        assert!(name(&[], "", '/').is_err());
        assert!(name(&["a", ""], "", '/').is_err());
        assert!(name(&["a\0b"], "", '/').is_err());
        assert!(name(&["a\r\n"], "", '/').is_err());
        assert!(name(&[&"x".repeat(5000)], "", '/').is_err());
        assert!(name(&["a"; 65], "", '/').is_err());
    }
}
