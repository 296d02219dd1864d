# Sourced, not run: a virtual environment with hafrm_ds in it, first on PATH.
#
#   source launch/environment.sh "EXTRAS"      EXTRAS as in pip install -e .[EXTRAS], or ""
#
# The environment is .venv in the repository, or the folder named by HAFRM_VENV; one that is there is used again.
# A torch that the found python already has is left alone and used; otherwise torch 2.13.0 is installed.
# Nothing is installed when neither setup.py nor the extras have changed since the last time.

hafrm_environment() {
    local extras="$1" root venv python="" candidate packages own command package version missing=()
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${HAFRM_VENV:-$root/.venv}"
    [[ "$venv" == /* ]] || venv="$PWD/$venv" # the caller may change its folder, and PATH would lead nowhere

    # What pip cannot bring, checked first and named together.
    for candidate in "$venv/bin/python" python3 python python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [[ -z "$python" ]]; then
        missing+=("python 3.11 or newer (Debian: python3)")
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("python's venv module (Debian: python3-venv)")
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
            missing+=("the header Python.h of $python (Debian: python3-dev)")
    fi
    # DeepSpeed compiles its communication op at the first start.
    command -v g++ >/dev/null || command -v c++ >/dev/null || missing+=("a C++ compiler (Debian: build-essential)")
    if ((${#missing[@]})); then
        echo "hafrm_ds needs, and this machine does not have:" >&2
        printf '  - %s\n' "${missing[@]}" >&2
        return 1
    fi

    if [[ ! -x "$venv/bin/python" ]]; then
        echo "making the virtual environment $venv"
        "$python" -m venv "$venv" || return 1
        if "$python" -c 'import torch' 2>/dev/null; then
            # A .pth file, not --system-site-packages: it also works when that python is itself a virtual environment.
            packages="$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')"
            own="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
            echo "using the torch that is installed in $packages"
            echo "$packages" >"$own/installed-torch.pth"
        fi
    fi
    export PATH="$venv/bin:$PATH"
    export VIRTUAL_ENV="$venv"

    # First line: what was installed from where; further lines: the sets of extras that came with it.
    local stamp="$venv/hafrm_ds-installed" state
    state="$({ echo "$root"; cat "$root/setup.py"; } | cksum)"
    if [[ "$(head -n 1 "$stamp" 2>/dev/null)" == "$state" ]] && grep -qxF "extras: $extras" "$stamp"; then
        return 0
    fi
    echo "installing hafrm_ds${extras:+ with the extras $extras} into $venv (minutes at the first time)"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        "${pip[@]}" torch==2.13.0 || return 1
    fi
    # The constraint keeps pip from replacing the torch that is there; a torch that is too old gives pip's own message.
    echo "torch==$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')" \
        >"$venv/torch-constraint.txt"
    "${pip[@]}" --constraint "$venv/torch-constraint.txt" --editable "$root${extras:+[$extras]}" || return 1
    # One that lies beside the found torch satisfies pip, but its command is not on PATH or runs under the other python.
    for command in deepspeed ninja lint-imports; do
        [[ -x "$venv/bin/$command" ]] && continue
        package="${command/lint-imports/import-linter}" # of the extra "test": may not be there
        version="$("$venv/bin/python" -c "from importlib.metadata import version; print(version('$package'))" \
            2>/dev/null)" || continue
        "${pip[@]}" --ignore-installed --no-deps "$package==$version" || return 1
    done
    [[ "$(head -n 1 "$stamp" 2>/dev/null)" == "$state" ]] || echo "$state" >"$stamp"
    printf 'extras: \nextras: %s\n' "$extras" >>"$stamp"  # any set of extras serves a caller that needs none
}

hafrm_environment "${1:-}" || return 1
