#!/usr/bin/env bash
# Runs on a worker of the TPU, called by the scripts beside it:
#
#   on_tpu.sh install            makes the environment .venv and installs the project in it
#   on_tpu.sh start COMMAND...   starts pals-jax COMMAND in the background
#   on_tpu.sh state              prints `run: running`, `run: EXIT STATUS` or `run: none`
#   on_tpu.sh command            prints `command: COMMAND...` of the last start
#   on_tpu.sh kill               ends the run
#   on_tpu.sh log | follow       prints the end of the log, or goes on printing it
#
# A run holds a lock on run.lock until its last process ends, even if the run is killed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The TPU's own Python is too old for JAX: uv brings one.
install() {
  lock || { echo "a run is going on and uses the installed code; wait for its end." >&2; exit 1; }
  python3 -m pip install --quiet --user uv
  local uv=$HOME/.local/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.11 .venv
  "$uv" pip install --quiet --python .venv/bin/python --reinstall-package pals_jax '.[tpu,gcs]'
}

# The lock is on descriptor 9, which the run inherits.
lock() { exec 9>>run.lock && flock --nonblock 9; }

start() {
  [[ -x .venv/bin/pals-jax ]] || { echo "pals-jax is not installed here." >&2; exit 1; }
  lock || { echo "a run is going on already." >&2; exit 1; }
  rm -f run.exit
  echo "${*@Q}" >run.command
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid bash -c '
    trap : TERM # TERM reaches the whole group: survive it, to record the exit status of the run
    status=0
    "$@" >>run.log 2>&1 || status=$?
    echo "$status" >run.exit.new
    mv run.exit.new run.exit # never half-written
  ' run .venv/bin/pals-jax "$@" </dev/null >/dev/null 2>&1 &
  echo $! >run.pid # the leader of its own process group
}

state() {
  if ! lock; then
    echo "run: running"
  elif [[ -e run.exit ]]; then
    echo "run: $(<run.exit)"
  else
    echo "run: none"
  fi
}

kill_run() {
  lock && return # nothing runs
  kill -- "-$(<run.pid)"
  flock --timeout 60 9 || kill -KILL -- "-$(<run.pid)"
}

case $1 in
  install) install ;;
  start) start "${@:2}" ;;
  state) state ;;
  command) echo "command: $(<run.command)" ;;
  kill) kill_run ;;
  log) echo "== $HOSTNAME" && tail -n 100 run.log ;;
  follow) tail -n 100 -F run.log ;;
esac
