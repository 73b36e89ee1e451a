#!/usr/bin/env bash
# status.sh: prints what there is of a TPU, and what became of its run: running, its exit status, or
# none if there is none.
#
#   launch/status.sh --name=pals --project=my-project --zone=europe-west4-a

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments

request=$(state queued-resources)
vm=$(state tpu-vm)
run=none
[[ $vm == READY || $dry_run ]] && run=$(run_state)
[[ $dry_run ]] && exit
printf 'request %s\ntpu %s\nrun %s\n' "$request" "$vm" "$run"
left || true
