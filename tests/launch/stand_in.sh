#!/usr/bin/env bash
# Stands in for gcloud, git, srun and the like. The test links it into a folder
# under their names, with a file `script` beside it that says, line by line,
# which calls are to come and what is answered:
#
#   what the call must contain <TAB> exit code <TAB> answer
#
# Words of the first column are separated by spaces and found in this order.
# `calls` gets every call, `wrong` one that the script does not say.
set -euo pipefail
folder="${0%/*}"
call="${0##*/} $*"
printf '%s\n' "$call" >>"$folder/calls"
mapfile -t calls <"$folder/calls"
mapfile -t script <"$folder/script"
number="${#calls[@]}"
IFS=$'\t' read -r words code answer <<<"${script[number - 1]-}" || true
# shellcheck disable=SC2254
case "$call" in
  ${words// /*}*) ;;
  *)
    printf 'call %s: %s\n' "$number" "$call" >>"$folder/wrong"
    kill -KILL 0 # What called it, too: it might go on for ever.
    ;;
esac
# An answer for people goes where a failing command writes it.
if ((code)); then
  [[ -z "$answer" ]] || printf '%b\n' "$answer" >&2
else
  [[ -z "$answer" ]] || printf '%b\n' "$answer"
fi
exit "$code"
