#!/usr/bin/env bash
# What one worker of a Cloud TPU pod does. launch/tpu.sh copies this file to the
# home of every worker and runs it there; nobody else needs to:
#
#   worker.sh install BUNDLE REVISION   the code, Python and the packages
#   worker.sh start CHIP [FLAG...]      the run, in the background
#   worker.sh status                    one line: running, exit CODE, or lost
#   worker.sh stop                      asks the run to save and end
#   worker.sh log LINES                 the end of its output
#
# `start` calls `train` through systemd, so that the run outlives the ssh
# session, exists once, and is sent SIGTERM when the machine is taken away.
set -euo pipefail

home="$HOME/photochat"
unit=photochat
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes

fail() {
  printf '%s: %s\n' "$(hostname)" "$1" >&2
  exit 2
}

install_all() {
  local bundle="$1" revision="$2"
  mkdir -p "$home"
  git init --quiet "$home/code"
  git -C "$home/code" fetch --quiet --force "$HOME/$bundle" "$revision"
  git -C "$home/code" checkout --quiet --force --detach FETCH_HEAD
  # The machines' own Python is older than the package; uv brings another.
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv venv --quiet --allow-existing --python 3.12 "$home/venv"
  uv pip install --quiet --python "$home/venv/bin/python" --compile-bytecode \
    --editable "$home/code[tpu]"
  # A chip that does not answer is cheaper to find now. All workers ask at
  # once, as the chips of a pod start together.
  JAX_PLATFORMS=tpu timeout 300 "$home/venv/bin/python" -c \
    'import jax; print(jax.local_device_count(), "of", jax.device_count())' ||
    fail "JAX finds no TPU here; delete the pod and create it again."
}

state() {
  systemctl show --property=ActiveState --value "$unit"
}

start() {
  local flags=("$@")
  case "$(state)" in
    inactive | failed) ;;
    *) fail "A run is going on; 'launch/tpu.sh stop' saves and ends it." ;;
  esac
  rm -f "$home/exit"
  sudo systemd-run --quiet --collect --unit="$unit" --uid="$(id -un)" \
    --setenv=HOME="$HOME" \
    --property=WorkingDirectory="$home/code" \
    --property=StandardOutput="append:$home/log.txt" \
    --property=StandardError="append:$home/log.txt" \
    --property=LimitMEMLOCK=infinity \
    --property=LimitNOFILE=1048576 \
    --property=TimeoutStopSec=300 \
    /bin/bash "$HOME/worker.sh" train "${flags[@]}"
}

train() {
  local chip="$1" python="$home/venv/bin/python" exports endpoints first
  shift
  exports="$("$python" -m photochat_jax.runtime.xla_flags "$chip")"
  eval "$exports"
  # No silent fall-back to the CPU where a chip does not start.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
  # The machine's environment does not name the other workers, its metadata
  # do: "NAME,NAME,..." or "NAME:ID:ADDRESS,...". JAX finds the rest itself.
  endpoints="$(curl --silent --fail --max-time 60 \
    --header 'Metadata-Flavor: Google' \
    "$metadata/worker-network-endpoints")" || endpoints=""
  if [[ "$endpoints" == *,* ]]; then
    first="${endpoints%%,*}"
    : "${JAX_COORDINATOR_ADDRESS:=${first##*:}:8476}"
    export JAX_COORDINATOR_ADDRESS
  fi
  # systemd sends SIGTERM to this shell too: it waits for Python, which saves,
  # and writes down how that ended.
  trap : TERM
  local code=0
  "$python" -m photochat_jax.main "$@" || code=$?
  printf '%s\n' "$code" >"$home/exit"
  return "$code"
}

status() {
  case "$(state)" in
    inactive | failed)
      if [[ -f "$home/exit" ]]; then
        printf 'worker %s exit %s\n' "$(hostname)" "$(<"$home/exit")"
      else
        # Never started, or the machine was started anew.
        printf 'worker %s lost\n' "$(hostname)"
      fi
      ;;
    *) printf 'worker %s running\n' "$(hostname)" ;;
  esac
}

command="${1:-}"
shift || fail "Say what to do; the head of worker.sh lists it."
case "$command" in
  install) install_all "$@" ;;
  start | train | status) "$command" "$@" ;;
  stop) sudo systemctl stop "$unit" ;;
  log)
    printf '== %s\n' "$(hostname)"
    tail -n "$1" "$home/log.txt"
    ;;
  *) fail "'$command' is nothing worker.sh does; see its head." ;;
esac
