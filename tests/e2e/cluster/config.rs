//! Dovecot's configuration for one server under test, in 2.3's and 2.4's syntax.
//!
//! Only the basics that any server has (where mail lies, who may log in, ports) come from here. The replication's own part
//! is the example configuration that an admin is given, unchanged, followed by this server's name, port and peers.

use std::fmt::Write;

use super::checker::Checker;
use super::{Format, Setup, Version};

pub struct Ports {
    pub imap: u16,
    pub pop3: u16,
    pub lmtp: u16,
    pub relay: u16,
}

/// Everything that the configuration depends on; paths as the server sees them.
pub struct Server<'a> {
    pub setup: &'a Setup,
    pub version: Version,
    pub dir: &'a str,
    pub ports: &'a Ports,
    /// (name, address of the relay) of the peers.
    pub peers: &'a [(String, String)],
    /// Its relay is reached over a network, with the certificates that are in its folder unless its setup says otherwise.
    pub is_apart: bool,
}

/// The file of the users who are not like all others.
pub const USERS: &str = "users";

/// The folder of the certificate that a server has from the start.
pub const TLS: &str = "tls";

/// One of them, with further fields of the userdb.
pub fn user_line(dir: &str, user: &str, fields: &str) -> String {
    format!("{user}:x:8:8::{dir}/home/{user}::{fields}\n")
}

/// Name under which the example configuration lies beside the generated one.
pub const EXAMPLE: &str = "dovecot-plugin.conf.example";

impl Server<'_> {
    pub fn text(&self) -> String {
        let mut text = match self.version {
            Version::V23 => self.basics_23(),
            Version::V24 => self.basics_24(),
        };
        if self.setup.plugin {
            let _ = writeln!(text, "!include {}/{EXAMPLE}", self.dir);
            text += &self.replication();
        }
        if let Some(checker) = Checker::get().filter(|_| self.setup.plugin) {
            text += &checker.settings(self.version, self.dir);
        }
        text += match self.version {
            Version::V23 => &self.setup.extra_23,
            Version::V24 => &self.setup.extra_24,
        };
        text
    }

    /// What an admin changes in the example.
    fn replication(&self) -> String {
        let peers: Vec<String> = self.peers.iter().map(|(name, address)| format!("{name}={address}")).collect();
        let peers = self.setup.peers.clone().unwrap_or(peers.join(" "));
        let mut settings = format!("dovetail_server = {}\ndovetail_peers = {}\n", self.setup.name, peers);
        if self.is_apart && !self.setup.insecure {
            let (folder, name) = (format!("{}/{TLS}", self.dir), &self.setup.name);
            settings += &format!("dovetail_ca = {folder}/ca.pem\n");
            settings += &format!("dovetail_cert = {folder}/{name}.pem\ndovetail_key = {folder}/{name}.key\n");
        } else {
            settings += "dovetail_ca =\ndovetail_cert =\ndovetail_key =\n";
        }
        if self.is_apart && self.setup.insecure {
            settings += "dovetail_insecure_plaintext = yes\n";
        }
        let address = if self.is_apart { "0.0.0.0" } else { "127.0.0.1" };
        let port = self.ports.relay;
        match self.version {
            Version::V23 => format!(
                "plugin {{\n{settings}}}\n\
                 service dovetail {{\n  inet_listener dovetail {{\n    address = {address}\n    port = {port}\n  }}\n}}\n"
            ),
            Version::V24 => format!(
                "{settings}\
                 service dovetail {{\n  inet_listener dovetail {{\n    listen = {address}\n    port = {port}\n  }}\n}}\n"
            ),
        }
    }

    fn basics_23(&self) -> String {
        let dir = self.dir;
        let Ports { imap, pop3, lmtp, .. } = self.ports;
        let Setup { name, separator, prefix, .. } = self.setup;
        let location = match self.setup.format {
            Format::Sdbox => "sdbox:~/sdbox",
            Format::Mdbox => "mdbox:~/mdbox",
            Format::Maildir => "maildir:~/Maildir",
        };
        // A userdb that can list its users, which "static" cannot.
        let mut users = format!("userdb {{\n  driver = passwd-file\n  args = username_format=%u {dir}/{USERS}\n}}\n");
        if !self.setup.has_no_other_users {
            let args = format!("uid=mail gid=mail home={dir}/home/%u allow_all_users=yes");
            users += &format!("userdb {{\n  driver = static\n  args = {args}\n}}\n");
        }
        format!(
            "\
base_dir = {dir}/run
state_dir = {dir}/state
instance_name = {name}
log_path = {dir}/log
protocols = imap pop3 lmtp
listen = 127.0.0.1
hostname = {name}.test
ssl = no
disable_plaintext_auth = no
first_valid_uid = 1
mail_location = {location}
mail_max_userip_connections = 100
namespace inbox {{
  inbox = yes
  separator = {separator}
  prefix = {prefix}
}}
passdb {{
  driver = static
  args = password=pass
}}
{users}service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {lmtp}
  }}
}}
service doveadm {{
  service_count = 0
}}
"
        )
    }

    fn basics_24(&self) -> String {
        let dir = self.dir;
        let Ports { imap, pop3, lmtp, .. } = self.ports;
        let Setup { name, separator, prefix, .. } = self.setup;
        let (driver, path) = match self.setup.format {
            Format::Sdbox => ("sdbox", "sdbox"),
            Format::Mdbox => ("mdbox", "mdbox"),
            Format::Maildir => ("maildir", "Maildir"),
        };
        let mut users = format!("userdb passwd-file {{\n  passwd_file_path = {dir}/{USERS}\n}}\n");
        if !self.setup.has_no_other_users {
            let fields = format!("    uid = mail\n    gid = mail\n    home = {dir}/home/%{{user}}\n");
            users += &format!("userdb static {{\n  fields {{\n{fields}  }}\n}}\n");
        }
        format!(
            "\
dovecot_config_version = 2.4.1
dovecot_storage_version = 2.4.1
base_dir = {dir}/run
state_dir = {dir}/state
instance_name = {name}
log_path = {dir}/log
protocols = imap pop3 lmtp
listen = 127.0.0.1
hostname = {name}.test
ssl = no
auth_allow_cleartext = yes
first_valid_uid = 1
mail_driver = {driver}
mail_path = ~/{path}
mail_uid = mail
mail_gid = mail
mail_max_userip_connections = 100
namespace inbox {{
  inbox = yes
  separator = {separator}
  prefix = {prefix}
}}
passdb static {{
  password = pass
}}
{users}service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {lmtp}
  }}
}}
service doveadm {{
  restart_request_count = unlimited
}}
"
        )
    }
}
