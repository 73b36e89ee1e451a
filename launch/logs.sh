#!/usr/bin/env bash
# logs.sh: prints the end of the run's log on every worker.
#
#   launch/logs.sh --name=pals --project=my-project --zone=europe-west4-a [--follow]
#
#   --follow  print only the first worker's log, as it grows; Ctrl-C ends this, not the run

set -euo pipefail
options=(follow)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments
if [[ $follow ]]; then on_tpu 0 follow; else on_tpu all log; fi
