#!/usr/bin/env bash
# copy.sh: copies your files and folders to every worker of a TPU.
#
#   launch/copy.sh --name=pals --project=my-project --zone=europe-west4-a [--to=DIR] PATH...
#
#   --to=DIR  the target folder, relative to the one where runs start (the default)

set -euo pipefail
options=(to)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#arguments[@]})) || die "nothing to copy: name the files, or see --help."
# Some versions of scp pass this name to the remote shell, so it may hold nothing to quote.
[[ ! $to ]] ||
  matches to '^[A-Za-z0-9_][A-Za-z0-9_./-]*$' 'a relative path of letters, digits and ._-/'

sources=()
for path in "${arguments[@]}"; do
  [[ -e $path ]] || die "there is no $path to copy."
  [[ $path == /* ]] || path=./$path # scp would read a colon in a relative path as a host name
  sources+=("$path")
done
folder=pals_jax/$to
cloud tpu-vm ssh "$name" --worker=all --command="mkdir -p $folder"
cloud tpu-vm scp "${sources[@]}" "$name:$folder" --recurse --worker=all
