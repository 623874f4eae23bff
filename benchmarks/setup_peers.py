"""Makes the environment `.venv-peers`: torch and the runtimes that Luthier is measured against, apart from its own.

    python benchmarks/setup_peers.py [--python PATH]

`LUTHIER_PEERS_PYTHON` names another environment's interpreter instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Two installs: apache-tvm's own metadata asks for a newer tvm-ffi, with which MetaSchedule crashes.
INSTALLS = (
    (
        "torch==2.13.0",
        "numpy==2.4.6",
        "onnx==1.23.2",
        "onnxscript==0.7.2",
        "onnxruntime==1.32.0",
        "openvino==2026.4.1",
        "safetensors",
        "pillow",
        "setuptools",
    ),
    ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"),
    ("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0"),
)


def peers_python(create: bool = False) -> str:
    """The interpreter of the peers' environment, made first if `create`. Raises RuntimeError when there is none."""
    named = os.environ.get("LUTHIER_PEERS_PYTHON")
    path = Path(named) if named else ROOT / ".venv-peers" / "bin" / "python"
    if path.exists():
        return str(path)
    if not create or named:
        raise RuntimeError(f"no interpreter at {path}: run python benchmarks/setup_peers.py, or set LUTHIER_PEERS_PYTHON")
    install(sys.executable)
    return str(path)


def install(base: str) -> None:
    """Creates the environment with the interpreter `base`. Raises subprocess.CalledProcessError when a step fails."""
    folder = ROOT / ".venv-peers"
    if not (folder / "bin" / "python").exists():
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    for packages in INSTALLS:
        print("installing", *packages, flush=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages], check=True)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to base it on (3.11)")
    install(parser.parse_args().python)


if __name__ == "__main__":
    main()
