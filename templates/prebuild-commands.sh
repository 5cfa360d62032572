#!/bin/sh
# Runs the operator's commands in order and in one shell: cd, export and variables carry over.
# usage: prebuild-commands.sh COMMANDS RESULTS COUNT fail|continue
#
# COMMANDS/command-N.sh are the commands, RESULTS/code-N gets the exit code of each. A command
# that ends this shell leaves no code: whoever started it reads RESULTS/current and our own exit.
fleetingd_commands=$1 fleetingd_results=$2 fleetingd_count=$3 fleetingd_on_error=$4
fleetingd_at=0
set --
while [ "$fleetingd_at" -lt "$fleetingd_count" ]; do
    fleetingd_at=$((fleetingd_at + 1))
    printf '\n[fleetingd: command %s]\n' "$fleetingd_at"
    echo "$fleetingd_at" >"$fleetingd_results/current"
    # A syntax error in a sourced file would end this shell.
    if /bin/sh -n "$fleetingd_commands/command-$fleetingd_at.sh"; then
        . "$fleetingd_commands/command-$fleetingd_at.sh"
        fleetingd_code=$?
    else
        fleetingd_code=2
    fi
    echo "$fleetingd_code" >"$fleetingd_results/code-$fleetingd_at"
    if [ "$fleetingd_code" -ne 0 ]; then
        printf '[fleetingd: command %s exited with %s]\n' "$fleetingd_at" "$fleetingd_code"
        [ "$fleetingd_on_error" = continue ] || exit 1
    fi
done
exit 0
