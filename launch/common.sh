# shellcheck shell=bash
# What the scripts of this folder share; they source it.

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Comments and messages begin with '#', so that a dry run is itself a script.
note() {
  printf '# %s\n' "$1"
}

# The head of a script is its help.
show_help() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$1"
  exit 0
}

whole_number() {
  [[ "$2" =~ ^[0-9]+$ ]] || fail "$1=$2 must be a whole number."
}

# Words as a shell reads them, quoted only where they must be.
quoted() {
  local word line="" apostrophe="'\\''"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/$apostrophe}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n "${dry_run:-}" ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}
