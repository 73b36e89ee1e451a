#!/usr/bin/env bash
# run.sh: starts a pals-jax command on every worker of a TPU and returns; the run goes on in the
# background. A TPU has one run at a time. Its output goes to run.log, its exit status to run.exit.
#
#   launch/run.sh --name=pals --project=my-project --zone=europe-west4-a -- \
#     train --config=configs/pals_glue.py --workdir=runs/glue

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#arguments[@]})) || die "nothing to run: write -- and a pals-jax command, or see --help."
on_tpu all start "${arguments[@]}" || {
  say "the run did not start; if $name is new, first: $(this setup)"
  exit 1
}
[[ $dry_run ]] || say "started; to watch it: $(this logs --follow)"
