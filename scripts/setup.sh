# Sourced by quickstart.sh and test.sh: makes .venv with pinned versions, once, and activates it.
# Usage: source scripts/setup.sh EXTRA

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "shared_bert needs Python 3.11 or newer; $python is $("$python" --version). Name another one with PYTHON=…" >&2
    exit 1
fi
stamp=".venv/installed-$1-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
    echo "== Setting up .venv with the pinned versions of scripts/constraints.txt (a minute or more, once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check --constraint scripts/constraints.txt --config-settings editable_mode=compat --editable ".[$1]"
    touch "$stamp"
fi
source .venv/bin/activate
