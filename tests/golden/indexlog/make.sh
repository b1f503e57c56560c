#!/bin/sh
# Makes the golden logs anew: make.sh VERSION [ROOT]
#
# VERSION is 2.3 or 2.4, ROOT the root of a system that has it (default: this one). Needs root, runs doveadm as the user
# mail, without any daemon, and works below ROOT/tmp. README.md tells what each log holds.
set -eu

version=$1
# 2.4 asks the authentication server, which does not run here, unless told not to.
case $version in 2.4) direct=--no-userdb-lookup ;; *) direct= ;; esac
root=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d "$root/tmp/indexlog.XXXXXX")
inside=${work#"$root"}
trap 'rm -rf "$work"' EXIT

config() { # storage
    case $1 in sdbox) path=sdbox ;; mdbox) path=mdbox ;; maildir) path=Maildir ;; esac
    case $version in
    2.3) cat <<END
mail_location = $1:~/$path
END
        ;;
    2.4) cat <<END
dovecot_config_version = 2.4.1
dovecot_storage_version = 2.4.1
mail_home = $inside/home
mail_driver = $1
mail_path = ~/$path
END
        ;;
    esac
    cat <<END
base_dir = $inside/run
state_dir = $inside/state
log_path = $inside/log
ssl = no
first_valid_uid = 1
namespace inbox {
  inbox = yes
  separator = /
}
END
}

doveadm() {
    set -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin USER=jane HOME="$inside/home" doveadm -c "$inside/conf" "$@"
    set -- setpriv --reuid=mail --regid=mail --clear-groups "$@"
    if [ -n "$root" ]; then
        chroot "$root" "$@"
    else
        "$@"
    fi
}

mail() { # number
    printf 'From: a@example.com\r\nSubject: mail %s\r\nMessage-ID: <%s@example.com>\r\n\r\nbody %s\r\n' "$1" "$1" "$1"
}

logs() { # storage mailbox: the folder of its index
    case $1 in
    sdbox) echo "$work/home/sdbox/mailboxes/$2/dbox-Mails" ;;
    mdbox) echo "$work/home/mdbox/mailboxes/$2/dbox-Mails" ;;
    maildir) if [ "$2" = INBOX ]; then echo "$work/home/Maildir"; else echo "$work/home/Maildir/.$2"; fi ;;
    esac
}

story() { # storage
    rm -rf "$work/home" "$work/log"
    mkdir -p "$work/home" "$work/run" "$work/state"
    config "$1" >"$work/conf"
    touch "$work/log"
    chmod 755 "$work" && chmod 644 "$work/conf"
    chown -R mail:mail "$work/home" "$work/log"

    for i in 1 2 3 4; do mail $i | doveadm save $direct -m INBOX; done
    doveadm mailbox create $direct Archive
    doveadm flags add $direct '\Seen \Flagged' mailbox INBOX uid 1:2
    doveadm flags remove $direct '\Flagged' mailbox INBOX uid 2
    doveadm flags replace $direct '\Answered' mailbox INBOX uid 3
    doveadm flags add $direct 'Work' mailbox INBOX uid 1:3
    doveadm flags remove $direct 'Work' mailbox INBOX uid 2
    doveadm copy $direct Archive mailbox INBOX uid 1
    doveadm move $direct Archive mailbox INBOX uid 2
    doveadm expunge $direct mailbox INBOX uid 4
    if [ "$1" = maildir ]; then
        # A delivery that goes round Dovecot, and a client's flag change and expunge that do.
        mail 5 >"$work/home/Maildir/new/1700000000.M1P1.dropped"
        chown mail:mail "$work/home/Maildir/new/1700000000.M1P1.dropped"
        doveadm fetch $direct uid mailbox INBOX all >/dev/null
        mv "$work"/home/Maildir/*/1700000000.M1P1.dropped* "$work/home/Maildir/cur/1700000000.M1P1.dropped:2,FS"
        doveadm fetch $direct uid mailbox INBOX all >/dev/null
        rm "$work"/home/Maildir/cur/1700000000.M1P1.dropped*
        doveadm fetch $direct uid mailbox INBOX all >/dev/null
    fi
    doveadm -f tab fetch $direct 'uid guid' mailbox INBOX all >"$here/$version-$1.guids"
    doveadm -f tab mailbox status $direct uidvalidity INBOX | tail -n 1 | cut -f 2 |
        sed 's/^/uidvalidity\t/' >>"$here/$version-$1.guids"
    cp "$(logs "$1" INBOX)/dovecot.index.log" "$here/$version-$1.log"
    cp "$(logs "$1" Archive)/dovecot.index.log" "$here/$version-$1-archive.log"

    # The log is rotated by the sync of a mailbox whose log has grown long enough.
    doveadm -o mail_index_log_rotate_min_size=100 -o mail_index_log_rotate_max_size=200 \
        flags add $direct '\Draft' mailbox INBOX uid 1
    doveadm flags remove $direct '\Draft' mailbox INBOX uid 1
    doveadm expunge $direct mailbox INBOX uid 3
    cp "$(logs "$1" INBOX)/dovecot.index.log" "$here/$version-$1-rotated.log"

    # Another copy of the mailbox, made and then changed by dsync.
    case $1 in maildir) copy=$work/home/copy ;; *) copy=$work/home/copy/mailboxes/INBOX/dbox-Mails ;; esac
    mail 6 | doveadm save $direct -m INBOX
    doveadm sync $direct -1 "$1:$inside/home/copy"
    doveadm flags replace $direct '\Deleted' mailbox INBOX uid 1
    doveadm flags remove $direct 'Work' mailbox INBOX uid 1
    doveadm expunge $direct mailbox INBOX subject 'mail 6'
    doveadm sync $direct -1 "$1:$inside/home/copy"
    cp "$copy/dovecot.index.log" "$here/$version-$1-synced.log"

    # Both kinds of dbox make the index anew; maildir goes on.
    if [ "$1" != maildir ]; then
        doveadm force-resync $direct INBOX
        cp "$(logs "$1" INBOX)/dovecot.index.log" "$here/$version-$1-rebuilt.log"
    fi
    cat "$work/log" >&2
    for log in "$here/$version-$1"*.log; do records "$(basename "$log" .log)"; done >"$work/records.$1"
}

records() { # log: where Dovecot itself sees which records
    chmod 644 "$here/$1.log"
    cp "$here/$1.log" "$work/dump.log"
    doveadm dump -t log "$inside/dump.log" |
        sed -n "s/^record: offset=\([0-9]*\), type=\([^,]*\),.*/$1 \1 \2/p"
}

for storage in sdbox mdbox maildir; do story $storage; done
cat "$work"/records.* >"$here/$version.records"
