"""Installs what browser tests and `benchmarks/web.py` need from npm into `build/web/node_modules`, which git ignores.

    python benchmarks/setup_web.py [--tests]

`--tests`: what the tests use (370 MB: deno 92, playwright-core 14, Dawn for Node 130, and 130 of bundlers, TypeScript and jsdom), else the
peers as well (0.5 GB). Browsers are the system's (`apt-get install chromium firefox-esr webkit2gtk-driver xvfb`), Node 20 or newer too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "web"
TESTS = {
    "playwright-core": "1.65.1",
    "vite": "8.4.0",
    "webpack": "5.113.0",
    "webpack-cli": "7.3.1",
    "esbuild-loader": "4.5.0",  # TypeScript for webpack
    "esbuild": "0.28.2",
    "typescript": "7.0.2",
    "jsdom": "26.1.0",  # the last one for Node 20
    "deno": "2.9.6",
    "@huggingface/tokenizers": "0.2.0",  # what packages of language models depend on, as the next
    "@huggingface/jinja": "0.5.11",
    "webgpu": "0.6.2",  # Dawn
}
PEERS = {
    "onnxruntime-web": "1.30.0",
    "@tensorflow/tfjs": "4.22.0",
    "@tensorflow/tfjs-backend-wasm": "4.22.0",
    "@tensorflow/tfjs-backend-webgpu": "4.22.0",
    "@jax-js/jax": "0.1.25",
}


def installed(packages: dict[str, str]) -> bool:
    """Whether all are there in these versions."""
    for name, version in packages.items():
        try:
            have = json.loads((FOLDER / "node_modules" / name / "package.json").read_text())["version"]
        except (OSError, ValueError):
            return False
        if have != version:
            return False
    return True


def install(packages: dict[str, str]) -> None:
    """Raises RuntimeError without npm, subprocess.CalledProcessError when npm fails."""
    if installed(packages):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed: apt-get install npm")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "package.json").exists():
        (FOLDER / "package.json").write_text('{"private": true}\n')
    words = [f"{name}@{version}" for name, version in packages.items()]
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", *words], cwd=FOLDER, check=True)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", action="store_true", help="only what the tests need")
    args = parser.parse_args()
    try:
        install(TESTS if args.tests else TESTS | PEERS)
    except (RuntimeError, subprocess.CalledProcessError) as e:
        print(f"setup_web: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
