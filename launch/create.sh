#!/usr/bin/env bash
# create.sh: creates a TPU, on demand unless told otherwise.
#
#   launch/create.sh --name=pals --project=my-project --zone=europe-west4-a [OPTION...]
#
#   --kind=KIND  v2-8, v3-8 (the default: four chips), v4-8, v5litepod-4, v5litepod-8,
#                v5litepod-16 (a pod), v6e-4, v6e-8 or v3-32 (a pod)
#   --spot       cheaper; Google may take it back at any time
#   --queued     wait in the queue if there is no capacity now; billing starts when it is served.
#                Together with --spot: wait for spot capacity

set -euo pipefail
options=(kind spot queued)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments
choose_kind

failed() {
  status=$?
  ((status == 0)) || { say "$name was not created."; left || true; }
  exit "$status"
}
[[ $dry_run ]] || trap failed EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "$kind: $chips chips, $devices devices, $hosts host(s), runtime $runtime"
if [[ $queued ]]; then
  cloud queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$kind" --runtime-version="$runtime" ${spot:+--spot}
  [[ $dry_run ]] || say "$name is requested; to see whether it is served: $(this status)"
else
  cloud tpu-vm create "$name" --accelerator-type="$kind" --version="$runtime" ${spot:+--spot}
fi
[[ $dry_run ]] || say "to stop paying: $(this delete)"
