#!/usr/bin/env bash
# Lint, types and the default tests: all three run, whatever fails; the exit status is that of the whole.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0
for part in lint types; do
    printf '\033[1m== %s\033[0m\n' "$part"
    make --no-print-directory "$part" || { failed=1; echo "== $part FAILED"; }
done
printf '\033[1m== tests\033[0m\n'
.venv/bin/python -m pytest "$@" || failed=1
exit $failed
