#!/usr/bin/env bash
# Trains on a Cloud TPU pod: one queued resource, the same command on every
# worker.
#
#   launch/tpu.sh COMMAND --name=NAME --zone=ZONE [OPTION...] [-- FLAG...]
#
# Commands
#   create   asks for the pod; it waits in Google's queue
#   setup    waits for the pod, copies the code, installs it on every worker
#   run      starts the run on every worker and comes back
#   watch    looks after the run until it is done: starts it again when it was
#            stopped (exit code 75), hung (76) or failed, and makes the pod anew
#            when it was taken away
#   resume   what watch does after a preemption, once
#   status   the pod's state, and what every worker is doing
#   log      the last lines of every worker
#   stop     asks every worker to save and end
#   delete   gives the pod back; an idle pod costs as much as a busy one
#
# Options
#   --name=NAME        of the pod
#   --zone=ZONE        such as us-east5-a
#   --project=PROJECT  default: gcloud's
#   --type=TYPE        v4-N, v5litepod-N, v5p-N or v6e-N, for create, run,
#                      watch and resume; the type tells the XLA flags as well
#   --runtime=VERSION  of the machines' image; default: the type's usual one
#   --spot             cheaper, may be taken away at any time
#   --create-flag=FLAG passed to gcloud's create; as often as needed
#   --branch=NAME      branch or tag to run; default: HEAD
#   --config=FILE      of the run, as for photochat_jax.main; with --workdir
#   --workdir=gs://... for run, watch and resume
#   --lines=N          of log; default 40
#   --poll=SECONDS     between two looks; default 60
#   --back-off=SECONDS before the run is started again; doubles up to ten
#                      minutes while it does not stay up; default 30
#   --max-failures=N   in a row, after which watch gives up; default 3
#   --delete-when-done watch gives the pod back after exit code 0
#   --dry-run          prints every command and runs none
#   -- FLAG...         more flags for photochat_jax.main
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_watch.sh
source "$here/tpu_watch.sh"

name="" zone="" project="" type="" runtime="" branch=HEAD config="" workdir=""
spot="" dry_run="" delete_when_done=""
lines=40 poll=60 back_off=30 max_failures=3
create_flags=() flags=()

parse() {
  while (($#)); do
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --runtime=*) runtime="${1#*=}" ;;
      --branch=*) branch="${1#*=}" ;;
      --config=*) config="${1#*=}" ;;
      --workdir=*) workdir="${1#*=}" ;;
      --lines=*) lines="${1#*=}" ;;
      --poll=*) poll="${1#*=}" ;;
      --back-off=*) back_off="${1#*=}" ;;
      --max-failures=*) max_failures="${1#*=}" ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --spot) spot=yes ;;
      --delete-when-done) delete_when_done=yes ;;
      --dry-run) dry_run=yes ;;
      --)
        shift
        flags=("$@")
        return
        ;;
      *) fail "'$1' is no option, see --help; flags of the run follow '--'." ;;
    esac
    shift
  done
}

# What the type says: the chip, as runtime/xla_flags.py calls it, and the
# machines' image (https://cloud.google.com/tpu/docs/runtimes).
know_type() {
  local image
  case "$type" in
    v4-*) chip=v4 image=tpu-ubuntu2204-base ;;
    v5litepod-*) chip=v5e image=v2-alpha-tpuv5-lite ;;
    v5p-*) chip=v5p image=v2-alpha-tpuv5 ;;
    v6e-*) chip=v6e image=v2-alpha-tpuv6e ;;
    "") fail "Give --type=TYPE, such as v5p-64." ;;
    *) fail "--type=$type is none of v4-N, v5litepod-N, v5p-N and v6e-N." ;;
  esac
  runtime="${runtime:-$image}"
}

check() {
  [[ -n "$name" ]] || fail "Give --name=NAME, the name of the pod."
  [[ -n "$zone" ]] || fail "Give --zone=ZONE, such as us-east5-a."
  whole_number --lines "$lines"
  whole_number --poll "$poll"
  whole_number --back-off "$back_off"
  whole_number --max-failures "$max_failures"
  case "$1" in create | run | watch | resume) know_type ;; esac
  case "$1" in run | watch | resume) ;; *) return 0 ;; esac
  [[ -n "$config" ]] || fail "Give --config=FILE, one of configs/."
  [[ "$workdir" == gs://* ]] ||
    fail "Give --workdir=gs://BUCKET/RUN; the workers of a pod share no disk."
}

create() {
  local request=(
    gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime"
  )
  [[ -z "$spot" ]] || request+=(--spot)
  run "${request[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

setup() {
  local bundle="${TMPDIR:-/tmp}/photochat-$name.bundle"
  # `|| return`, here and below: watch goes on after a failure, and so bash
  # does not end the function by itself.
  wait_until_active || return
  if [[ -z "$dry_run" && -n "$(git -C "$here" status --porcelain)" ]]; then
    note "What is not committed does not travel."
  fi
  run git -C "$here" bundle create --quiet "$bundle" "$branch" || return
  run gcloud compute tpus tpu-vm scp "$bundle" "$here/worker.sh" "$name:" \
    --worker=all "${where[@]}" || return
  workers install "${bundle##*/}" "$branch"
}

start() {
  workers start "$chip" --config="$config" --workdir="$workdir" \
    ${flags[@]+"${flags[@]}"}
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
}

status() {
  if [[ -n "$dry_run" ]]; then
    print_questions
  else
    note "$name: $(pod_state)"
  fi
  workers status
}

# The same command on every worker: worker.sh says what each does.
workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" \
    --command="$(quoted bash worker.sh "$@")"
}

main() {
  local command="${1:-}"
  case "$command" in
    create | setup | run | watch | resume | status | log | stop | delete) ;;
    -h | --help | help | "") show_help "${BASH_SOURCE[0]}" ;;
    *) fail "'$command' is no command; --help lists them." ;;
  esac
  shift
  parse "$@"
  check "$command"
  where=(--zone="$zone" ${project:+"--project=$project"} --quiet)
  case "$command" in
    run) start ;;
    log) workers log "$lines" ;;
    stop) workers stop ;;
    *) "$command" ;;
  esac
}

main "$@"
