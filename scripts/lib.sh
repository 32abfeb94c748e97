# shellcheck shell=bash
# What the install scripts share; sourced, not run.
#
# Every script here says what it does, does nothing where all is there already, never asks for
# input, and works as root and as an ordinary user.

# shellcheck disable=SC2034 # read by those who source this
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# One installation at a time: `make -j`, or two checkouts, must not install into each other.
# Waits for the other, at most ten minutes.
one_at_a_time() {
    mkdir -p "$1" || die "cannot create $1"
    exec 9>"$1/lock"
    flock -w 600 9 || die "another installation still holds $1/lock; try again when it is through"
}

# Prefix for a command that needs root: nothing as root, `sudo -n` where that is allowed without
# a password. Fails otherwise.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@" </dev/null
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@" </dev/null
    else
        return 77
    fi
}

can_be_root() { as_root true; }

# apt_install WHAT-FOR PACKAGE...
apt_install() {
    local what_for=$1
    shift
    have apt-get || die "$what_for: install these with your system's package manager: $*"
    can_be_root || die "$what_for needs Debian packages, and this user may not install them. Run, then try again:
    sudo apt-get install -y --no-install-recommends $*"
    say "$what_for: installing $* through apt-get"
    local log
    log=$(mktemp)
    # The package lists may be missing (a fresh container) or old: refresh them only if need be.
    local attempt
    for attempt in as-it-is refreshed; do
        [ "$attempt" = as-it-is ] || as_root apt-get -o DPkg::Lock::Timeout=300 -q update >>"$log" 2>&1 || true
        if as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -q install -y \
            --no-install-recommends "$@" >>"$log" 2>&1; then
            rm -f "$log"
            return 0
        fi
    done
    tail -n 30 "$log" >&2
    rm -f "$log"
    die "$what_for: apt-get could not install $*"
}

# The first Python that is at least 3.10 and can make virtual environments; installs Debian's
# where there is none.
find_python() {
    local candidate attempt
    for attempt in as-it-is installed; do
        for candidate in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
            if have "$candidate" && "$candidate" -c '
import sys, venv, ensurepip
raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null; then
                printf '%s\n' "$candidate"
                return 0
            fi
        done
        [ "$attempt" = installed ] || apt_install "Python with virtual environments" python3 python3-venv
    done
    die "a Python of at least 3.10 is needed (found: $(python3 --version 2>&1 || true))"
}

# Whether the servers' unprivileged user can enter a folder: everyone may enter every folder
# above it.
enterable_by_others() {
    local dir=$1
    while :; do
        if [ -e "$dir" ]; then
            [ $((0$(stat -c %a "$dir") & 1)) = 1 ] || return 1
        fi
        [ "$dir" = / ] && return 0
        dir=$(dirname "$dir")
    done
}

# install_without_service WHY PACKAGE: a package whose service is neither started nor left enabled.
install_without_service() {
    # Debian's way to keep a package's service from starting.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        as_root sh -c "printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy" || true
        trap 'as_root rm -f '"$policy"' || true' EXIT
    fi
    apt_install "$1" "$2"
    if have systemctl; then
        as_root systemctl disable "$2" >/dev/null 2>&1 || true
    fi
}
