#!/usr/bin/env bash
# setup.sh: installs this project and a Python for it on every worker of a TPU. Run it again after a
# change: it updates the installation and leaves runs and copied files alone.
#
#   launch/setup.sh --name=pals --project=my-project --zone=europe-west4-a

set -euo pipefail
options=()
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_arguments

repository=$(dirname "$here")
archive=$repository/build/$name.tgz
if [[ ! $dry_run ]]; then
  mkdir -p "$repository/build"
  trap 'rm -f "$archive"' EXIT
  tar -czf "$archive" -C "$repository" --exclude=__pycache__ \
    pyproject.toml README.md LICENSE pals_jax configs launch
fi
cloud tpu-vm scp "$archive" "$name:pals_jax.tgz" --worker=all
# Delete old code first, so that modules removed here do not remain there.
unpack='mkdir -p pals_jax && rm -rf pals_jax/pals_jax pals_jax/build'
unpack+=' && tar -xzf pals_jax.tgz -C pals_jax && bash pals_jax/launch/on_tpu.sh install'
cloud tpu-vm ssh "$name" --worker=all --command="$unpack"
