"""The npm package of a model for the web: a folder that any static server can show and any bundler can take.

===============================  ====================================================================================
``package.json``                 name, entry point, types
``index.js``, ``index.d.ts``     the API, typed for this model's inputs and outputs
``files.js``                     the addresses of all files below, in the words by which bundlers find them
``index.html``                   a page that loads the model and runs it
``runtime/``                     JavaScript that does not depend on the model (``codegen/web_runtime``)
``model.VARIANT.wasm``           code of a wasm package, one file a variant; the loader takes the best that the browser knows
``program.js, shaders.json``     code of a webgpu package
``weights.NNN.bin``              shards of the constants; SHA-256 of each in ``manifest.json``
===============================  ====================================================================================

The interface between this folder and the code generators is ``docs/web.md``.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from luthier.backends.native import DTYPES
from luthier.errors import ArtifactError

__all__ = ["ENGINES", "SHARD_MB", "read_weights", "write_package"]

SHARD_MB = 24.0
COMMENTS = re.compile(r"^ *(/\*\*.*?\*/|//[^\n]*)\n", re.M | re.S)  # lines of their own: a sixth of the runtime
TEXTS = {"@huggingface/jinja": "^0.5.0", "@huggingface/tokenizers": "^0.2.0"}  # what language.js imports for chats and texts
Array = np.ndarray[Any, Any]

# what a package carries of the runtime, by the kind of its target
_COMMON = (
    "demo.css", "demo.js", "engine.js", "errors.js", "files.js", "model.js", "platform.js", "sha256.js", "tensors.js", "worker.js",
)  # fmt: skip
_LANGUAGE = ("language.js", "language_demo.js", "sampling.js")  # of a language model
ENGINES: dict[str, tuple[str, ...]] = {"wasm": ("engine_wasm.js", "thread.js"), "webgpu": ("engine_webgpu.js", "gpu_recorder.js")}

_ARRAYS = {
    "float32": "Float32Array", "float64": "Float64Array", "int8": "Int8Array", "uint8": "Uint8Array", "int16": "Int16Array",
    "uint16": "Uint16Array", "int32": "Int32Array", "uint32": "Uint32Array", "int64": "BigInt64Array", "uint64": "BigUint64Array",
    "int4": "Int8Array", "int2": "Int8Array", "float16": "Half", "bfloat16": "Uint16Array",
}  # fmt: skip


def write_package(
    folder: Path, manifest: dict[str, Any], weights: Array, files: Mapping[str, bytes | str | Callable[[], bytes]], shard_mb: float = SHARD_MB,
    extra: Iterable[str] = (),
) -> tuple[str, ...]:
    """All files but ``manifest.json`` into the existing ``folder``; returns their names. ``manifest["web"]`` is set in place.

    ``weights``: the blob, flat ``uint8``; ``files``: generated code by name (a function makes it while shards are written); ``shard_mb``: the most
    10**6 bytes of a shard; ``extra``: names of files that the caller adds; ``manifest["package"]``: name and version for npm.
    Raises ArtifactError for a kind of target without an engine or a shard size below 0.1."""
    kind = manifest["target"]["kind"]
    if kind not in ENGINES:
        raise ArtifactError(f"no web package for targets of kind {kind!r}", hint=f"known: {', '.join(ENGINES)}")
    if not shard_mb >= 0.1:
        raise ArtifactError(f"shards of {shard_mb} MB are too small", hint="--shard-mb takes 0.1 and more")
    names: list[str] = []

    def put(name: str, data: bytes | str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        names.append(name)

    size = max(256, int(shard_mb * 1e6) // 256 * 256)
    starts = range(0, len(weights), size)
    shards: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2) as pool:  # writing and hashing release the interpreter's lock
        written = [pool.submit(_shard, folder, k, at, weights[at : at + size]) for k, at in enumerate(starts)]
        code = {name: data() if callable(data) else data for name, data in files.items()}
        shards += (w.result() for w in written)
    names += (s["file"] for s in shards)
    mark = hashlib.sha256(json.dumps([manifest["inputs"], manifest["outputs"], [s["sha256"] for s in shards]]).encode())
    for name, data in code.items():
        put(name, data)
        mark.update(data.encode() if isinstance(data, str) else data)
    first = next((len(d) for n, d in code.items() if n.endswith((".wasm", "shaders.json"))), 0)
    manifest["web"] = {"id": mark.hexdigest()[:16], "shards": shards, "code_bytes": first}
    source = importlib.resources.files("luthier.codegen.web_runtime")
    language = manifest.get("language")
    for name in (*_COMMON, *ENGINES[kind], *(_LANGUAGE if language else ())):
        text = source.joinpath(name).read_text(encoding="utf-8")
        put(f"runtime/{name}", COMMENTS.sub("", text).lstrip() if name.endswith(".js") else text)
    put("runtime/target.js", f'export {{ Engine }} from "./{ENGINES[kind][0]}";\n')
    page = source.joinpath("language.html" if language else "index.html").read_text(encoding="utf-8")
    put("index.html", page.replace("<title>Model</title>", f"<title>{html.escape(manifest['name'])}</title>"))
    put("index.js", _index_js(manifest["web"]["id"], bool(language)))
    fetched = [n for n in (*code, *extra) if n.endswith((".wasm", "shaders.json", "tokenizer.json"))]
    put("files.js", _files_js(["manifest.json", *fetched, *(s["file"] for s in shards)]))
    put("index.d.ts", _index_d_ts(manifest))
    put("package.json", _package_json(manifest))
    return tuple(names)


def _shard(folder: Path, number: int, offset: int, part: Array) -> dict[str, Any]:
    """Writes one shard; its entry in the manifest."""
    name = f"weights.{number:03d}.bin"
    raw = np.ascontiguousarray(part).data
    (folder / name).write_bytes(raw)
    return {"file": name, "offset": offset, "bytes": part.size, "sha256": hashlib.sha256(raw).hexdigest()}


def read_weights(folder: Path, manifest: Mapping[str, Any]) -> Array:
    """The blob of a package whose files were checked: flat ``uint8``, 64-byte aligned. Raises ArtifactError for a shard that is missing."""
    from luthier.backends.native import aligned

    shards = manifest["web"]["shards"]
    out = aligned(sum(s["bytes"] for s in shards))
    for s in shards:
        try:
            part = np.fromfile(folder / s["file"], np.uint8)
        except OSError as e:
            raise ArtifactError(f"cannot read {folder / s['file']}: {e}") from e
        if part.size != s["bytes"]:
            raise ArtifactError(f"{folder / s['file']} has {part.size} bytes instead of {s['bytes']}", hint="compile the model again")
        out[s["offset"] : s["offset"] + part.size] = part
    return out


def _index_js(mark: str, language: bool) -> str:
    kind, file = ("LanguageModel", "language") if language else ("Model", "model")
    return f"""// Generated: the model's entry point. Everything else is in runtime/ and manifest.json.

import {{ files }} from "./files.js";
import {{ load{kind} }} from "./runtime/{file}.js";

export * from "./runtime/errors.js";
export {{ {kind} }} from "./runtime/{file}.js";

/** Loads the model from the folder `url` (default: the one of this file, or where a bundler has put its files). */
export function load(url, options) {{
  return load{kind}({{ url, files }}, "{mark}", options);
}}
"""


def _files_js(names: Iterable[str]) -> str:
    lines = "\n".join(f'  "{name}": new URL("./{name}", import.meta.url),' for name in names)
    return f"// Generated: where the files of the model are. A bundler copies what is named so, and puts its own addresses here.\n\nexport const files = {{\n{lines}\n}};\n"


def _package_json(manifest: Mapping[str, Any]) -> str:
    about = manifest.get("package", {"name": "model", "version": "1.0.0"})
    return json.dumps(
        {
            **about, "description": f"The model {manifest['name']}, compiled for {manifest['target']['kind']}",
            "type": "module", "main": "./index.js", "types": "./index.d.ts",
            "exports": {".": {"types": "./index.d.ts", "default": "./index.js"}, "./*": "./*"},
            "sideEffects": False, "engines": {"node": ">=20"}, **({"dependencies": TEXTS} if "language" in manifest else {}),
        },
        indent=2,
    ) + "\n"  # fmt: skip


def _array(code: int) -> str:
    return _ARRAYS.get(DTYPES[code][0], "Uint8Array")


def _bare(shape: list[int | str]) -> bool:
    """Whether a typed array alone says the shape: at most one extent is open."""
    return sum(isinstance(e, str) for e in shape) <= 1


def _index_d_ts(manifest: Mapping[str, Any]) -> str:
    def described(p: Mapping[str, Any]) -> dict[str, Any]:
        dtype = DTYPES[p["code"]][0]
        return {
            "name": json.dumps(p["name"]), "about": f"{dtype}[{', '.join(map(str, p['shape']))}]".replace("*/", "* /"),
            "array": _array(p["code"]),
            "shape": "[" + ", ".join(str(e) if isinstance(e, int) else "number" for e in p["shape"]) + "]", "dtype": dtype,
            "bare": _bare(p["shape"]), "optional": "default" in p, "numbers": not dtype.startswith(("bfloat16", "float8")),
        }  # fmt: skip

    env = Environment(loader=PackageLoader("luthier", "templates"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    state = manifest.get("language", {}).get("state", ())
    return env.get_template("index.d.ts.j2").render(
        name=re.sub(r"[^ -~]", "?", manifest["name"]), language="language" in manifest,
        outputs=[described(p) for p in manifest["outputs"]],
        inputs=[described(p) for p in manifest["inputs"] if p["name"] not in state],
    )
