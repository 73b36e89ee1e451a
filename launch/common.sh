# shellcheck shell=bash
# Shared by the scripts of this folder: options, messages, the state of a TPU, and the only call of
# gcloud. A script lists its options beyond the common ones and sources this file:
#
#     options=(kind spot)
#     source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
#     parse "$@"
#
# parse() sets a variable for each option (empty if not given, 1 for a flag) and puts everything else
# into the array `arguments`.
#
# shellcheck disable=SC2034,SC2154 # the scripts use the options and what choose_kind sets

say() { echo "launch: $*" >&2; }
die() { say "$*"; exit 2; }

((BASH_VERSINFO[0] >= 5)) || die "bash 5 or newer is needed; this is $BASH_VERSION."
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1 # --dry-run prints to descriptor 3, also from within $(...)

# accelerator type, runtime version, chips, JAX devices, hosts
kinds="
v2-8          tpu-ubuntu2204-base   4   8   1
v3-8          tpu-ubuntu2204-base   4   8   1
v4-8          tpu-ubuntu2204-base   4   4   1
v5litepod-4   v2-alpha-tpuv5-lite   4   4   1
v5litepod-8   v2-alpha-tpuv5-lite   8   8   1
v5litepod-16  v2-alpha-tpuv5-lite   16  16  4
v6e-4         v2-alpha-tpuv6e       4   4   1
v6e-8         v2-alpha-tpuv6e       8   8   1
v3-32         tpu-ubuntu2204-base   16  32  4
"

# quote WORD...: the words as one line that a shell reads back unchanged.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# The comment at the top of a script is its help.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  cat <<END

Which TPU:
  --name=NAME        the name of the TPU (and of its request in the queue)
  --project=PROJECT  the id of the Google Cloud project that pays
  --zone=ZONE        such as europe-west4-a
Always:
  --dry-run          print the gcloud commands, one per line, and run none
  --help             print this
END
}

# parse WORD...: sets the options, checks them, and leaves the rest in `arguments`.
parse() {
  local option known=" name project zone dry_run ${options[*]} "
  for option in $known; do printf -v "$option" ''; done
  arguments=()
  while (($#)); do
    case $1 in
      --) shift; arguments+=("$@"); break ;;
      --help) help; exit 0 ;;
      --dry-run | --spot | --queued | --follow) set_option "${1#--}" 1 ;;
      --dry-run=* | --spot=* | --queued=* | --follow=*) die "${1%%=*} takes no value." ;;
      --*=?*) option=${1#--}; set_option "${option%%=*}" "${option#*=}" ;;
      --*) die "$1: give it a value, as in $1=VALUE, or see --help." ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  check_options
}

set_option() {
  local variable=${1//-/_}
  [[ $variable != *" "* && $known == *" $variable "* ]] || die "unknown option --$1: see --help."
  printf -v "$variable" '%s' "$2"
}

# Refuses every detectable mistake here, before anything is paid for.
check_options() {
  local option
  for option in name project zone; do
    [[ ${!option} ]] || die "--$option is missing: see --help."
  done
  matches name '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$' 'of small letters, digits and inner hyphens'
  matches project '^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$' "a project's id, not its title"
  matches zone '^[a-z]+-[a-z]+[0-9]+-[a-z]$' 'a zone, such as europe-west4-a'
  [[ $dry_run ]] || type -P gcloud >/dev/null ||
    die "gcloud is not installed: see https://cloud.google.com/sdk/docs/install."
}

# matches OPTION REGEX WHAT: ends the script unless the option's value matches.
matches() { [[ ${!1} =~ $2 ]] || die "--$1=${!1} is not $3."; }

no_arguments() {
  ((${#arguments[@]} == 0)) || die "unexpected argument ${arguments[0]}: see --help."
}

# choose_kind: sets the default of --kind, its runtime version, and its chips, devices and hosts.
choose_kind() {
  kind=${kind:-v3-8}
  read -r _ runtime chips devices hosts < <(awk -v kind="$kind" '$1 == kind' <<<"$kinds") ||
    die "--kind=$kind is unknown: take one of$(awk 'NF {printf " %s", $1}' <<<"$kinds")."
}

# cloud GROUP VERB WORD...: the only call of gcloud.
cloud() {
  local command=(gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet)
  if [[ $dry_run ]]; then quote "${command[@]}" >&3; else "${command[@]}"; fi
}

# state tpu-vm|queued-resources: prints the state of the TPU or of its request in capitals; ABSENT
# if there is none, UNKNOWN on a dry run. Fails if Google Cloud does not answer.
state() {
  local field=state output
  [[ $1 == queued-resources ]] && field=state.state
  output=$(cloud "$1" describe "$name" --format="value($field)" 2>&1) || {
    [[ $output == *NOT_FOUND* ]] || { say "$output"; return 1; }
    output=ABSENT
  }
  # gcloud may add remarks; the state is the line of capitals.
  grep -m1 -x '[A-Z_]\+' <<<"${output:-UNKNOWN}" || { say "$output"; return 1; }
}

# on_tpu WORKER WORD...: runs on_tpu.sh on the worker, with these words.
on_tpu() {
  local worker=$1
  shift
  cloud tpu-vm ssh "$name" --worker="$worker" \
    --command="$(quote bash pals_jax/launch/on_tpu.sh "$@")"
}

# run_state: prints the state of the run over all workers: `running`, its exit status (failures take
# precedence), or `none` if there is none or it vanished. Fails if a worker does not respond.
run_state() {
  local output states
  output=$(on_tpu all state) || return 1
  states=$(sed -n 's/^run: //p' <<<"$output" | sort -u)
  if grep -m1 -v -x -E '0|running|none' <<<"$states"; then return 0; fi
  if grep -m1 -x running <<<"$states"; then return 0; fi
  if [[ $states == 0 ]]; then echo 0; else echo none; fi
}

# this SCRIPT WORD...: prints the call of another script of this folder on the same TPU.
this() {
  local script=$1
  shift
  quote "$here/$script.sh" --name="$name" --project="$project" --zone="$zone" "$@"
}

say_absent() { say "there is no TPU and no request named $name in $zone: nothing is paid for."; }

# left: reports what remains of the TPU and how to stop paying. Fails if anything remains.
left() {
  local group found status=0
  for group in queued-resources tpu-vm; do
    found=$(state "$group" 2>/dev/null) || found="in an unreadable state"
    [[ $found == ABSENT ]] && continue
    say "$group $name is $found: you may be paying for it until you run: $(this delete)"
    status=1
  done
  ((status)) || say_absent
  return $status
}
