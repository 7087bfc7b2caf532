# Sourced by quickstart.sh and test.sh: makes .venv with pinned versions, once, and activates it.
# Usage: source scripts/setup.sh EXTRA
# With TRANSFORMERS=5.17.0 it is .venv-5.17.0, which has that version and the others where that one takes them.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "shared_bert needs Python 3.11 or newer; $python is $("$python" --version). Name another one with PYTHON=…" >&2
    exit 1
fi
venv=.venv${TRANSFORMERS:+-$TRANSFORMERS}
stamp="$venv/installed-$1-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
    echo "== Setting up $venv with the pinned versions of scripts/constraints.txt (a minute or more, once)"
    "$python" -m venv "$venv"
    if [ -n "${TRANSFORMERS:-}" ]; then
        grep -v -e '^transformers==' -e '^huggingface_hub==' scripts/constraints.txt >"$venv/constraints.txt"
        echo "transformers==$TRANSFORMERS" >>"$venv/constraints.txt"
    else
        cp scripts/constraints.txt "$venv/constraints.txt"
    fi
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$venv/constraints.txt" --config-settings editable_mode=compat --editable ".[$1]"
    touch "$stamp"
fi
source "$venv/bin/activate"
