# ./dev bench: what is measured at this machine's own speed, then machines beside other VMMs'
# machines where KVM runs stock kernels. One report of all of it.
#
#   --json              one object a line
#   FLEETINGD_PEERS     a directory with `firecracker` and `cloud-hypervisor`, for boots
#   FLEETINGD_BENCH     only these parts, by commas: speed boot worker memory disk net
# shellcheck shell=bash

bench() {
    local code=0
    (($# == 0)) || [[ $* == --json ]] || die "unknown argument: $*; hint: --json"
    setup
    images
    test_environment
    export CRITERION_HOME=$RIG/criterion
    cargo bench --features test-vmm --bench speed --bench musl --bench side --no-run
    BIN=$ROOT/target/$MUSL/release/fleeting-plugin-fleetingd
    FLEETINGD_RIG=$(rig_kind)
    export FLEETINGD_RIG
    [[ ${FLEETINGD_BENCH:-speed} != *speed* ]] || cargo bench --features test-vmm --bench speed --bench musl >&2
    mkdir -p "$RIG/out"
    rm -f "$RIG/out/bench"
    export FLEETINGD_BENCH_IMAGE=$RIG/out/bench.raw
    # Its lines for debuggers would not fit into the image.
    strip -g -o "$RIG/out/agent" "$BIN"
    tests/rig/with-agent "$RIG/images/small.raw" "$RIG/out/agent" "$FLEETINGD_BENCH_IMAGE"
    cargo bench --config "$(runner "$ROOT/dev" rig)" --features test-vmm --bench side -- "$@" >&2 || code=$?
    cat "$RIG/out/bench"
    return "$code"
}
