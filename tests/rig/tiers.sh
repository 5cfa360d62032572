# ./dev test: every tier, its minutes, and one line that sums what the runners reported.
# shellcheck shell=bash

TIERS=(format lint unit fleeting e2e guest)
# The whole command on two cores, builds included. It fails by processor time, which a busy
# neighbour of this machine does not change: minutes on the clock are shown beside it.
BUDGET_MINUTES=45
BUDGET_CORES=2

tier_format() { cargo fmt --check; }

# With the fake VMM and without: what only one of them uses is seen.
tier_lint() { cargo clippy --all-targets --features test-vmm -- -D warnings && cargo clippy -- -D warnings; }

# Unit, device, network-namespace and micro-guest tests: all but the targets that need the rig.
tier_unit() {
    local targets=() file
    for file in tests/*.rs tests/*/main.rs; do
        file=${file%/main.rs} file=${file##*/} file=${file%.rs}
        [[ $file == '*' || " ${RIG_TARGETS[*]} " == *" $file "* ]] || targets+=(--test "$file")
    done
    cargo test --features test-vmm --config "$(runner "${AS_ROOT[@]}")" --no-fail-fast --lib --bins "${targets[@]}"
}

# GitLab's own libraries against the executable: with machines that boot nothing here, with real
# ones in the rig. One static binary, so that it runs there.
tier_fleeting() {
    local test=$RIG/fleeting.test fake=$RIG/fake-plugin data=/var/lib/fleetingd
    need_go && (cd tests/fleeting && CGO_ENABLED=0 go test -c -o "$test" .) || return
    cargo build --features test-vmm && cp "$BIN" "$fake" && cargo build || return
    FLEETINGD_PLUGIN=$fake FLEETINGD_VMS=fake "$test" -test.v || return
    [[ $(rig_kind) == nested ]] || data=$RIG/data
    mkdir -p "$RIG/out"
    cat >"$RIG/out/fleeting.json" <<END
{"vm_image": "$RIG/images/standin.qcow2", "vm_disk_directory": "$data", "vm_disk_size_gb": 4,
 "vm_memory_mb": 1024, "vm_num_cpu_cores": 1, "boot_timeout": "15m"}
END
    export FLEETINGD_VMS=real FLEETINGD_CONFIG=$RIG/out/fleeting.json FLEETINGD_PATIENCE=30m
    export FLEETINGD_JOBS=${FLEETINGD_JOBS:-8} FLEETINGD_MACHINES=${FLEETINGD_MACHINES:-2}
    "$ROOT/dev" rig "$test" -test.v -test.timeout=40m
}

# The executable with real machines, as an operator's host sees it.
tier_e2e() { rig_cargo test --no-fail-fast --test e2e -- --test-threads=1; }

# Stock kernels, and what the unit tier skips where there is no vhost-net.
tier_guest() {
    rig_cargo test --features test-vmm --no-fail-fast --lib -- devices::net || return
    rig_cargo test --no-fail-fast --test guest
}

# Targets of cargo that run in the rig.
RIG_TARGETS=(e2e guest soak)

# runner WORD...: cargo's setting that starts test programs by a command.
runner() {
    local words
    words=$(printf '"%s",' "$@")
    printf 'target.%s.runner=[%s]\n' "$MUSL" "${words%,}"
}

# rig_cargo ARGUMENTS...: cargo builds here and what it built runs in the rig.
rig_cargo() {
    cargo build && cargo "$1" --config "$(runner "$ROOT/dev" rig)" "${@:2}"
}

# What the programs of a test find in their environment.
test_environment() {
    export FLEETINGD_BIN=$BIN FLEETINGD_PLUGIN=$BIN
    export FLEETINGD_REQUIRE_GUEST=1 FLEETINGD_GUEST_DIR=$RIG/guest FLEETINGD_GUEST_DIR_NEW=$RIG/guest13
    export FLEETINGD_TOOLS=$RIG/tools.ext4 FLEETINGD_IMAGES=$RIG/images
}

# run_tests [--without TIER]...
run_tests() {
    local without=() tier log lines=() passed=0 failed=0 start code used
    while (($#)); do
        [[ $1 == --without && " ${TIERS[*]} " == *" ${2:-} "* ]] || die "unknown argument: $*; hint: --without TIER, one of ${TIERS[*]}"
        without+=("$2")
        shift 2
    done
    setup
    rig_files
    images
    test_environment
    mkdir -p "$RIG/test"
    lines+=("$(minutes "$SECONDS") setup")
    for tier in "${TIERS[@]}"; do
        if [[ " ${without[*]} " == *" $tier "* ]]; then
            say "NOT RUN: $tier (--without $tier)"
            lines+=("      - $tier: NOT RUN")
            continue
        fi
        say "tier $tier"
        log=$RIG/test/$tier.log start=$SECONDS code=0
        "tier_$tier" </dev/null 2>&1 | tee "$log" || code=1
        count_tests "$tier" "$log" "$code"
        lines+=("$(minutes $((SECONDS - start))) $tier: $TIER_PASSED passed, $TIER_FAILED failed")
        passed=$((passed + TIER_PASSED)) failed=$((failed + TIER_FAILED))
    done
    printf '\nminutes\n'
    printf '%s\n' "${lines[@]}" "$(minutes "$SECONDS") on the clock, of $BUDGET_MINUTES"
    processor_seconds
    printf '%s of processor time, of %s\n' "$(minutes "$used")" "$((BUDGET_MINUTES * BUDGET_CORES))"
    if ((used > BUDGET_MINUTES * BUDGET_CORES * 60)); then
        say "over the budget of $BUDGET_MINUTES minutes on $BUDGET_CORES cores"
        failed=$((failed + 1))
    fi
    printf '%d passed, %d failed\n' "$passed" "$failed"
    ((failed == 0))
}

# Sets used to what all that this script waited for has used, in seconds.
processor_seconds() {
    # Not by a pipe: it would ask a shell of its own.
    times >"$RIG/test/times"
    used=$(awk 'NR == 2 { gsub("s", ""); split($1, user, "m"); split($2, sys, "m")
        printf "%d", (user[1] + sys[1]) * 60 + user[2] + sys[2] }' "$RIG/test/times")
}

minutes() { awk -v s="$1" 'BEGIN { printf "%7.1f", s / 60 }'; }

# count_tests TIER LOG CODE: sets TIER_PASSED and TIER_FAILED from the lines of cargo's and Go's
# runners. A command that failed without a failed test counts as one, and so does a tier of tests
# in which none ran. What was skipped and passed in no other run of the tier is named.
count_tests() {
    local tier=$1 log=$2 code=$3 skipped test
    read -r TIER_PASSED TIER_FAILED < <(awk '
        /^test result: / { passed += $4; failed += $6 }
        /^--- PASS: / { passed++ }
        /^--- FAIL: / { failed++ }
        END { print passed + 0, failed + 0 }' "$log")
    mapfile -t skipped < <(awk '
        /^--- PASS: / { ran[$3] = 1 }
        /^--- SKIP: / { skipped[$3] = 1 }
        /^SKIP: / { sub(/:$/, "", $2); skipped[$2] = 1 }
        /^test .* \.\.\. ignored/ { skipped[$2] = 1 }
        END { for (test in skipped) if (!(test in ran)) print test }' "$log")
    for test in "${skipped[@]}"; do say "SKIPPED in tier $tier: $test, see $log"; done
    case $tier in format | lint) ;; *) ((TIER_PASSED)) || code=1 ;; esac
    if ((code && !TIER_FAILED)); then TIER_FAILED=1; fi
}
