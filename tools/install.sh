#!/bin/sh
# Install the package with what is given ("." or ".[dev]") into $VENV, without CUDA packages where there is no GPU.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kexue needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2; exit 2; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# On Linux the default build of torch brings gigabytes of CUDA packages. Without an NVIDIA driver take the CPU build, when
# one of the configured package indexes offers it.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && ! command -v nvidia-smi >/dev/null 2>&1; then
  if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null && ! pip install -q -c constraints.txt "torch==$torch+cpu" 2>/dev/null; then
    echo "warning: the configured package index has no CPU build of torch $torch; its default build brings CUDA packages." >&2
    echo "         To avoid them, add PyTorch's CPU index to pip (PIP_EXTRA_INDEX_URL) and run this again." >&2
  fi
fi
pip install -q -c constraints.txt -e "$1"
