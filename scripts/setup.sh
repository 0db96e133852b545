#!/usr/bin/env bash
# Make (or complete) the environment in .venv: Python, torch, the packages of requirements.lock, Rolecall itself.
# Does nothing, in milliseconds, when all of that is there for this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch="torch==2.13.0"
uv="uv==0.13.9"
stamp=.venv/.rolecall-setup
# The checkout's path is part of the key: an environment that was moved or copied is set up anew.
key="$(cat requirements.lock pyproject.toml scripts/setup.sh <(pwd) | sha256sum | cut -d' ' -f1)"
[[ -f $stamp && -x .venv/bin/python && $(<"$stamp") == "$key" ]] && exit 0

say() { printf '\033[1m[set-up %3ds]\033[0m %s\n' "$SECONDS" "$*" >&2; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python python3.12}; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    say "Rolecall needs Python 3.11 (3.12 works too); none was found. Install it, or name it: make PYTHON=/path/to/python3.11"
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    say "new environment .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || {
        say "Python's venv module is incomplete here. On Debian and Ubuntu: apt install python3.11-venv"
        exit 1
    }
fi
rm -f "$stamp"
if ! .venv/bin/python -c 'import sys; from importlib.metadata import version; sys.exit(version("torch").split("+")[0] != sys.argv[1])' \
    "${torch#*==}" 2>/dev/null || ! .venv/bin/uv --version >/dev/null 2>&1; then
    say "$torch and $uv, with pip: the longest part, some minutes on a slow line"
    .venv/bin/python -m pip install --disable-pip-version-check "$torch" "$uv"
fi
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" VIRTUAL_ENV="$PWD/.venv"
say "$(grep -c '==' requirements.lock) packages of requirements.lock, with uv"
# Without dependencies: the lock is complete, and so nothing can bring another torch. Compiled here, once, because a run starts many
# processes at a time, each of which would else compile torch for itself.
.venv/bin/uv pip install --quiet --no-deps --compile-bytecode --python .venv/bin/python -r requirements.lock
say "Rolecall itself, from this folder"
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation --python .venv/bin/python -e .
echo "$key" >"$stamp"
say "ready"
