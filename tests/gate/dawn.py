"""Asking Dawn, the WebGPU implementation of Chrome, whether it accepts WGSL (npm package ``webgpu`` under node)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from luthier.codegen.gpu.wgsl import Shader

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "build" / "web" / "node_modules" / "webgpu" / "index.js"


def missing() -> str | None:
    """Why Dawn cannot be asked here, or None."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not MODULE.exists():
        return "npm package webgpu is missing: python benchmarks/setup_web.py --tests"
    return None


def refused(shaders: Sequence[Shader]) -> dict[str, str]:
    """{shader name: Dawn's message} of the shaders that it does not accept, in one process."""
    src = json.dumps([{"name": s.name, "source": s.text()} for s in shaders])
    cmd = ["node", str(Path(__file__).with_name("dawn.mjs")), str(MODULE)]
    r = subprocess.run(cmd, input=src, capture_output=True, text=True, timeout=120)
    if r.returncode != 0:
        raise RuntimeError(f"dawn.mjs: {r.stderr.strip()}")
    return {x["name"]: x["error"] for x in json.loads(r.stdout) if x["error"]}
