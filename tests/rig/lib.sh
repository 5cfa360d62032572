# shellcheck disable=SC2034
# Shared by ./dev and the scripts beside this file: messages, build stamps, Debian packages.
# Sourced with the checkout as the working directory.
# shellcheck shell=bash

# Everything built for tests lies here; each piece is rebuilt when its own scripts change.
RIG=${ROOT:=$PWD}/target/rig
# Debian releases of the test kernels and images.
SUITE=bookworm
SUITE_NEW=trixie

say() { printf '%s\n' "dev: $*" >&2; }
die() { printf '%s\n' "dev: error: $*" >&2; exit 1; }

# sbin is not on everybody's PATH, and mkfs and modprobe are there.
PATH=$PATH:/usr/sbin:/sbin
# The words that make a command run as root.
if ((EUID == 0)); then AS_ROOT=(env); else AS_ROOT=(sudo -E); fi
as_root() {
    command -v "${AS_ROOT[0]}" >/dev/null || die "must be root for: $*; hint: run as root or install sudo"
    "${AS_ROOT[@]}" "$@"
}

# build NAME FUNCTION INPUT...: calls FUNCTION with target/rig/NAME unless that was built before
# by the same FUNCTION text from the same INPUTs (files of the checkout). One builder of a piece at a time.
build() {
    local name=$1 make=$2 want lock start=$SECONDS; shift 2
    local made=$RIG/$name stamp=$RIG/.stamps/${name//\//-}
    mkdir -p "$RIG/.stamps" "$(dirname "$made")"
    want=$({ declare -f "$make"; cat /dev/null "$@"; } | sha256sum)
    [[ -e $made && -e $stamp && $(<"$stamp") == "$want" ]] && return
    exec {lock}>"$stamp.lock"
    flock "$lock"
    if ! [[ -e $made && -e $stamp && $(<"$stamp") == "$want" ]]; then
        say "building target/rig/$name"
        rm -rf "$stamp" "$made"
        "$make" "$made"
        printf '%s\n' "$want" >"$stamp"
        say "built target/rig/$name in $((SECONDS - start)) s"
    fi
    exec {lock}>&-
}

# debian_mirror [-security]: the mirror of Debian or of its security updates that this machine
# uses, else the public one.
debian_mirror() {
    local mirror
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' \
        | sed -n 's|^Debian \(.*[^/]\)/*$|\1|p' | grep -- "/debian${1:-}\$" | head -n 1) || true
    printf '%s\n' "${mirror:-http://deb.debian.org/debian${1:-}}"
}

# debian_source SUITE [-security]: a line for apt's sources.list.
debian_source() {
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$(debian_mirror "${2:-}")" "$1${2:-}"
}

# fetch_debs SUITE DIR PACKAGE...: downloads and unpacks packages of a Debian release into DIR,
# whatever release this machine runs. A package that only depends on others brings those.
fetch_debs() {
    local suite=$1 dir=$2 apt=$2.apt package names=(); shift 2
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,etc,debs} "$dir"
    debian_source "$suite" >"$apt/etc/sources.list"
    local options=(
        -o "Dir::Etc::SourceList=$apt/etc/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o "Dir::State=$apt/state" -o "Dir::Cache=$apt/cache" -o APT::Architecture=amd64
        -o Dir::State::Status=/dev/null -o APT::Sandbox::User=root -qq
    )
    apt-get "${options[@]}" update
    for package; do
        case $package in
            linux-image-*) # a meta package: its dependency is the kernel
                package=$(apt-cache "${options[@]}" depends "$package" | sed -n 's/^ *Depends: //p') ;;
        esac
        names+=("$package")
    done
    rm -f "$apt/debs"/*
    (cd "$apt/debs" && apt-get "${options[@]}" download "${names[@]}")
    for package in "$apt/debs"/*.deb; do dpkg -x "$package" "$dir"; done
    rm -rf "$apt"
}

# fetch_kernel SUITE DIR PACKAGE: a kernel package, unpacked and its modules indexed.
fetch_kernel() {
    fetch_debs "$@"
    [[ -e $2/lib ]] || ln -s usr/lib "$2/lib"
    depmod -b "$2" "$(kernel_release "$2")"
}

# The release of the only kernel unpacked in DIR.
kernel_release() { basename "$1"/lib/modules/*; }

# copy_modules TREE DIR MODULE...: puts MODULEs and what they depend on into DIR/modules,
# uncompressed, and their names in loading order into DIR/modules/order. A module that the
# kernel has built in is left out.
copy_modules() {
    local tree=$1 dir=$2/modules release line file; shift 2
    release=$(kernel_release "$tree")
    mkdir -p "$dir"
    modprobe -d "$tree" -S "$release" --show-depends -a "$@" \
        | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' \
        | while read -r line; do
            file=$(basename "$line")
            case $line in
                *.xz) xz -dc "$line" >"$dir/${file%.xz}" ;;
                *.zst) zstd -qdc "$line" >"$dir/${file%.zst}" ;;
                *) cp "$line" "$dir/$file" ;;
            esac
            file=${file%.xz}
            printf '%s\n' "${file%.zst}"
        done >"$dir/order"
}

# copy_programs DIR PROGRAM...: copies programs of this machine with the libraries they need, at
# the paths they have here.
copy_programs() {
    local dir=$1 program file; shift
    for program; do
        program=$(command -v "$program") || die "no $program; hint: ./dev setup"
        mkdir -p "$dir/bin"
        cp "$program" "$dir/bin/"
        for file in $(ldd "$program" | grep -o '/[^ ]*'); do
            mkdir -p "$dir$(dirname "$file")"
            cp -nL "$file" "$dir$file"
        done
    done
}

# pack_initramfs DIR FILE
pack_initramfs() { (cd "$1" && find . -print0 | cpio --null -o -H newc --quiet -R 0:0) | gzip -6 >"$2"; }

