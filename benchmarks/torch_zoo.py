"""66 architectures of torchvision, timm and transformers with random weights, exported and compiled, against eager.

    python benchmarks/torch_zoo.py [NAME ...] [--json FILE] [--report FILE]

Configurations are small and nothing is fetched. Batches, and lengths of texts, are open where torch exports them open: one compile then runs
several. A model passes when all outputs are within 1e-4 of eager, relative to the largest element of each. Results are kept in the
JSON-lines file, and a later run goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

import luthier

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "torch_zoo.jsonl"
TOLERANCE = 1e-4
BATCH, LENGTH = 2, 12  # of the export; 0 and 1 are sizes that torch takes as fixed
CALLS = ((2, 12), (3, 12), (1, 7), (4, 20))
VISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet lraspp_mobilenet_v3_large mobilenet_v2 mobilenet_v3_small resnet18 resnet50 "
    "resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t vgg11_bn vit_b_16 wide_resnet50_2"
).split()
TIMM = (
    "botnet26t_256 cait_xxs24_224 convmixer_768_32 deit_tiny_patch16_224 edgenext_xx_small fastvit_t8 ghostnet_100 hiera_tiny_224 levit_128s "
    "mixer_s16_224 mobilevit_s nfnet_l0 pvt_v2_b0 repvgg_a0 xcit_nano_12_p16_224"
).split()
LANGUAGE = (
    "albert bart bert bloom clip deberta-v2 depth_anything detr dinov2 distilbert electra falcon gemma2 gpt2 gpt_neox granitemoe llama mamba "
    "mixtral modernbert mpnet opt phi3 qwen2 qwen3 roberta segformer siglip swin2sr t5 vit wav2vec2 whisper yolos"
).split()
Inputs = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]  # of a batch and a length: arguments and keywords


def vision(name: str) -> tuple[Any, Inputs]:
    import torchvision

    f = getattr(torchvision.models, name, None) or getattr(torchvision.models.segmentation, name)
    extra: dict[str, Any] = {"googlenet": {"init_weights": False}, "lraspp_mobilenet_v3_large": {"weights_backbone": None}}.get(name, {})
    return f(weights=None, **extra), lambda n, _: ((torch.randn(n, 3, 224, 224),), {})


def timm_model(name: str) -> tuple[Any, Inputs]:
    import timm

    m = timm.create_model(name, pretrained=False)
    return m, lambda n, _: ((torch.randn(n, *m.default_cfg["input_size"]),), {})


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = SMALL | {"vocab_size": 200, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
ENCODERS = {"albert", "bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "modernbert"}
TEXTS: dict[str, dict[str, Any]] = {
    "albert": TEXT | {"embedding_size": 32},
    "bart": {"d_model": 64, "vocab_size": 200, "max_position_embeddings": 64}
    | {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 200, "max_position_embeddings": 64},
    "electra": TEXT | {"embedding_size": 32},
    "falcon": GROUPED, "granitemoe": GROUPED, "llama": GROUPED, "mixtral": GROUPED, "qwen2": GROUPED,
    "gemma2": GROUPED | {"head_dim": 16}, "qwen3": GROUPED | {"head_dim": 16}, "phi3": GROUPED | {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200, "state_size": 8},
    "modernbert": TEXT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "vocab_size": 200,
            "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 200},
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "vit": SMALL | {"image_size": 64, "patch_size": 16}, "dinov2": SMALL | {"image_size": 64, "patch_size": 16},
    "yolos": SMALL | {"image_size": [64, 64], "num_detection_tokens": 10}, "segformer": {},
    "swin2sr": {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8},
}  # fmt: skip


def ids(n: int, length: int) -> Any:
    return torch.randint(3, 200, (n, length))


def language(name: str) -> tuple[Any, Inputs]:
    import transformers as t

    if name in IMAGES:
        size = 32 if name == "swin2sr" else 64
        m = t.AutoModel.from_config(t.AutoConfig.for_model(name, **IMAGES[name]))
        return m, lambda n, _: ((torch.randn(n, 3, size, size),), {})
    if name in ("clip", "siglip"):
        text = TEXT | {"projection_dim": 32, "bos_token_id": 0, "eos_token_id": 1}
        picture = SMALL | {"image_size": 64, "patch_size": 16, "projection_dim": 32}
        m = t.AutoModel.from_config(t.AutoConfig.for_model(name, text_config=text, vision_config=picture, projection_dim=32))
        return m, lambda n, length: ((), {"input_ids": ids(n, length), "pixel_values": torch.randn(n, 3, 64, 64)})
    sides = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}
    if name == "depth_anything":
        backbone = t.Dinov2Config(image_size=56, patch_size=14, out_features=["stage1", "stage2"], reshape_hidden_states=False, **SMALL)
        c = t.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=64, reassemble_factors=[2, 1], neck_hidden_sizes=[16, 32], fusion_hidden_size=16,
            head_in_channels=16,
        )  # fmt: skip
        return t.DepthAnythingForDepthEstimation(c), lambda n, _: ((torch.randn(n, 3, 56, 56),), {})
    if name == "detr":
        backbone = t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
        c = t.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64, num_queries=10, **sides)
        return t.DetrModel(c), lambda n, _: ((torch.randn(n, 3, 64, 64),), {})
    if name == "whisper":
        c = t.WhisperConfig(
            d_model=64, vocab_size=200, max_source_positions=50, max_target_positions=32, num_mel_bins=20, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, **sides,
        )  # fmt: skip
        return t.WhisperModel(c), lambda n, length: ((), {"input_features": torch.randn(n, 20, 100), "decoder_input_ids": ids(n, length), "use_cache": False})
    if name == "wav2vec2":
        c = t.Wav2Vec2Config(**SMALL, conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
        return t.Wav2Vec2Model(c), lambda n, length: ((torch.randn(n, 4000 + 320 * (length - LENGTH)),), {})
    m = t.AutoModel.from_config(t.AutoConfig.for_model(name, **TEXTS.get(name, TEXT)))

    def inputs(n: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        words: dict[str, Any] = {"input_ids": ids(n, length)}
        if name in ("t5", "bart"):
            words["decoder_input_ids"] = ids(n, length)
        return (), words | ({} if name in ENCODERS else {"use_cache": False})

    return m, inputs


def build(name: str) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    m, inputs = (vision if name in VISION else timm_model if name in TIMM else language)(name)
    return m.eval(), inputs


def opened(x: Any) -> Any:
    """Every dimension left to torch: it finds which stay open."""
    return pytree.tree_map(lambda t: dict.fromkeys(range(t.dim()), Dim.AUTO) if isinstance(t, torch.Tensor) else None, x)


def fits(program: Any, args: Any, kwargs: Any) -> bool:
    """Whether the sizes of these arguments are those that the export left open."""
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    taken = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    taken = [v for v in taken if isinstance(v, torch.Tensor)]
    return all(not isinstance(e, int) or e == s for t, v in zip(given, taken, strict=True) for s, e in zip(t.shape, v.shape, strict=True))


def check(name: str) -> dict[str, Any]:
    """{'model', 'status': pass, wrong, refused, crash, no-export, 'error', 'shapes': calls of one compile, 'export_s', 'compile_s'}."""
    row: dict[str, Any] = {"model": name, "why": ""}
    try:
        model, inputs = build(name)
        args, kwargs = inputs(BATCH, LENGTH)
        begin = time.perf_counter()
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=opened(args) or opened(kwargs), strict=False)
        row["export_s"] = round(time.perf_counter() - begin, 1)
    except Exception as error:  # torch's own refusals, of many types
        return row | {"status": "no-export", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        begin = time.perf_counter()
        compiled = luthier.compile(program)
        row["compile_s"] = round(time.perf_counter() - begin, 1)
        worst, shapes = 0.0, []
        for n, length in CALLS:
            args, kwargs = inputs(n, length)
            if not fits(program, args, kwargs):
                continue
            with torch.no_grad():
                want = pytree.tree_leaves(model(*args, **kwargs))
            got = pytree.tree_leaves(compiled(*args, **kwargs))
            for a, b in zip(got, want, strict=True):
                if isinstance(b, torch.Tensor):
                    worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)))
            shapes.append([n, length])
        return row | {"status": "pass" if worst < TOLERANCE else "wrong", "error": worst, "shapes": shapes}
    except luthier.LuthierError as error:
        return row | {"status": "refused", "why": str(error)[:400]}
    except Exception as error:
        return row | {"status": "crash", "why": f"{type(error).__name__}: {error}"[:400]}


def report(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    good = sum(r["status"] == "pass" for r in rows)
    several = sum(len(r.get("shapes", ())) > 1 for r in rows)
    lines = [
        "# Architectures in torch", "",
        f"torch {torch.__version__}; random weights, small configurations of the language models; `python benchmarks/torch_zoo.py --report`.", "",
        f"{good} of {len(rows)} within {TOLERANCE:g} of eager; {several} of them with several batches or lengths from one compile.", "",
        "| model | status | error | batch x length, one compile | export s | compile s | why |", "|---|---|---:|---|---:|---:|---|",
    ]  # fmt: skip
    for r in rows:
        calls = ", ".join(f"{n}" if r["model"] in VISION + TIMM else f"{n} x {k}" for n, k in r.get("shapes", ()))
        error = f"{r['error']:.1e}" if "error" in r else ""
        why = r["why"].splitlines()[0][:200].replace("|", "/") if r["why"] else ""
        lines.append(f"| {r['model']} | {r['status']} | {error} | {calls} | {r.get('export_s', '')} | {r.get('compile_s', '')} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, default=KEPT)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    schemas = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):  # torchvision beside a torch without its extension asks for them
        schemas.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    names = args.names or VISION + TIMM + LANGUAGE
    args.json.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() and not args.names else []
    done = {r["model"]: r for r in kept}
    for name in names:
        if name in done:
            continue
        done[name] = check(name)
        gc.collect()
        if args.names:
            print(done[name], flush=True)
        else:
            with args.json.open("a") as f:
                f.write(json.dumps(done[name]) + "\n")
    rows = [done[n] for n in names]
    print(report(rows).splitlines()[4])
    if args.report:
        args.report.write_text(report(rows))
    return int(any(r["status"] != "pass" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
