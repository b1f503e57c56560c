#!/bin/bash
# The test matrix: everything against the Dovecot of each other Debian release, built and run there, then this machine's
# Dovecot and that one as a pair. As root; `make test-matrix` calls it after `make stage`.
#
# Each release lives in target/roots/NAME (debootstrap, cached) with its own target/NAME. All mounts are in a private
# mount namespace: nothing stays mounted, whatever happens here.
#
# Its exit status is 1 if something failed, and 77 if nothing did but some release could not be tested.
set -eu
cd "$(dirname "$0")/.."
top=$PWD

if [ -z "${DOVETAIL_MATRIX_NAMESPACE-}" ]; then
    if [ "$(id -u)" != 0 ]; then echo "the test matrix needs root: it mounts and chroots" >&2; exit 1; fi
    DOVETAIL_MATRIX_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

# bookworm: Dovecot 2.3.19. trixie: Dovecot 2.4.1.
releases=(bookworm trixie)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org}
rustc_minimum=1.85
# Raise it when make_root changes.
recipe=1
# What a pair of different versions runs: one pair of formats each way, and all that needs a pair of its own.
mixed_tests=(sdbox_to_sdbox mdbox_to_maildir maildir_to_mdbox effects:: status:: trouble:: compare:: restores:: servers:: tls:: acks:: gates:: local::)

here=${DOVETAIL_MATRIX_HERE:-$(. /etc/os-release && echo "${VERSION_CODENAME-}")}
summary=()
failed=0
skipped=0

say() { printf '\n==== %s  %s\n' "$(date +%T)" "$*"; }

# make_root RELEASE: a minimal Debian with Dovecot and what building needs.
make_root() {
    local root=$top/target/roots/$1 stamp=$top/target/roots/$1.recipe
    if [ "$(cat "$stamp" 2>/dev/null)" = $recipe ]; then return; fi
    say "$1: making its root in target/roots/$1"
    "$top/tests/deps.sh" debootstrap
    rm -rf "$root" "$stamp"
    mkdir -p "$root"
    debootstrap --variant=minbase "$1" "$root" "$mirror/debian"
    printf 'deb %s/debian %s main\ndeb %s/debian-security %s-security main\n' "$mirror" "$1" "$mirror" "$1" \
        >"$root/etc/apt/sources.list"
    # No service starts in there.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    local packages=(
        dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-sieve dovecot-managesieved dovecot-dev
        gcc libc6-dev make util-linux procps
    )
    # The release's own Rust if it is new enough; else this machine's is used.
    case $1 in bookworm) ;; *) packages+=(cargo) ;; esac
    in_root "$1" "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ${packages[*]} && apt-get clean"
    echo $recipe >"$stamp"
}

# in_root RELEASE COMMAND: in its root, with the source at /dovetail and the machine's crates.
in_root() {
    local root=$top/target/roots/$1 cargo_home=${CARGO_HOME:-$HOME/.cargo} path=/usr/sbin:/usr/bin:/sbin:/bin
    local toolchain
    toolchain=$(rustc --print sysroot)
    (
        # The root must be a mount point: the tests make private mount namespaces in it.
        mkdir -p "$root/dovetail" "$root/cargo-home" "$root/rust-toolchain" "$cargo_home"
        DOVETAIL_ROOT=$root DOVETAIL_CARGO_HOME=$cargo_home DOVETAIL_TOOLCHAIN=$toolchain DOVETAIL_TOP=$top \
            DOVETAIL_COMMAND=$2 DOVETAIL_PATH=$path DOVETAIL_RELEASE=$1 DOVETAIL_MINIMUM=$rustc_minimum \
            exec unshare --mount --propagation private bash -euc '
            mount_root
            if [ ! -x "$DOVETAIL_ROOT/usr/bin/cargo" ] && [ -x "$DOVETAIL_TOOLCHAIN/bin/cargo" ]; then
                DOVETAIL_PATH=/rust-toolchain/bin:$DOVETAIL_PATH
            fi
            exec chroot "$DOVETAIL_ROOT" /usr/bin/env -i HOME=/root LANG=C.UTF-8 TERM=dumb PATH="$DOVETAIL_PATH" \
                CARGO_HOME=/cargo-home CARGO_TARGET_DIR=/dovetail/target/$DOVETAIL_RELEASE \
                /bin/sh -euc "cd /dovetail && $DOVETAIL_COMMAND" </dev/null
        '
    )
}

# mount_root: what programs in DOVETAIL_ROOT need, in the current mount namespace.
mount_root() {
    mount --bind "$DOVETAIL_ROOT" "$DOVETAIL_ROOT"
    mount -t proc proc "$DOVETAIL_ROOT/proc"
    mount --rbind /dev "$DOVETAIL_ROOT/dev"
    mount --bind "$DOVETAIL_TOP" "$DOVETAIL_ROOT/dovetail"
    mount --bind "$DOVETAIL_CARGO_HOME" "$DOVETAIL_ROOT/cargo-home"
    # Debian's own toolchain (/usr) works only in its own release.
    if [ "$DOVETAIL_TOOLCHAIN" != /usr ]; then
        mount --bind "$DOVETAIL_TOOLCHAIN" "$DOVETAIL_ROOT/rust-toolchain"
    fi
}
export -f mount_root

# run WHAT COMMAND...: runs one cell of the matrix and notes its result.
run() {
    local what=$1 start=$SECONDS result=ok
    shift
    say "$what"
    "$@" || { result=FAILED; failed=1; }
    summary+=("$(printf '%-60s %-8s %4d s' "$what" $result $((SECONDS - start)))")
    [ $result = ok ]
}

# The tests that know Dovecot, or its headers, and those of what comes from outside; the others were run on this machine.
test_alone() {
    in_root "$1" "make test CARGO_FLAGS=--offline TESTS='--lib --test house --test indexlog --test relay --test fuzz --test e2e'"
}

# test_pair RELEASE [ARGUMENTS]: as a pair; other arguments of cargo test than the matrix's.
test_pair() {
    local release=$1 arguments=(--test e2e -- "${mixed_tests[@]}")
    shift
    if [ $# -gt 0 ]; then arguments=("$@"); fi
    (
        export DOVETAIL_ROOT=$top/target/roots/$release DOVETAIL_TOP=$top DOVETAIL_CARGO_HOME=${CARGO_HOME:-$HOME/.cargo} DOVETAIL_TOOLCHAIN=/usr
        mount_root
        DOVETAIL_TEST_STAGE_A=$top/target/stage DOVETAIL_TEST_ROOT_B=$DOVETAIL_ROOT DOVETAIL_TEST_STAGE_B=$top/target/$release/stage \
            RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((6 * $(nproc)))} cargo test ${CARGO_FLAGS-} --locked --no-default-features "${arguments[@]}"
    )
}

# matrix.sh --in RELEASE COMMAND: only that, for people who look into a failure.
if [ "${1-}" = --in ]; then
    make_root "$2"
    in_root "$2" "$3"
    exit
fi

# matrix.sh --pair RELEASE [ARGUMENTS]: only this machine's Dovecot with that one's, as they were built last; the arguments
# are cargo test's, such as `--test chaos`.
if [ "${1-}" = --pair ]; then
    shift
    test_pair "$@"
    exit
fi
if [ $# -gt 0 ]; then echo "usage: tests/matrix.sh [--in RELEASE COMMAND | --pair RELEASE [ARGUMENTS]]" >&2; exit 2; fi

# Crates for the roots, which may not trust the registry's certificates.
cargo fetch --locked

for release in "${releases[@]}"; do
    if [ "$release" = "$here" ]; then continue; fi
    if [ "$release" = bookworm ] && [ "$(rustc --print sysroot)" = /usr ]; then
        say "$release: SKIPPED: its own Rust is older than $rustc_minimum, and this machine's runs only here; install one by rustup"
        summary+=("$release: SKIPPED, needs a Rust from rustup")
        skipped=$((skipped + 1))
        continue
    fi
    make_root "$release"
    version=$(in_root "$release" "dovecot --version" | cut -d ' ' -f 1)
    if run "$release, Dovecot $version" test_alone "$release"; then
        run "$here, Dovecot $(dovecot --version | cut -d ' ' -f 1), with $release, Dovecot $version" test_pair "$release" || true
    fi
done

say "matrix"
printf '  %s\n' "${summary[@]}"
if [ $failed = 0 ] && [ $skipped != 0 ]; then
    echo "The test matrix is NOT COMPLETE: $skipped of its releases could not be tested here." >&2
    exit 77
fi
exit $failed
