# What full-guest tests boot: a stock Debian cloud kernel and a small initramfs.
#
#   target/rig/guest/{vmlinuz,initrd.gz}      the kernel of SUITE
#   target/rig/guest13/{vmlinuz,initrd.gz}    the kernel of SUITE_NEW
#
# tests/rig/guest-init says what the initramfs does. target/rig/tools.ext4 (label `tools`, read-only) holds
# programs too large for it; attach it as any disk and they are on PATH.
# target/rig/images holds small.raw and standin.qcow2: see tests/rig/small and tests/rig/standin.
# shellcheck shell=bash

GUEST_MODULES=(
    virtio_pci virtio_blk virtio_net virtio_console virtio_balloon virtio-rng vmw_vsock_virtio_transport
    crc32c_generic crc32c-intel ext4 vfat nls_cp437 nls_ascii nls_iso8859-1 nls_utf8
)
GUEST_PROGRAMS=(sha256sum mkfs.ext4 e2fsck resize2fs blkdiscard taskset iperf3)
GUEST_TOOLS=(fio)

make_guest_kernel() { fetch_kernel "$SUITE" "$1" linux-image-cloud-amd64; }
make_guest_kernel_new() { fetch_kernel "$SUITE_NEW" "$1" linux-image-cloud-amd64; }

# The initramfs without programs, for the kernel unpacked in $1, to $2.
make_base_initrd() {
    local dir=$2.d
    mkdir -p "$dir"/{bin,proc,sys,dev,tmp,run,etc,root,mnt}
    cp /bin/busybox "$dir/bin/"
    install -m 755 tests/rig/guest-init "$dir/init"
    copy_modules "$1" "$dir" "${GUEST_MODULES[@]}"
    pack_initramfs "$dir" "$2"
    rm -rf "$dir"
}

make_guest_programs() {
    local dir=$1.d
    mkdir -p "$dir"
    copy_programs "$dir" "${GUEST_PROGRAMS[@]}"
    pack_initramfs "$dir" "$1"
    rm -rf "$dir"
}

# Programs with their own loader and libraries, so that they run wherever the disk is mounted.
make_guest_tools() {
    local dir=$1.d program loader
    mkdir -p "$dir"/{all,bin,lib,exe}
    copy_programs "$dir/all" "${GUEST_TOOLS[@]}"
    find "$dir/all" -name '*.so*' -exec mv -t "$dir/lib" {} +
    mv "$dir/all/bin"/* "$dir/exe/"
    rm -r "$dir/all"
    loader=$(cd "$dir/lib" && echo ld-linux*)
    for program in "${GUEST_TOOLS[@]}"; do
        printf '#!/bin/sh\nexec /tools/lib/%s --library-path /tools/lib /tools/exe/%s "$@"\n' "$loader" "$program" >"$dir/bin/$program"
        chmod +x "$dir/bin/$program"
    done
    mkfs.ext4 -q -L tools -d "$dir" "$1" "$(($(du -sm "$dir" | cut -f1) * 5 / 4 + 8))M"
    rm -rf "$dir"
}

make_guest() { join_guest "$RIG/kernel-cloud" "$1"; }
make_guest_new() { join_guest "$RIG/kernel-cloud13" "$1"; }

# join_guest TREE DIR: several archives in a row are one initramfs.
join_guest() {
    mkdir -p "$2"
    cp "$1"/boot/vmlinuz-* "$2/vmlinuz"
    make_base_initrd "$1" "$2/base.gz"
    cat "$2/base.gz" "$RIG/guest-programs.gz" >"$2/initrd.gz"
}

guest_files() {
    build kernel-cloud make_guest_kernel
    build kernel-cloud13 make_guest_kernel_new
    build guest-programs.gz make_guest_programs
    build guest make_guest tests/rig/guest-init
    build guest13 make_guest_new tests/rig/guest-init
    build tools.ext4 make_guest_tools
}

make_standin() { as_root tests/rig/standin "$1"; }
make_small() { as_root tests/rig/small "$1" "$RIG/guest/vmlinuz" "$RIG/guest/base.gz"; }

images() {
    guest_files
    build images/small.raw make_small tests/rig/small tests/rig/image.sh tests/rig/guest-init
    build images/standin.qcow2 make_standin tests/rig/standin tests/rig/image.sh
}
