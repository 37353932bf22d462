# One Python environment for every script here. Source it; it ends with the environment's programs first on PATH.
#
#   LEAD_ENGINE_VENV   where the environment lies (default: .venv in the repository's root)
#   PYTHON             the interpreter that a new environment is made with (default: python3; 3.11 or newer)
#   LEAD_ENGINE_CONSTRAINTS   a file of versions in place of constraints.txt, from the repository's root. The oldest:
#       LEAD_ENGINE_CONSTRAINTS=constraints-oldest.txt LEAD_ENGINE_VENV=.venv-oldest PYTHON=python3.12 scripts/test.sh
#
# The versions are those of constraints.txt, but a torch that the environment already has is kept, whatever its version
# and build (CPU, CUDA, ROCm); with LEAD_ENGINE_CONSTRAINTS they are those of the file, torch's too. A new environment
# gets the build that pip's configuration offers; on a machine without a GPU,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/quickstart.sh
# spares the download of the CUDA libraries.

LEAD_ENGINE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
LEAD_ENGINE_VENV="${LEAD_ENGINE_VENV:-$LEAD_ENGINE_ROOT/.venv}"
export LEAD_ENGINE_ROOT LEAD_ENGINE_VENV
_lead_engine_pins="${LEAD_ENGINE_CONSTRAINTS:-constraints.txt}"
[ "${_lead_engine_pins#/}" != "$_lead_engine_pins" ] || _lead_engine_pins="$LEAD_ENGINE_ROOT/$_lead_engine_pins"

_lead_engine_fail() {
    echo "error: $*" >&2
    return 1
}

_lead_engine_make_venv() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || { _lead_engine_fail "$python: not found; set PYTHON to Python 3.11 or newer"; return 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { _lead_engine_fail "$python is $("$python" -V 2>&1); set PYTHON to Python 3.11 or newer"; return 1; }
    echo "making the environment $LEAD_ENGINE_VENV"
    "$python" -m venv "$LEAD_ENGINE_VENV" ||
        { _lead_engine_fail "python -m venv failed; on Debian or Ubuntu: apt install python3-venv"; return 1; }
}

# What the installed state depends on. Different when a dependency, a pin, the interpreter or the checkout's place changes.
_lead_engine_state() {
    "$LEAD_ENGINE_VENV/bin/python" - "$LEAD_ENGINE_ROOT" "$_lead_engine_pins" <<'PYTHON'
import hashlib, pathlib, sys
root, pins = map(pathlib.Path, sys.argv[1:])
parts = [str(root).encode(), sys.version.encode(), (root / "pyproject.toml").read_bytes(), pins.read_bytes()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

# The file of versions; constraints.txt with torch and triton as they are installed, if torch is.
_lead_engine_constraints() {
    if [ -n "${LEAD_ENGINE_CONSTRAINTS:-}" ]; then
        cat "$_lead_engine_pins"
        return
    fi
    "$LEAD_ENGINE_VENV/bin/python" - "$_lead_engine_pins" <<'PYTHON'
import importlib.metadata, pathlib, re, sys
kept = {}
for name in ("torch", "triton"):
    try:
        kept[name] = importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        pass
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    name = re.split("==", line)[0]
    print(f"{name}=={kept[name]}" if "torch" in kept and name in kept else line)
PYTHON
}

_lead_engine_install() {
    local stamp="$LEAD_ENGINE_VENV/.lead-engine-installed" state constraints quiet=""
    [ -t 1 ] || quiet="-qq" # progress bars are for people
    [ -x "$LEAD_ENGINE_VENV/bin/python" ] || _lead_engine_make_venv || return 1
    state="$(_lead_engine_state)" || return 1
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return 0
    fi
    echo "installing lead-engine and its dependencies into $LEAD_ENGINE_VENV (minutes the first time)"
    constraints="$(mktemp)"
    _lead_engine_constraints >"$constraints" &&
        "$LEAD_ENGINE_VENV/bin/python" -m pip install $quiet --disable-pip-version-check \
            -c "$constraints" -e "$LEAD_ENGINE_ROOT[dev]" || {
        rm -f "$constraints"
        _lead_engine_fail "installing failed (pip's message is above); nothing was run"
        return 1
    }
    rm -f "$constraints"
    echo "$state" >"$stamp.new" && mv "$stamp.new" "$stamp"
}

[ -r "$_lead_engine_pins" ] || {
    _lead_engine_fail "LEAD_ENGINE_CONSTRAINTS=$LEAD_ENGINE_CONSTRAINTS: no such file in $LEAD_ENGINE_ROOT"
    return 1 2>/dev/null || exit 1
}
_lead_engine_install || { return 1 2>/dev/null || exit 1; }
export PATH="$LEAD_ENGINE_VENV/bin:$PATH"
