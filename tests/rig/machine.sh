# ./dev rig: runs a command where KVM runs stock kernels.
#
# Where this machine's own /dev/kvm does that, the command runs here. Elsewhere it runs in the
# nested rig: QEMU without KVM emulates a processor with AMD's virtualisation, a Debian kernel
# (L1) started in it offers a real /dev/kvm, and guests (L2) run on that. L1 sees this machine's
# own root, so programs built here run in it as they are:
#
#   /                        this machine's root, read-only by 9p, under an overlay in memory
#   target/rig/out           shared both ways ($RIG_OUT), holds .control/{command,env,exit}
#   /var/lib/fleetingd       a disk kept between runs, target/rig/data.raw ($RIG_DATA)
#   10.0.2.15 on eth0        QEMU's user network: out, but not in
#
# The command's output goes through a port of its own, so the kernel's noise (target/rig/l1.log)
# never mixes with it.
# shellcheck shell=bash

RIG_DATA_SIZE=40G
# Seconds without a sign of life: many times what a machine with busy neighbours takes.
RIG_STILL=240
RIG_BOOT_MODULES=(virtio_pci virtio_blk virtio_net virtio_console virtio-rng 9p 9pnet_virtio overlay crc32c_generic crc32c-intel ext4)

# QEMU of one release for every machine: the emulation of nested virtualisation in older ones
# corrupts L1 now and then (a triple fault of L2 or L1, or a machine that stands still).
make_qemu() {
    as_root mmdebstrap --quiet --mode=root --variant=extract --include=qemu-system-x86 \
        "$SUITE_NEW" "$1" "$(debian_source "$SUITE_NEW")"
}

make_kernel() { fetch_kernel "$SUITE" "$1" linux-image-amd64; }

make_l1_initrd() {
    local dir=$1.d
    mkdir -p "$dir"/{bin,proc,sys,dev,ro,rw,root}
    cp /bin/busybox "$dir/bin/"
    install -m 755 tests/rig/l1-init "$dir/init"
    copy_modules "$RIG/kernel" "$dir" "${RIG_BOOT_MODULES[@]}"
    pack_initramfs "$dir" "$1"
    rm -rf "$dir"
}

# The disk outlives everything but its own removal: what is on it is built by the tests.
make_data_disk() {
    [[ -e $RIG/data.raw ]] && return
    truncate -s "$RIG_DATA_SIZE" "$RIG/data.raw"
    mkfs.ext4 -q -F -L rig-data -E lazy_itable_init=1,lazy_journal_init=1 "$RIG/data.raw"
}

rig_files() {
    build qemu make_qemu
    build kernel make_kernel
    build l1.initrd make_l1_initrd tests/rig/l1-init
    make_data_disk
}

# host or nested; FLEETINGD_RIG forces one.
rig_kind() {
    if [[ -n ${FLEETINGD_RIG:-} ]]; then
        [[ $FLEETINGD_RIG == host || $FLEETINGD_RIG == nested ]] || die "FLEETINGD_RIG is '$FLEETINGD_RIG'; hint: host or nested"
        printf '%s\n' "$FLEETINGD_RIG"
    elif [[ -x $BIN ]] && as_root "$BIN" kvm-check >/dev/null 2>&1; then printf 'host\n'
    else printf 'nested\n'
    fi
}

# rig [COMMAND...]: exit code and output are the command's.
rig() {
    local kind
    (($#)) || [[ -t 0 && -t 1 ]] || die "nothing to run; hint: ./dev rig COMMAND, or a terminal for a shell"
    kind=$(rig_kind)
    mkdir -p "$RIG/out"
    "rig_$kind" "$@"
}

rig_host() {
    (($#)) || set -- "${SHELL:-/bin/bash}"
    mkdir -p "$RIG/data"
    cd "$CALLER_PWD" || return
    as_root env PATH="$PATH" RIG_OUT="$RIG/out" RIG_DATA="$RIG/data" timeout --foreground "${RIG_TIMEOUT:-3600}" "$@"
}

rig_nested() {
    local control=$RIG/out/.control lock out copier code=0
    [[ $ROOT != *[[:space:],]* ]] || die "the checkout's path has a space or a comma: $ROOT; hint: move it"
    rig_files
    exec {lock}>"$RIG/machine.lock"
    flock -n "$lock" || { say "waiting for another ./dev rig of this checkout"; flock "$lock"; }
    rm -rf "$control"
    mkdir -m 700 "$control" # the environment may hold secrets
    { export -p; printf 'cd %q\n' "$CALLER_PWD"; } >"$control/env"
    if (($#)); then
        printf '%q ' "$@" >"$control/command"
        # QEMU opens its output by name: a pipe is never truncated, and can always be opened.
        exec {out}> >(cat)
        copier=$!
        rig_qemu -chardev "file,id=out,path=/dev/fd/$out,append=on" -device virtserialport,chardev=out,name=rig </dev/null || code=$?
        exec {out}>&-
        wait "$copier"
    else
        local tty
        tty=$(stty -g)
        rig_qemu -chardev stdio,id=out,signal=off -device virtconsole,chardev=out || code=$?
        stty "$tty"
    fi
    ((code != 124)) || die "the rig was stopped after RIG_TIMEOUT=${RIG_TIMEOUT:-3600} s; hint: its log is $RIG/l1.log"
    if [[ ! -s $control/exit ]]; then
        tail -n 20 "$RIG/l1.log" >&2
        die "the rig ended before the command did (QEMU: $code); hint: its log is $RIG/l1.log"
    fi
    code=$(<"$control/exit")
    rm -rf "$control"
    exec {lock}>&-
    return "$code"
}

# Runs L1 to its end; killed with this script.
rig_qemu() {
    local memory pid watcher code=0 control=$RIG/out/.control qemu=$RIG/qemu/usr
    mkfifo "$control"/monitor.{in,out}
    memory=$(awk '/MemTotal/ { m = int($2 / 1024 * 3 / 4); print m < 12288 ? m : 12288 }' /proc/meminfo)
    setpriv --pdeathsig TERM timeout --foreground "${RIG_TIMEOUT:-3600}" \
        "$qemu/lib64/ld-linux-x86-64.so.2" --library-path "$qemu/lib/x86_64-linux-gnu" "$qemu/bin/qemu-system-x86_64" \
        -L "$qemu/share/qemu" -L "$qemu/share/seabios" \
        -M q35 -accel tcg,thread=multi -cpu max -smp "${RIG_CPUS:-2}" -m "${RIG_MEMORY:-$memory}" \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$RIG"/kernel/boot/vmlinuz-* -initrd "$RIG/l1.initrd" \
        -append "console=ttyS0 loglevel=4 panic=-1 no_timer_check nowatchdog rig.root=$ROOT" \
        -serial "file:$RIG/l1.log" -chardev "pipe,id=monitor,path=$control/monitor" -mon chardev=monitor -device virtio-serial-pci "$@" -device virtio-rng-pci \
        -virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
        -virtfs "local,path=$RIG/out,mount_tag=out,security_model=none,multidevs=remap" \
        -drive "if=none,id=data,file=$RIG/data.raw,format=raw,cache=unsafe,discard=unmap" -device virtio-blk-pci,drive=data \
        -netdev user,id=net -device virtio-net-pci,netdev=net <&0 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; wait "$pid"; exit 130' INT TERM HUP
    watch_rig "$pid" &
    watcher=$!
    wait "$pid" || code=$?
    kill "$watcher" 2>/dev/null
    wait "$watcher" || true
    trap - INT TERM HUP
    return "$code"
}

# Kills a machine that stands still, with its processors' state at the end of its log.
watch_rig() {
    local pid=$1 control=$RIG/out/.control never beat
    exec {never}<> <(:)
    [[ -z ${out:-} ]] || exec {out}>&-
    while ! read -rt 5 -u "$never" && kill -0 "$pid" 2>/dev/null; do
        beat=$(stat -c %Y "$control/beat" 2>/dev/null) || continue
        (($(date +%s) - beat > RIG_STILL)) || continue
        say "the rig stands still: no sign of life for $RIG_STILL s; hint: its state is in $RIG/l1.log"
        echo "info registers -a" >"$control/monitor.in"
        timeout 5 cat "$control/monitor.out" >>"$RIG/l1.log"
        pkill -KILL -P "$pid"
        return
    done
}
