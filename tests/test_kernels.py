"""The compiled kernel against softmax attention written out in float64, and what happens where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namm_transfer import kernels
from namm_transfer.spectrogram import BINS, HOP, loaded
from namm_transfer.store import TokenStore
from namm_transfer.tiles import AttentionOptions, Context

needs_compiler = pytest.mark.skipif(kernels.cpu() is None, reason="no C++ compiler here")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def oracle(query, key, value, lengths, visible, options):
    """Output and group means, one query at a time."""
    q, k, v = (x.double().numpy() for x in (query, key, value))
    rows, heads, count, width = q.shape
    groups = heads // k.shape[1]
    scale = width**-0.5 if options.scaling is None else options.scaling
    out, attn = np.zeros((rows, heads, count, v.shape[-1])), np.zeros((rows, k.shape[1], count, k.shape[2]))
    for r in range(rows):
        for h in range(heads):
            g = h // groups
            for i in range(count):
                hidden = visible - i if isinstance(visible, int) else 0
                seen = np.arange(k.shape[2]) < int(lengths[r, g]) - hidden
                if isinstance(visible, torch.Tensor):
                    seen &= visible[r % visible.shape[0], g % visible.shape[1], i].numpy()
                logits = k[r, g][seen] @ q[r, h, i] * scale
                if options.softcap is not None:
                    logits = options.softcap * np.tanh(logits / options.softcap)
                sink = [] if options.sinks is None else [float(options.sinks[h])]
                if not len(logits):
                    continue
                top = max([*logits, *sink])
                p = np.exp(logits - top)
                p /= p.sum() + sum(np.exp(s - top) for s in sink)
                out[r, h, i] = p @ v[r, g][seen]
                attn[r, g, i, seen] += p / groups
    return torch.from_numpy(out), torch.from_numpy(attn)


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_attention_of_a_tile(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rows, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8]))
    count = draw(st.sampled_from([1, 2, 5, 16, 33, 64]))
    tokens = draw(st.sampled_from([count, count + 1, count + 47, 515, 1100]))
    tokens = max(tokens, count)
    width, value_width = draw(st.sampled_from([4, 15, 16, 40, 64])), draw(st.sampled_from([4, 16, 21, 72]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    query = (normal(rows, kv_heads * groups, count, width) * 2).to(dtype)
    key, value = normal(rows, kv_heads, tokens, width).to(dtype), normal(rows, kv_heads, tokens, value_width).to(dtype)
    lengths = torch.randint(count, tokens + 1, (rows, kv_heads), generator=generator)
    kind = draw(st.sampled_from(["all", "causal", "mask"]))
    visible = {"all": None, "causal": draw(st.integers(count - 1, count + 1))}.get(kind)
    if kind == "mask":
        size = (draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, kv_heads])), count, tokens)
        visible = torch.rand(size, generator=generator) < 0.4
        visible[..., 0] = True
    options = AttentionOptions(
        scaling=draw(st.sampled_from([None, 0.3])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        sinks=draw(st.sampled_from([None, normal(kv_heads * groups)])),
    )
    lengths[0, 0] = tokens
    layout = draw(st.sampled_from(["ragged", "padded"]))
    store = TokenStore.from_padded({"keys": key, "values": value}, lengths, layout)
    context = Context(store, options, count)
    assert context._kernel is not None
    seen: list[torch.Tensor] = []
    out = context.attend(query, visible, lambda attn: seen.extend(attn))
    want_out, want_attn = oracle(query, key, value, lengths, visible, options)
    torch.testing.assert_close(out.double(), want_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(seen[0].double(), want_attn, atol=TOLERANCE[dtype] / 4, rtol=TOLERANCE[dtype])
    unobserved = context.attend(query, visible, None)
    torch.testing.assert_close(unobserved, out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_are_within_a_hundredth(dtype: torch.dtype) -> None:
    """Of the spectrum of the exact attention over the same keys and queries, after 32 frames in tiles of any size."""
    generator = torch.Generator().manual_seed(3)
    tokens, hops = 900, 32
    query = (torch.randn(1, 6, hops * HOP, 32, generator=generator) * 1.5).to(dtype)
    key, value = (torch.randn(1, 2, tokens, 32, generator=generator).to(dtype) for _ in range(2))
    lengths, options = torch.full((1, 2), tokens), AttentionOptions()
    state = torch.float32 if dtype == torch.float32 else torch.float16
    ema, previous = torch.zeros(1, 2, tokens, BINS, dtype=state), torch.zeros(1, 2, tokens, HOP, dtype=state)
    context = Context(TokenStore.from_padded({"keys": key, "values": value}, lengths), options, hops * HOP)
    for start, stop in ((0, 16), (16, 128), (128, 512)):
        visible = hops * HOP - 1 - start
        context.attend(query[:, :, start:stop], visible, lambda attn: attn.advance(ema, previous))
    _, attn = oracle(query, key, value, lengths, hops * HOP - 1, options)
    want, window = torch.zeros(1, 2, tokens, BINS, dtype=torch.float64), torch.hann_window(32, dtype=torch.float64)
    padded = torch.cat([torch.zeros(1, 2, HOP, tokens, dtype=torch.float64), attn], dim=2)
    for t in range(hops):
        frame = padded[:, :, t * HOP : t * HOP + 32].transpose(-1, -2) * window
        want = 0.99**16 * want + (1 - 0.99**16) * torch.fft.rfft(frame).abs()
    relative = ((loaded(ema).double() - want).abs() / want.clamp_min(1e-12)).flatten()
    assert relative.max() < 1e-2, relative.max()


def script(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A tiny model under a NAMM in a process of its own, with a cache folder of its own."""
    code = (
        "import torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from namm_transfer import NAMM, MemoryCache, kernels, policy\n"
        "torch.manual_seed(0)\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,"
        " num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)).eval()\n"
        "model.set_attn_implementation('namm')\n"
        "for _ in range(2):\n"
        "    cache = MemoryCache(policy('namm', namm=NAMM.from_pretrained('default'), budget=0.5), 32)\n"
        "    out = model(torch.arange(64)[None], past_key_values=cache).logits\n"
        "print(kernels.cpu() is not None, round(float(out.double().abs().sum()), 2))\n"
    )
    given = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=given, cwd=tmp_path, capture_output=True, text=True, check=True
    )


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path) -> None:
    first = script(tmp_path)
    assert "compiling its CPU kernel, once" in first.stderr
    (library,) = (tmp_path / "namm_transfer").glob("*")
    stamp = library.stat().st_mtime_ns
    second = script(tmp_path)
    assert "compiling" not in second.stderr
    assert library.stat().st_mtime_ns == stamp
    assert first.stdout == second.stdout
    assert first.stdout.startswith("True")


def test_without_a_compiler_all_works_and_says_so_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho this compiler is out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    without = script(tmp_path, CXX=str(broken))
    assert without.stderr.count("several times slower") == 1
    assert "this compiler is out of order" in without.stderr
    off = script(tmp_path, NAMM_TRANSFER_KERNELS="off")
    assert "slower" not in off.stderr
    assert without.stdout == off.stdout
    assert off.stdout.startswith("False")
    if kernels.cpu() is not None:
        assert script(tmp_path).stdout.split()[1] == off.stdout.split()[1]
