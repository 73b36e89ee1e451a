#!/usr/bin/env bash
# delete.sh: deletes a TPU with its disk, and its queued request if there is one; then checks that
# nothing remains. Files on the TPU's own disk are lost.
#
#   launch/delete.sh --name=pals --project=my-project --zone=europe-west4-a

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments

# The request first, because it could still create its TPU. --force also deletes that TPU.
# If one of these fails, `left` says so.
[[ $(state queued-resources) == ABSENT ]] || cloud queued-resources delete "$name" --force || true
[[ $(state tpu-vm) == ABSENT ]] || cloud tpu-vm delete "$name" || true
[[ $dry_run ]] || left
