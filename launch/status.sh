#!/usr/bin/env bash
# status.sh: prints the state of a TPU and of its run: `running`, the exit status, `none` if there is
# no run, or `unknown` if the TPU does not respond or is not set up.
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
if [[ $vm == READY || $dry_run ]]; then run=$(run_state) || run=unknown; fi
[[ $dry_run ]] && exit
printf 'request %s\ntpu %s\nrun %s\n' "$request" "$vm" "$run"
if [[ "$request $vm" == "ABSENT ABSENT" ]]; then
  say_absent
else
  say "to stop paying: $(this delete)"
fi
