#!/usr/bin/env bash
# delete.sh: deletes a TPU with its disk, and its request in the queue if there is one; then looks
# whether anything is left. What a run wrote to the TPU's own disk is lost.
#
#   launch/delete.sh --name=pals --project=my-project --zone=europe-west4-a

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments

# The request first: it would have its TPU created after all. --force deletes that TPU with it.
# If one of these fails, `left` says so.
[[ $(state queued-resources) == ABSENT ]] || cloud queued-resources delete "$name" --force || true
[[ $(state tpu-vm) == ABSENT ]] || cloud tpu-vm delete "$name" || true
[[ $dry_run ]] || left
