# shellcheck shell=bash
# What the launchers share. They are bash, as old as the 3.2 of macOS.

# A mistake of the user: one sentence, and status 2.
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# The comment at the head of a launcher is its help.
usage() {
  sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
}

# need --option [value ...]: the value is there.
need() {
  if [ $# -lt 2 ] || [ "$2" = -- ]; then
    fail "$1 needs a value"
  fi
}

# require --option value: the option was given.
require() {
  [ -n "$2" ] || fail "$1 is missing; see --help"
}

# count --option value minimum: a whole number, large enough.
count() {
  case $2 in
    '' | *[!0-9]* | 0[0-9]*) fail "$1 must be a whole number, and is '$2'" ;;
  esac
  [ "$2" -ge "$3" ] || fail "$1 must be at least $3, and is $2"
}

# Finds a mistake here that djpq would find at the end of a queue, or that
# would cost the run what it saved.
check_arguments() {
  local argument config='' workdir=''
  local where='where the arguments of djpq train go'
  for argument in "$@"; do
    case $argument in
      --config | --config=*) config=1 ;;
      --workdir | --workdir=*) workdir=1 ;;
      --o*) fail '--overwrite begins anew at each start; delete the workdir' ;;
    esac
  done
  [ -n "$config" ] || fail "--config is missing after --, $where"
  [ -n "$workdir" ] || fail "--workdir is missing after --, $where"
}

# The words of a command, quoted for any shell; printf %q is for bash alone.
quoted() {
  local word space=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*)
        word=$(printf '%s.' "$word" | sed "s/'/'\\\\''/g")
        word="'${word%.}'"
        ;;
    esac
    printf '%s' "$space$word"
    space=' '
  done
}

# Runs a command, or only prints it.
run() {
  # shellcheck disable=SC2154  # the launcher sets dry_run
  if [ -n "$dry_run" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# restarting N command ...: starts it again, N times at most, unless it ends
# with status 0 (done), 2 (what no restart mends) or 130 (somebody stopped it),
# or we are asked to stop. The command goes on where the run was saved.
restarting() {
  local left=$1 status stopped=
  shift
  trap 'stopped=1; when_stopped' INT TERM
  while :; do
    status=0
    "$@" || status=$?
    case $status in 0 | 2 | 130) break ;; esac
    if [ -n "$stopped" ] || [ "$left" -eq 0 ]; then
      break
    fi
    left=$((left - 1))
    echo "${0##*/}: ended with status $status, starts again;" \
      "restarts left: $left" >&2
  done
  return "$status"
}

# A launcher that has to pass the signal on defines its own.
when_stopped() { :; }
