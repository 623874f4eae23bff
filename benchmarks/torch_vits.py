"""VITS (Kim, Kong, Son 2021), small, in plain torch as piper exports it: text encoder with windowed relative attention, stochastic
duration predictor with spline flows run backwards, length regulation, residual coupling, HiFi-GAN decoder.

Its masks are boolean indices, as in the original, so that the exported file holds NonZero, GatherND and ScatterND of counts that only a
run knows, and RandomNormalLike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativeAttention(nn.Module):
    def __init__(self, c, heads, window=4):
        super().__init__()
        self.h, self.d, self.window = heads, c // heads, window
        self.q, self.k, self.v, self.o = (nn.Conv1d(c, c, 1) for _ in range(4))
        self.rk = nn.Parameter(torch.randn(1, 2 * window + 1, self.d) * self.d**-0.5)
        self.rv = nn.Parameter(torch.randn(1, 2 * window + 1, self.d) * self.d**-0.5)

    def relative(self, e, length):
        pad = torch.clamp(length - (self.window + 1), min=0)
        start = torch.clamp((self.window + 1) - length, min=0)
        e = F.pad(e, (0, 0, pad, pad))
        return e[:, start : start + 2 * length - 1]

    def to_absolute(self, x):
        b, h, n, _ = x.size()
        x = F.pad(x, (0, 1)).view(b, h, n * 2 * n)
        x = F.pad(x, (0, n - 1)).view(b, h, n + 1, 2 * n - 1)
        return x[:, :, :n, n - 1 :]

    def to_relative(self, x):
        b, h, n, _ = x.size()
        x = F.pad(x, (0, n - 1)).view(b, h, n * n + n * (n - 1))
        return F.pad(x, (n, 0)).view(b, h, n, 2 * n)[:, :, :, 1:]

    def forward(self, x, mask):
        b, c, t = x.size()
        length = torch.tensor(t) if not isinstance(t, Tensor) else t
        q, k, v = (f(x).view(b, self.h, self.d, t).transpose(2, 3) for f in (self.q, self.k, self.v))
        s = torch.matmul(q / math.sqrt(self.d), k.transpose(-2, -1))
        s = s + self.to_absolute(torch.matmul(q / math.sqrt(self.d), self.relative(self.rk, length).unsqueeze(0).transpose(-2, -1)))
        p = F.softmax(s.masked_fill(mask == 0, -1e4), dim=-1)
        y = torch.matmul(p, v) + torch.matmul(self.to_relative(p), self.relative(self.rv, length).unsqueeze(0))
        return self.o(y.transpose(2, 3).contiguous().view(b, c, t))


class ChannelNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):
        return F.layer_norm(x.transpose(1, -1), self.gamma.shape, self.gamma, self.beta).transpose(1, -1)


class TextEncoder(nn.Module):
    def __init__(self, n, c, layers):
        super().__init__()
        self.emb, self.c = nn.Embedding(n, c), c
        self.att = nn.ModuleList([RelativeAttention(c, 2) for _ in range(layers)])
        self.n1, self.n2 = (nn.ModuleList([ChannelNorm(c) for _ in range(layers)]) for _ in range(2))
        self.f1 = nn.ModuleList([nn.Conv1d(c, 2 * c, 3, padding=1) for _ in range(layers)])
        self.f2 = nn.ModuleList([nn.Conv1d(2 * c, c, 3, padding=1) for _ in range(layers)])
        self.proj = nn.Conv1d(c, 2 * c, 1)

    def forward(self, ids, lengths):
        x = (self.emb(ids) * math.sqrt(self.c)).transpose(1, 2)
        mask = (torch.arange(x.size(2)).unsqueeze(0) < lengths.unsqueeze(1)).unsqueeze(1).to(x.dtype)
        pair = mask.unsqueeze(2) * mask.unsqueeze(-1)
        x = x * mask
        for a, n1, f1, f2, n2 in zip(self.att, self.n1, self.f1, self.f2, self.n2):
            x = n1(x + a(x, pair))
            x = n2(x + f2(torch.relu(f1(x * mask)) * mask) * mask)
        x = x * mask
        m, logs = torch.split(self.proj(x) * mask, self.c, dim=1)
        return x, m, logs, mask


def spline(x, w, h, d, bound=5.0):
    """Inverse of the unconstrained rational-quadratic spline, with boolean masks as in the original."""
    inside = (x >= -bound) & (x <= bound)
    out = torch.zeros_like(x)
    d = F.pad(d, (1, 1))
    const = math.log(math.exp(1 - 1e-3) - 1)
    d[..., 0] = const
    d[..., -1] = const
    out[~inside] = x[~inside]
    out[inside] = inverse_rq(x[inside], w[inside, :], h[inside, :], d[inside, :], bound)
    return out


def inverse_rq(x, w, h, d, bound, least=1e-3):
    n = w.shape[-1]

    def knots(u):
        u = least + (1 - least * n) * F.softmax(u, dim=-1)
        c = F.pad(torch.cumsum(u, dim=-1), (1, 0))
        c = 2 * bound * c - bound
        c[..., 0] = -bound
        c[..., -1] = bound
        return c, c[..., 1:] - c[..., :-1]

    cw, w = knots(w)
    ch, h = knots(h)
    d = least + F.softplus(d)
    loc = ch.clone()
    loc[..., -1] += 1e-6
    i = (torch.sum(x[..., None] >= loc, dim=-1) - 1)[..., None]
    g = lambda a: a.gather(1, i)[..., 0]  # noqa: E731
    icw, iw, ich, ih, delta = g(cw), g(w), g(ch), g(h), g(h / w)
    d0, d1 = g(d), g(d[..., 1:])
    t = (x - ich) * (d0 + d1 - 2 * delta)
    a = t + ih * (delta - d0)
    b = ih * d0 - t
    c = -delta * (x - ich)
    root = (2 * c) / (-b - torch.sqrt(b * b - 4 * a * c))
    return root * iw + icw


class DDS(nn.Module):
    def __init__(self, c, layers=3):
        super().__init__()
        self.sep = nn.ModuleList([nn.Conv1d(c, c, 3, groups=c, dilation=3**i, padding=3**i) for i in range(layers)])
        self.one = nn.ModuleList([nn.Conv1d(c, c, 1) for _ in range(layers)])
        self.n1, self.n2 = (nn.ModuleList([ChannelNorm(c) for _ in range(layers)]) for _ in range(2))

    def forward(self, x, mask, g=None):
        if g is not None:
            x = x + g
        for s, o, a, b in zip(self.sep, self.one, self.n1, self.n2):
            x = x + F.gelu(b(o(F.gelu(a(s(x * mask))))))
        return x * mask


class ConvFlow(nn.Module):
    def __init__(self, c, bins=10):
        super().__init__()
        self.bins, self.c = bins, c
        self.pre, self.dds, self.proj = nn.Conv1d(1, c, 1), DDS(c), nn.Conv1d(c, 3 * bins - 1, 1)

    def forward(self, x, mask, g):
        x0, x1 = torch.split(x, 1, 1)
        h = self.proj(self.dds(self.pre(x0), mask, g)) * mask
        b, c, t = x0.shape
        h = h.reshape(b, c, -1, t).permute(0, 1, 3, 2)
        n = self.bins
        x1 = spline(x1, h[..., :n] / math.sqrt(self.c), h[..., n : 2 * n] / math.sqrt(self.c), h[..., 2 * n :])
        return torch.cat([x0, x1], 1) * mask


class DurationPredictor(nn.Module):
    def __init__(self, c, flows=3):
        super().__init__()
        self.pre, self.dds, self.proj = nn.Conv1d(c, c, 1), DDS(c), nn.Conv1d(c, c, 1)
        self.flows = nn.ModuleList([ConvFlow(c) for _ in range(flows)])
        self.m, self.logs = nn.Parameter(torch.zeros(2, 1) + 1.0), nn.Parameter(torch.zeros(2, 1) + 0.3)

    def forward(self, x, mask, noise):
        g = self.proj(self.dds(self.pre(x), mask)) * mask
        z = torch.randn(x.size(0), 2, x.size(2)).type_as(x) * noise
        for f in self.flows:
            z = f(torch.flip(z, [1]), mask, g)
        z = (z - self.m) * torch.exp(-self.logs) * mask
        return torch.split(z, 1, 1)[0]


class WN(nn.Module):
    def __init__(self, c, layers=3):
        super().__init__()
        self.c = c
        self.inp = nn.ModuleList([nn.Conv1d(c, 2 * c, 5, padding=2) for _ in range(layers)])
        self.res = nn.ModuleList([nn.Conv1d(c, 2 * c, 1) for _ in range(layers)])

    def forward(self, x, mask):
        out = torch.zeros_like(x)
        for a, r in zip(self.inp, self.res):
            t, s = torch.split(a(x), self.c, 1)
            r0, r1 = torch.split(r(torch.tanh(t) * torch.sigmoid(s)), self.c, 1)
            x, out = (x + r0) * mask, out + r1
        return out * mask


class Coupling(nn.Module):
    def __init__(self, c, hidden):
        super().__init__()
        self.half = c // 2
        self.pre, self.wn, self.post = nn.Conv1d(c // 2, hidden, 1), WN(hidden), nn.Conv1d(hidden, c // 2, 1)

    def forward(self, x, mask):
        x0, x1 = torch.split(x, self.half, 1)
        return torch.cat([x0, (x1 - self.post(self.wn(self.pre(x0) * mask, mask)) * mask) * mask], 1)


class Decoder(nn.Module):
    def __init__(self, c, width=64, rates=(8, 8, 4)):
        super().__init__()
        self.pre = nn.Conv1d(c, width, 7, padding=3)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(width >> i, width >> (i + 1), 2 * r, r, padding=r // 2) for i, r in enumerate(rates)])
        self.res = nn.ModuleList([nn.ModuleList([nn.Conv1d(width >> (i + 1), width >> (i + 1), k, dilation=dl, padding=(k - 1) * dl // 2) for k in (3, 5) for dl in (1, 2)]) for i in range(len(rates))])
        self.post = nn.Conv1d(width >> len(rates), 1, 7, padding=3, bias=False)

    def forward(self, z):
        x = self.pre(z)
        for up, rs in zip(self.ups, self.res):
            x = up(F.leaky_relu(x, 0.1))
            total = None
            for j in range(0, len(rs), 2):
                y = x
                for r in rs[j : j + 2]:
                    y = y + r(F.leaky_relu(y, 0.1))
                total = y if total is None else total + y
            x = total / 2
        return torch.tanh(self.post(F.leaky_relu(x)))


class Vits(nn.Module):
    def __init__(self, symbols=60, c=48):
        super().__init__()
        self.enc, self.dp = TextEncoder(symbols, c, 2), DurationPredictor(c)
        self.flow = nn.ModuleList([Coupling(c, c) for _ in range(2)])
        self.dec = Decoder(c)

    def forward(self, ids, lengths, scales):
        noise, speed, noise_w = scales[0], scales[1], scales[2]
        x, m, logs, mask = self.enc(ids, lengths)
        w = torch.ceil(torch.exp(self.dp(x, mask, noise_w)) * mask * speed)
        ylen = torch.clamp_min(torch.sum(w, [1, 2]), 1).long()
        ymask = (torch.arange(ylen.max()).unsqueeze(0) < ylen.unsqueeze(1)).unsqueeze(1).to(mask.dtype)
        amask = mask.unsqueeze(2) * ymask.unsqueeze(-1)
        b, _, ty, tx = amask.shape
        cum = torch.cumsum(w, -1).view(b * tx)
        path = (torch.arange(ty).unsqueeze(0) < cum.unsqueeze(1)).to(mask.dtype).view(b, tx, ty)
        path = (path - F.pad(path, (0, 0, 1, 0))[:, :-1]).unsqueeze(1).transpose(2, 3) * amask
        m, logs = (torch.matmul(path.squeeze(1), v.transpose(1, 2)).transpose(1, 2) for v in (m, logs))
        z = m + torch.randn_like(m) * torch.exp(logs) * noise
        for f in reversed(self.flow):
            z = f(torch.flip(z, [1]), ymask)
        return self.dec(z * ymask)


def seeded() -> Vits:
    """Random weights, scaled by fan-in."""
    torch.manual_seed(3)
    net = Vits().eval()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.Conv1d | nn.ConvTranspose1d):
                nn.init.normal_(part.weight, 0.0, 1 / math.sqrt(part.weight[0].numel()))
    return net
