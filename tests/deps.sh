#!/bin/bash
# Installs by apt what building and testing Dovetail need, if something is missing; and the packages that are named, which
# only some targets need. Debian 12 and 13, as root.
set -eu

packages=(
    dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-sieve dovecot-managesieved dovecot-dev
    gcc libc6-dev
    # unshare, nsenter; kill and ps; networks of their own
    util-linux procps iproute2
    "$@"
)

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
if ! command -v cargo >/dev/null; then
    missing+=(cargo)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "missing: ${missing[*]}. As root: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The tests start Dovecots of their own; the package's should not take the ports.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
install() { apt-get install -y -q --no-install-recommends "${missing[@]}" </dev/null; }
# A machine that has never fetched the lists, or whose lists are too old, needs them first.
if ! install; then
    apt-get update -q
    install
fi
