# ./dev setup: what the other commands need, installed only where it is missing.
# shellcheck shell=bash

SETUP_PACKAGES=(
    musl-tools nftables iproute2 qemu-system-x86 qemu-utils busybox-static cpio kmod mmdebstrap
    debian-archive-keyring dosfstools mtools e2fsprogs fdisk iperf3 fio zstd xz-utils lz4
    docker-registry openssh-client openssl ca-certificates curl gcc libc6-dev make git procps util-linux
)
MUSL=x86_64-unknown-linux-musl

setup() {
    [[ $(uname -m) == x86_64 ]] || die "this machine is $(uname -m); the tests need x86_64"
    command -v apt-get >/dev/null || die "no apt-get; hint: use Debian or Ubuntu, or install by hand: ${SETUP_PACKAGES[*]}"
    setup_packages
    setup_rust
}

setup_packages() {
    local missing=() apt
    mapfile -t missing < <(comm -23 <(printf '%s\n' "${SETUP_PACKAGES[@]}" | sort) \
        <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${SETUP_PACKAGES[@]}" 2>/dev/null \
            | sed -n 's/^installed //p' | sort -u))
    ((${#missing[@]})) || return 0
    say "installing: ${missing[*]}"
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    apt_install() { as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2; }
    apt_install 2>/dev/null && return
    say "updating the package lists"
    as_root "${apt[@]}" update >&2 || die "apt-get update failed; hint: check the network and /etc/apt/sources.list"
    apt_install || die "could not install: ${missing[*]}; hint: apt-get install ${missing[*]}"
}

setup_rust() {
    PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || die "no Rust; hint: curl --proto '=https' -sSf https://sh.rustup.rs | sh"
    [[ -d $(rustc --print sysroot)/lib/rustlib/$MUSL ]] && return
    command -v rustup >/dev/null || die "Rust has no target $MUSL; hint: install Rust with rustup"
    say "installing the Rust target $MUSL"
    rustup target add "$MUSL"
}

# Only the conformance tests need Go.
need_go() {
    PATH=$PATH:/usr/local/go/bin
    command -v go >/dev/null || die "no Go, which the conformance tests need; hint: https://go.dev/doc/install, or --without fleeting"
}
