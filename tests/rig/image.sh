# Lays out a disk image as Ubuntu's cloud image has it, without mounting anything.
# shellcheck shell=bash

# ubuntu_layout IMAGE ROOT-TREE SPARE_MIB BOOT_MIB: a raw image of a tree. As in Ubuntu 24.04: GPT, root is
# partition 1 and physically last (label cloudimg-rootfs), BIOS boot 14, ESP 15 (label UEFI),
# /boot 16 (label BOOT). The tree loses its /boot.
ubuntu_layout() {
    local image=$1 tree=$2 spare=$3 boot_mib=$4 boot=$2.boot esp_mib=16 root_mib start
    rm -rf "$boot" "$image"
    mv "$tree/boot" "$boot"
    mkdir -m 755 "$tree/boot"
    root_mib=$(($(du -sm --apparent-size "$tree" | cut -f1) * 11 / 10 + spare))
    truncate -s "$((1 + 4 + esp_mib + boot_mib + root_mib + 1))M" "$image"
    sfdisk -q "$image" <<END
label: gpt
14: start=1MiB, size=4MiB, type=21686148-6449-6E6F-744E-656564454649
15: size=${esp_mib}MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
16: size=${boot_mib}MiB, type=BC13C2FF-59E6-4262-A352-B275FD6F7172
1: size=${root_mib}MiB, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
END
    start=$((1 + 4))
    mkfs.vfat -F 16 -n UEFI --offset $((start * 2048)) "$image" $((esp_mib * 1024)) >/dev/null 2>&1
    mmd -i "$image@@${start}M" ::EFI
    start=$((start + esp_mib))
    mkfs.ext4 -q -F -L BOOT -E "offset=$((start << 20))" -d "$boot" "$image" "${boot_mib}M"
    start=$((start + boot_mib))
    mkfs.ext4 -q -F -L cloudimg-rootfs -E "offset=$((start << 20))" -d "$tree" "$image" "${root_mib}M"
    rm -rf "$boot"
}
