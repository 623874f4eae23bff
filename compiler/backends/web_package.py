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


_MODEL_D_TS = """export class Model {
  readonly name: string;
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  readonly info: Info;
  /** `into`: arrays that take the data of outputs, in place of new ones. */
  run(inputs: Inputs, options?: { into?: Arrays }): Promise<Outputs>;
  run<Name extends keyof Outputs>(inputs: Inputs, options: { outputs: Name[]; into?: Arrays }): Promise<Pick<Outputs, Name>>;
  /** wasm without a worker: arrays over the model's own memory, which run() does not copy. `shapes`: of inputs with open extents. */
  views(shapes?: { [Name in keyof Inputs]?: number[] }): Promise<Views>;
  close(): Promise<void>;
}

export type Arrays = { [Name in keyof Outputs]?: Outputs[Name]["data"] };
export type Views = { [Name in keyof Inputs]: Extract<Inputs[Name], { data: unknown }>["data"] };

/** Loads the model from the folder `url` (default: the one of this file). */
export function load(url?: string | URL, options?: LoadOptions): Promise<Model>;
"""

_LANGUAGE_D_TS = """export interface Tokenizer {
  /** `first`: the text begins a sequence. */
  encode(text: string, first?: boolean): number[];
  decode(tokens: number[]): string;
}

export interface SamplingOptions {
  /** 0 (default): the most likely token. */
  temperature?: number;
  /** Only the k most likely tokens (default 40; 0: all). */
  topK?: number;
  /** Only the most likely tokens that have this probability together (default 0.95). */
  topP?: number;
  seed?: number;
  /** Default 128. */
  maxTokens?: number;
  /** Tokens that end the text beside the model's own. */
  stop?: number[];
  signal?: AbortSignal;
}

export interface Message {
  role: string;
  content: string;
}

/** One sequence over a cache of `capacity` tokens. */
export class LanguageModel {
  readonly name: string;
  readonly capacity: number;
  readonly vocabulary: number;
  /** Tokens of a prompt that one call takes. */
  readonly chunk: number;
  readonly endTokens: readonly number[];
  readonly info: Info;
  readonly hasTokenizer: boolean;
  /** The sequence in the cache. */
  readonly tokens: number[];
  readonly length: number;
  /** The last token that was decided, where it is not in the cache yet; the next call begins with it. */
  readonly waiting: number[];
  encode(text: string): number[];
  decode(tokens: Iterable<number>): string;
  reset(length?: number): void;
  /** Logits after the last token. */
  feed(tokens: Iterable<number>, options?: { signal?: AbortSignal }): Promise<Float32Array>;
  generateTokens(prompt: Iterable<number>, options?: SamplingOptions): AsyncGenerator<number, void>;
  /** `prompt`: a text that continues the sequence, or a whole conversation, which the model's own template writes. */
  generate(prompt: string | Message[], options?: SamplingOptions): AsyncGenerator<string, void>;
  close(): Promise<void>;
}

/** Loads the model from the folder `url` (default: the one of this file). */
export function load(url?: string | URL, options?: LoadOptions & { tokenizer?: Tokenizer | (new (file: object, config: object) => object) | null; Template?: new (template: string) => { render(values: object): string } }): Promise<LanguageModel>;
"""


def _array(code: int) -> str:
    return _ARRAYS.get(DTYPES[code][0], "Uint8Array")


def _bare(shape: list[int | str]) -> bool:
    """Whether a typed array alone says the shape: at most one extent is open."""
    return sum(isinstance(e, str) for e in shape) <= 1


def _index_d_ts(manifest: Mapping[str, Any]) -> str:
    def shape(p: Mapping[str, Any]) -> str:
        return "[" + ", ".join(str(e) if isinstance(e, int) else "number" for e in p["shape"]) + "]"

    def about(p: Mapping[str, Any]) -> str:
        text = f"{DTYPES[p['code']][0]}[{', '.join(map(str, p['shape']))}]"
        return f"  /** {text.replace('*/', '* /')} */"

    inputs, outputs = [], []
    state = manifest.get("language", {}).get("state", ())
    for p in (p for p in manifest["inputs"] if p["name"] not in state):
        array = _array(p["code"])
        numbers = "" if DTYPES[p["code"]][0].startswith(("bfloat16", "float8")) else " | Numbers"
        bare = f"{array} | " if _bare(p["shape"]) else ""
        mark = "?" if "default" in p else ""
        inputs += [about(p), f"  {json.dumps(p['name'])}{mark}: {bare}TensorLike<{array}, {shape(p)}>{numbers};"]
    for p in manifest["outputs"]:
        outputs += [about(p), f'  {json.dumps(p["name"])}: Tensor<{_array(p["code"])}, {shape(p)}, "{DTYPES[p["code"]][0]}">;']
    lines = "\n".join
    return f"""// Generated for the model {re.sub(r"[^ -~]", "?", manifest["name"])}.

/** A number, or numbers in (nested) arrays. */
export type Numbers = number | bigint | boolean | readonly Numbers[];

/** Where there is no Float16Array, a Uint16Array of the bits. */
export type Half = (typeof globalThis extends {{ Float16Array: {{ prototype: infer T }} }} ? T : never) | Uint16Array;

export interface TensorLike<Data, Shape extends number[]> {{
  data: Data;
  shape: Shape;
}}

export interface Tensor<Data, Shape extends number[], DType extends string> extends TensorLike<Data, Shape> {{
  dtype: DType;
}}

export interface Inputs {{
{lines(inputs)}
}}

export interface Outputs {{
{lines(outputs)}
}}

export interface TensorSpec {{
  readonly name: string;
  readonly dtype: string;
  /** Numbers, or names of extents that a call decides. */
  readonly shape: readonly (number | string)[];
  /** Of an input: a call may leave it out. */
  readonly optional?: true;
}}

export interface Info {{
  backend: "wasm" | "webgpu";
  /** Why the model does not run in a better way. */
  warnings: string[];
  /** wasm: which code was loaded. */
  variant?: "simd" | "relaxed" | "simd-threads" | "relaxed-threads";
  threads?: number;
  crossOriginIsolated?: boolean;
  /** webgpu */
  adapter?: string;
  /** Optional features of WebGPU that are in use. */
  features?: string[];
  pipelines?: number;
  /** How many times the GPU device was lost and the model reloaded. */
  restarts?: number;
  dispatches?: number;
}}

export interface LoadOptions {{
  /** Bytes that have arrived. */
  onProgress?: (progress: {{ loaded: number; total: number }}) => void;
  /** wasm: at most this many threads (default: the processors, at most 8). One where memory cannot be shared. */
  threads?: number;
  /** wasm: fail with IsolationError instead of using one thread. */
  requireThreads?: boolean;
  /** wasm: load this code. */
  variant?: Info["variant"];
  /** webgpu: default "high-performance". */
  powerPreference?: "low-power" | "high-performance";
  /** webgpu: use no optional features ("shader-f16", "subgroups", "packed_4x8_integer_dot_product") but these (default: all there are). */
  features?: string[];
  /** Milliseconds without a byte after which a download fails (default 60000). */
  stall?: number;
  signal?: AbortSignal;
  /** Whether inference lives in a worker (default: in a page yes, else no). */
  worker?: boolean;
}}

{_LANGUAGE_D_TS if 'language' in manifest else _MODEL_D_TS}
export class LuthierError extends Error {{
  /** Stable, such as "WRONG_SHAPE". */
  readonly code: string;
  /** What to do. */
  readonly hint: string;
  readonly details: Record<string, unknown>;
}}
export class InputError extends LuthierError {{}}
export class PackageError extends LuthierError {{}}
export class UnsupportedError extends LuthierError {{}}
export class IsolationError extends LuthierError {{}}
export class DeviceLostError extends LuthierError {{}}
export class OutOfMemoryError extends LuthierError {{}}
export class KernelError extends LuthierError {{}}
export class ClosedError extends LuthierError {{}}
"""
