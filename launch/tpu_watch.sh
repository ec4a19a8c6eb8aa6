# shellcheck shell=bash disable=SC2154
# How launch/tpu.sh, which sources this, looks after a run. The variables are
# its own.

# The state of the pod in one word: NONE where it does not exist, UNKNOWN where
# gcloud did not say (no network, no login: no reason to make a second pod),
# else that of the queued resource, or of its node where only that is amiss.
pod_state() {
  local answer
  answer="$(ask_gcloud queued-resources state.state)"
  if [[ "$answer" == ACTIVE ]]; then
    answer="$(ask_gcloud tpu-vm state)"
    case "$answer" in
      READY) answer=ACTIVE ;;
      NONE) answer=GONE ;;
    esac
  fi
  printf '%s\n' "$answer"
}

ask_gcloud() {
  local errors answer
  errors="$(mktemp)"
  if answer="$(gcloud compute tpus "$1" describe "$name" "${where[@]}" \
    --format="value($2)" 2>"$errors")"; then
    printf '%s\n' "${answer:-UNKNOWN}"
  elif grep -qi "not.found" "$errors"; then
    printf 'NONE\n'
  else
    cat "$errors" >&2
    printf 'UNKNOWN\n'
  fi
  rm -f "$errors"
}

# States that only a new pod can follow.
is_over() {
  case "$1" in
    NONE | FAILED | SUSPENDED | GONE | PREEMPTED | TERMINATED) ;;
    *) return 1 ;;
  esac
}

wait_until_active() {
  local now before=""
  if [[ -n "$dry_run" ]]; then
    note "every $poll s, until the pod is ACTIVE and its node READY:"
    print_questions
    return
  fi
  while true; do
    now="$(pod_state)"
    [[ "$now" == "$before" ]] || note "$name: $now"
    before="$now"
    [[ "$now" != ACTIVE ]] || return 0
    if is_over "$now"; then
      printf '%s: The pod %s is %s; create it (again).\n' \
        "${0##*/}" "$name" "$now" >&2
      return 1
    fi
    sleep "$poll"
  done
}

print_questions() {
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format="value(state.state)"
  run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    --format="value(state)"
}

# Makes a pod that was taken away anew, and starts the run on it.
resume() {
  local now
  if [[ -n "$dry_run" ]]; then
    note "if the pod was taken away:"
    delete
    note "if there is none (any more):"
    create
    note "in any case:"
    setup
    start
    return
  fi
  now="$(pod_state)"
  # Nothing can be made while the old one is on its way out.
  while [[ "$now" =~ ^(SUSPENDING|DELETING|UNKNOWN)$ ]]; do
    sleep "$poll"
    now="$(pod_state)"
  done
  if is_over "$now"; then
    if [[ "$now" != NONE ]]; then
      delete || return
    fi
    create || return
  fi
  setup || return
  start
}

# What the workers' lines mean together, in one word. Processes depend on each
# other: one that was told to save (75) or found a stuck peer (76) ends the rest
# with whatever code, so those reasons come first.
verdict() {
  local codes
  codes=" $(sed -n 's/^worker [^ ]* //p' <<<"$1" | tr '\n' ' ')"
  case "$codes" in
    " ") echo silent ;;
    *" exit 2 "*) echo wrong ;;
    *" exit 130 "*) echo interrupted ;;
    *running*exit* | *exit*running* | *running*lost* | *lost*running*)
      echo mixed
      ;;
    *running*) echo running ;;
    *" exit 75 "* | *" exit 76 "* | *lost*) echo again ;;
    *" exit "[1-9]*) echo crashed ;;
    *) echo finished ;;
  esac
}

# Sets `now`, the pod's state, and `said`, the run's, of the caller.
look() {
  local before="$now $said" answers
  now="$(pod_state)"
  if [[ "$now" == ACTIVE ]]; then
    answers="$(workers status)" || answers=""
    said="$(verdict "$answers")"
  elif is_over "$now"; then
    said=gone
  else
    said=waiting
  fi
  [[ "$now $said" == "$before" ]] || note "$name: $now, the run: $said"
}

watch() {
  local now="" said="" failures=0 up=0 odd=0 pause="$back_off"
  if [[ -n "$dry_run" ]]; then
    print_watch
    return
  fi
  while true; do
    look
    # Workers end one after the other, and ssh fails now and then: these are
    # acted upon when they last for three looks.
    case "$said" in
      mixed | silent) odd=$((odd + 1)) ;;
      *) odd=0 ;;
    esac
    if ((odd == 3)); then
      workers stop || true
      said=again
    fi
    case "$said" in
      finished)
        [[ -z "$delete_when_done" ]] || delete
        return
        ;;
      wrong)
        workers log "$lines" || true
        workers stop || true
        fail "A setting is wrong (exit code 2): see above. The pod remains."
        ;;
      interrupted)
        note "Stopped by Ctrl-C on a worker. The pod remains."
        return 130
        ;;
      running)
        up=$((up + 1))
        # It stays up: what went wrong before is forgiven.
        ((up < 10)) || { failures=0 && pause="$back_off"; }
        ;;
      again | crashed | gone)
        up=0
        if [[ "$said" == crashed || "$now" == FAILED ]]; then
          failures=$((failures + 1))
        fi
        if ((failures < max_failures)); then
          sleep "$pause"
          pause=$((pause * 2 < 600 ? pause * 2 : 600))
          if [[ "$said" == gone ]]; then
            resume || failures=$((failures + 1))
          else
            start || failures=$((failures + 1))
          fi
        fi
        if ((failures >= max_failures)); then
          workers log "$lines" || true
          note "$failures failures in a row: given up. The pod remains."
          return 1
        fi
        ;;
    esac
    sleep "$poll"
  done
}

print_watch() {
  note "every $poll s:"
  print_questions
  workers status
  note "if the pod was taken away (SUSPENDED, FAILED, PREEMPTED, gone):"
  resume
  note "if the run ended with 75 or 76, or failed (under $max_failures times):"
  start
  note "if a setting is wrong (2), and then no more:"
  workers log "$lines"
  workers stop
  if [[ -n "$delete_when_done" ]]; then
    note "if it is done (0):"
    delete
  fi
}
