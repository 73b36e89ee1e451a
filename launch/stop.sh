#!/usr/bin/env bash
# stop.sh: stops a TPU that was created on demand, and its run. You still pay for its disk, which is
# kept. Pods, spot TPUs and those from the queue can only be deleted.
#
#   launch/stop.sh --name=pals --project=my-project --zone=europe-west4-a

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments
cloud tpu-vm stop "$name" || { say "$name was not stopped."; left || true; exit 1; }
[[ $dry_run ]] && exit
say "to start it again: $(dry_run=1 cloud tpu-vm start "$name" 3>&1)"
left || true
