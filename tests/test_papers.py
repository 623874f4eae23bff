"""The papers' programs of examples/papers/: equal to eager, with the property that the paper is about."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'luthier[torch]'")

import luthier  # noqa: E402
from examples.papers import energy, experts  # noqa: E402


def test_an_energy_is_minimised_by_its_gradient() -> None:
    module, (context, start) = energy.build()
    compiled = energy.compile_minimiser(module, (context, start))
    for k in range(2):
        args = torch.randn_like(context), start * (k + 1)
        (y, energies), (want, levels) = compiled(*args), module(*args)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(energies, levels, rtol=1e-4, atol=1e-5)
        assert bool((energies.diff(dim=0) < 0).all())  # every step goes down


def test_tokens_are_multiplied_by_their_experts() -> None:
    module, x = experts.build(8)
    compiled = luthier.compile(module, args=(x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (6, 1, 40):
        x = torch.randn(tokens, experts.WIDTH)
        # eager rounds the sums of its bf16 products elsewhere: two roundings of 2^-8 of elements of about one
        torch.testing.assert_close(compiled(x), module(x), rtol=2e-2, atol=1e-2)
