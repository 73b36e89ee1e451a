#!/usr/bin/env bash
# babysit.sh: keeps a run going until it completes. Creates the TPU if it does not exist, sets it up
# and starts the run; repeats this after each preemption, waiting for capacity if there is none;
# restarts the run if it fails. Ends when the run exits with 0, at once if it exits with 2 (invalid
# input), and after too many failures. It may be stopped and called again at any time: a run that is
# still going is only watched. It never deletes a working TPU, and reports at the end what remains.
#
#   launch/babysit.sh --name=pals --project=my-project --zone=europe-west4-a [OPTION...] -- \
#     train --config=configs/pals_glue.py --workdir=gs://my-bucket/glue
#
#   --kind=KIND, --spot, --queued  as for create.sh
#   --copy=PATH, --to=DIR          files to copy before each start, and the target, as for copy.sh
#   --failures=N                   give up at the Nth failure that is not a preemption; 3 by default
#   --poll=SECONDS                 how often to look; 60 by default

set -euo pipefail
options=(kind spot queued copy to failures poll)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
choose_kind
failures=${failures:-3} poll=${poll:-60}
matches failures '^[1-9][0-9]*$' 'a number from 1'
matches poll '^[0-9]+(\.[0-9]+)?$' 'a number of seconds'
[[ ${arguments[0]-} == train && " ${arguments[*]}" == *" --workdir="* ]] ||
  die "nothing to babysit: write -- train --config=FILE --workdir=DIR, or see --help."
[[ ! $copy || -e $copy ]] || die "there is no $copy to copy."
[[ " ${arguments[*]}" =~ " --workdir="(/|gs://) ]] ||
  say "the workdir is on the TPU's own disk: a run that is preempted starts over (see README.md)."

tpu=(--name="$name" --project="$project" --zone="$zone" ${dry_run:+--dry-run})
create() { "$here/create.sh" "${tpu[@]}" --kind="$kind" ${spot:+--spot} ${queued:+--queued}; }
setup() { "$here/setup.sh" "${tpu[@]}"; }
bring() { [[ ! $copy ]] || "$here/copy.sh" "${tpu[@]}" ${to:+--to="$to"} -- "$copy"; }
start() { "$here/run.sh" "${tpu[@]}" -- "${arguments[@]}"; }
remove() { "$here/delete.sh" "${tpu[@]}"; }

if [[ $dry_run ]]; then # one round, as if the TPU did not exist yet
  create && setup && bring && start && run_state >/dev/null
  exit
fi

ended() {
  status=$?
  ((status < 128)) || say "interrupted; the run, if there is one, goes on."
  left || true
  exit "$status"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Bash handles signals during `wait`, not `sleep`; a leftover `sleep` must not hold our output open.
pause() {
  sleep "$poll" >/dev/null 2>&1 3>&- &
  wait $!
}

failed=0
fail() {
  failed=$((failed + 1))
  say "$1 (failure $failed of $failures)."
  ((failed < failures)) || { say "giving up."; exit 1; }
  pause
}

# Returns when the TPU is ready; creates it if it does not exist or was preempted. Once it has been
# ready, a failed creation means lack of capacity and does not count as a failure.
was_ready=
ensure() {
  local request vm seen='' silent=0
  while true; do
    if ! request=$(state queued-resources) || ! vm=$(state tpu-vm); then
      silent=$((silent + 1))
      say "Google Cloud does not report the state of $name ($silent of $failures in a row)."
      ((silent < failures)) || { say "giving up."; exit 1; }
      pause
      continue
    fi
    silent=0
    case "$request $vm" in
      *" READY") was_ready=1; return ;;
      "ABSENT ABSENT")
        if create; then
          :
        elif [[ $was_ready ]]; then
          say "$name could not be created again yet; retrying."
          pause
        else
          fail "$name could not be created"
        fi ;;
      *" PREEMPTED" | *" TERMINATED" | "SUSPENDED "* | "ACTIVE ABSENT")
        say "$name was preempted; creating it again."
        remove || fail "what was left of $name could not be deleted" ;;
      "FAILED "*)
        remove || true
        fail "the request for $name failed" ;;
      *" STOPPED") say "$name is stopped: start it or delete it."; exit 1 ;;
      *) # changing from one state to another
        [[ $seen == "$request $vm" ]] || say "waiting: request $request, TPU $vm."
        seen="$request $vm"
        pause ;;
    esac
  done
}

# Returns when the run is over; `result` is then its state, or `lost` if the TPU does not respond.
watch() {
  local silent=0
  while true; do
    if result=$(run_state); then
      silent=0
      [[ $result == running ]] || return 0
    else
      silent=$((silent + 1)) result=lost
      if ((silent >= 3)) || [[ $(state tpu-vm) != READY ]]; then return 0; fi
    fi
    pause
  done
}

while true; do
  ensure
  if [[ $(run_state 2>/dev/null) == running ]]; then
    going=$(on_tpu 0 command | sed -n 's/^command: //p') || { pause; continue; }
    [[ $going == "${arguments[*]@Q}" ]] ||
      die "another run is going on: $going; wait for its end, or delete $name."
    say "the run is already going on; watching it."
  elif ! setup || ! bring || ! start; then
    pause
    [[ $(state tpu-vm) != READY ]] || fail "the run could not be started"
    continue
  fi
  watch
  case $result in
    0) say "the run is complete."; exit 0 ;;
    2) say "the run ended with 2, for wrong input; see $(this logs)"; exit 2 ;;
    143) say "the run was told to stop and has saved its state." ;;
  esac
  # A preemption first ends the run; the TPU's state shows it a little later.
  pause
  [[ $(state tpu-vm) == READY ]] || continue
  on_tpu all kill || true # workers may still wait for one that failed
  [[ $result == 143 ]] || fail "the run ended with $result; see $(this logs)"
done
