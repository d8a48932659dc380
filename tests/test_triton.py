"""The GPU kernels against attention written out in float64: compiled where there is a GPU, else interpreted.

Without a GPU (and so in Triton's interpreter, see ``conftest.py``) the sizes are tiny, and that the kernels compile for
a Hopper GPU is tested apart.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from namm_transfer import MemoryCache, kernels, policy, tiles
from namm_transfer.spectrogram import BINS, DECAY, HOP, loaded, state_scale, stored
from namm_transfer.store import TokenStore
from namm_transfer.tiles import AttentionOptions, Context, Observed

triton = pytest.importorskip("triton")
from namm_transfer.kernels import triton as gpu  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
"""Of outputs of size 1; probabilities are made in float32 of the very same numbers and never rounded."""
PROBABILITY = 5e-6


class Case:
    """A tile and its attention in float64, from the definition."""

    def __init__(
        self, *, rows: int = 2, kv_heads: int = 2, groups: int = 2, count: int = 32, tokens: int = 90, width: int = 16,
        value_width: int = 16, ahead: int | None = -1, softcap: float | None = None, sinks: bool = False,
        dtype: torch.dtype = torch.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        # as a model makes them: heads are the last but one dimension, and the store has free places
        self.query = (normal(rows, count, kv_heads * groups, width) * 2).to(dtype).transpose(1, 2)
        self.key = normal(rows, kv_heads, tokens + 7, width).to(dtype)[:, :, :tokens]
        self.value = normal(rows, kv_heads, tokens + 7, value_width).to(dtype)[:, :, :tokens]
        self.lengths = torch.randint(min(count, tokens), tokens + 1, (rows, kv_heads), generator=generator).to(DEVICE)
        self.lengths[0, 0] = tokens
        self.ahead = count - 1 if ahead == -1 else ahead
        self.scale = width**-0.5
        self.softcap = softcap
        self.sinks = normal(kv_heads * groups) if sinks else None

        limit = self.lengths.unsqueeze(-1).expand(-1, -1, count)
        if self.ahead is not None:
            limit = limit.minimum(limit - self.ahead + torch.arange(count, device=DEVICE))
        seen = (torch.arange(tokens, device=DEVICE) < limit.unsqueeze(-1)).repeat_interleave(groups, dim=1)
        key, value = (x.double().repeat_interleave(groups, dim=1) for x in (self.key, self.value))
        logits = self.query.double() @ key.mT * self.scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weight = torch.where(seen, logits, -math.inf).exp()
        total = weight.sum(-1, keepdim=True)
        if self.sinks is not None:
            total = total + self.sinks.double().exp().view(-1, 1, 1)
        p = weight / total.where(total > 0, 1.0)
        self.out = p @ value
        self.attn = p.view(rows, kv_heads, groups, count, tokens).mean(2)

    def forward(self, parts: int | None = None) -> tuple[Tensor, Tensor]:
        return gpu.forward(
            self.query, self.key, self.value, self.lengths, self.ahead, self.scale, self.softcap, self.sinks, parts
        )


CASES = {
    "causal": {},
    "one query head a KV head": {"groups": 1, "width": 32},
    "odd groups": {"groups": 3, "rows": 1},
    "eight heads on one": {"groups": 8, "kv_heads": 1, "rows": 1},
    "every token": {"ahead": None},
    "queries past the block": {"count": 72, "tokens": 72, "rows": 1},
    "fewer new tokens than queries": {"ahead": 3},
    "a query without any token": {"ahead": 37, "tokens": 37},
    "widths that are no power of two": {"width": 48, "value_width": 80, "rows": 1},
    "narrow": {"width": 8, "value_width": 4},
    "wide": {"width": 256, "value_width": 192, "rows": 1, "kv_heads": 1, "tokens": 40},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "softcap and sinks": {"softcap": 5.0, "sinks": True, "groups": 1},
}
LARGE = {
    "update block": {"rows": 1, "groups": 4, "count": 512, "tokens": 3001, "width": 128, "value_width": 128},
    "small model": {
        "rows": 1,
        "kv_heads": 3,
        "groups": 3,
        "count": 512,
        "tokens": 2048,
        "width": 64,
        "value_width": 64,
    },
    "many heads": {"rows": 2, "kv_heads": 8, "groups": 7, "count": 512, "tokens": 1000, "width": 64, "value_width": 64},
    "one head": {"rows": 2, "kv_heads": 8, "groups": 1, "count": 528, "tokens": 1111, "width": 96, "value_width": 96},
    "whole prompt": {"rows": 1, "groups": 2, "count": 2048, "tokens": 2048, "width": 64, "value_width": 64},
    "wide heads": {"rows": 1, "groups": 4, "count": 512, "tokens": 1500, "width": 256, "value_width": 256},
}
# compiling and interpreting take their time: a small case in single precision and in one of the half precisions
PAIRS = [(name, DTYPES[j]) for i, name in enumerate(CASES) for j in (0, 1 + i % 2)]
if CUDA:
    CASES |= LARGE
    PAIRS += [(name, dtype) for name in LARGE for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_forward(name: str, dtype: torch.dtype) -> None:
    case = Case(**CASES[name], dtype=dtype)
    out, lse = case.forward()
    torch.testing.assert_close(out.double(), case.out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert out.dtype == dtype
    # the normaliser: probabilities recomputed with it sum up to what the tokens (and not the sinks) have
    sums = gpu.column_sums(case.query, case.key, lse, case.lengths, case.ahead, case.scale, 0, case.softcap)
    torch.testing.assert_close(sums.double(), case.attn.sum(2), atol=1e-5, rtol=1e-5 * case.attn.shape[2])


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_the_tokens(parts: int) -> None:
    case = Case(rows=1, count=16, tokens=100, sinks=True)
    whole, lse = case.forward(1)
    out, parts_lse = case.forward(parts)
    torch.testing.assert_close(out, whole, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(parts_lse, lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("start", [0, 5, 16, 31])
def test_column_sums(start: int) -> None:
    case = Case(tokens=150)
    _, lse = case.forward()
    sums = gpu.column_sums(case.query, case.key, lse, case.lengths, case.ahead, case.scale, start)
    torch.testing.assert_close(sums.double(), case.attn[:, :, start:].sum(2), atol=PROBABILITY, rtol=1e-5)


def spectrum(attn: Tensor, before: Tensor, ema: Tensor) -> Tensor:
    """The moving average [R, K, N, 17] in float64 by torch's own transform; attn [R, K, S, N], before [R, K, N, 16]."""
    columns = torch.cat([before, attn.mT], dim=-1)
    window = torch.hann_window(32, dtype=torch.float64, device=attn.device)
    for start in range(0, attn.shape[2], 16):
        frame = torch.fft.rfft(columns[..., start : start + 32] * window).abs()
        ema = 0.99**16 * ema + (1 - 0.99**16) * frame
    return ema


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["causal", "odd groups", "eight heads on one", "every token", "softcap and sinks", *(LARGE if CUDA else ())]
)
def test_spectrum(name: str, dtype: torch.dtype) -> None:
    """In two launches, the second of which goes on from the first one's state; N is no multiple of a block."""
    settings = {"count": 64, "tokens": 141} | CASES[name]
    case = Case(**settings, dtype=dtype)
    rows, kv_heads, count, tokens = case.attn.shape
    state = torch.float32 if dtype == torch.float32 else torch.float16
    # the state is part of a larger store, and there already is some
    generator = torch.Generator().manual_seed(9)
    whole_ema = stored(torch.rand(rows, kv_heads, tokens + 3, BINS, generator=generator) * 0.01, state).to(DEVICE)
    whole_previous = stored(torch.rand(rows, kv_heads, tokens + 3, HOP, generator=generator) * 0.01, state).to(DEVICE)
    ema, previous = whole_ema[:, :, :tokens], whole_previous[:, :, :tokens]
    spare = whole_ema[:, :, tokens:].clone()
    want = spectrum(case.attn, loaded(previous).double(), loaded(ema).double())
    _, lse = case.forward()
    for start, stop in ((0, 16), (16, count)):
        ahead = None if case.ahead is None else case.ahead - start
        gpu.observe_spectrum(
            case.query[:, :, start:stop], case.key, lse[:, :, start:stop], case.lengths, ahead, case.scale,
            ema, previous, DECAY, state_scale(state), case.softcap,
        )  # fmt: skip
    used = torch.arange(tokens, device=DEVICE) < case.lengths.unsqueeze(-1)
    last = case.attn[:, :, -HOP:].mT
    if dtype == torch.float32:
        torch.testing.assert_close(ema[used].double(), want[used], atol=PROBABILITY, rtol=1e-4)
        torch.testing.assert_close(previous[used].double(), last[used], atol=PROBABILITY, rtol=1e-4)
    else:
        # within half a hundredth of a token's loudest bin: float16 has 11 bits
        error = (loaded(ema).double() - want).abs().amax(-1) / want.amax(-1).clamp_min(1e-6)
        assert error[used].max() < 5e-3
        torch.testing.assert_close(loaded(previous)[used].double(), last[used], atol=1e-6, rtol=2e-3)
    assert torch.equal(whole_ema[:, :, tokens:], spare)


# -- behind the memory's door --------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the memory use Triton on this device; the names of the kernels' callers, as they are called."""
    monkeypatch.setattr(tiles, "TRITON_DEVICES", {DEVICE.type})
    called: list[str] = []

    def counted(name: str) -> None:
        function = getattr(gpu, name)

        def call(*args: object) -> object:
            called.append(name)
            return function(*args)

        monkeypatch.setattr(gpu, name, call)

    for name in ("forward", "observe_spectrum", "column_sums"):
        counted(name)
    return called


def context(case: Case, **more: object) -> Context:
    options = AttentionOptions(softcap=case.softcap, sinks=case.sinks)
    return Context(store_of(case.key, case.value, case.lengths), options, case.query.shape[2], **more)


def store_of(key: Tensor, value: Tensor, lengths: Tensor) -> TokenStore:
    return TokenStore.from_padded({"keys": key, "values": value}, lengths)


def test_what_an_observer_is_shown(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the probabilities, sums and spectra are those of the same attention."""
    case = Case(softcap=4.0, sinks=True)
    shown = int(case.lengths.max())
    want = case.attn[..., :shown]
    seen: list[Observed] = []
    out = context(case).attend(case.query, case.ahead, seen.append)
    torch.testing.assert_close(out.double(), case.out, atol=5e-6, rtol=5e-6)
    (observed,) = seen
    assert observed.count == 32
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)  # parts as small as they get
    parts = list(observed)
    assert [x.shape[2] for x in parts] == [16, 16]
    torch.testing.assert_close(torch.cat(parts, dim=2).double(), want, atol=PROBABILITY, rtol=1e-5)
    torch.testing.assert_close(observed.sums(7).double(), want[:, :, 7:].sum(2), atol=PROBABILITY, rtol=1e-5)
    ema, previous = (torch.zeros(2, 2, shown, n, device=DEVICE) for n in (BINS, HOP))
    observed.advance(ema, previous)
    expected = spectrum(want, previous.double() * 0, ema.double() * 0)
    torch.testing.assert_close(ema.double(), expected, atol=PROBABILITY, rtol=1e-4)
    assert launches == ["forward", "column_sums", "observe_spectrum"]


def test_what_triton_does_not_serve(launches: list[str]) -> None:
    """Masks that are tensors, few queries and other types go to torch, with the same result."""
    case = Case()
    masked = torch.arange(int(case.lengths.max()), device=DEVICE) < (
        case.lengths[..., None, None] - 31 + torch.arange(32, device=DEVICE)[:, None]
    )
    out = context(case, masked=True).attend(case.query, masked, lambda attn: None)
    torch.testing.assert_close(out.double(), case.out, atol=5e-6, rtol=5e-6)
    few = context(case).attend(case.query[:, :, :15], 31, lambda attn: None)
    torch.testing.assert_close(few.double(), case.out[:, :, :15], atol=5e-6, rtol=5e-6)
    double = Context(store_of(case.key.double(), case.value.double(), case.lengths), AttentionOptions(), 32)
    torch.testing.assert_close(double.attend(case.query.double(), 31, None), case.out)
    assert not launches


def fed(llama, cache: MemoryCache, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    model = copy.deepcopy(llama(layers=1)).to(DEVICE)
    with torch.no_grad():
        out = [model(part, past_key_values=cache).logits for part in ids.to(DEVICE).split(cuts, dim=1)]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("name", ["namm", "namm at once", "namm by rank", "h2o", "snapkv", "tova"])
def test_the_memory_retains_the_same(
    llama, make_namm, tokens, retained, launches: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As by torch's operators, for every policy that observes; hops are left unfinished unless all comes at once."""
    given = {"budget": None if name in ("namm", "namm at once") else 40}
    if "namm" in name:
        given |= {"namm": make_namm()}
    chosen, ids = policy(name.split()[0], **given), tokens(150, rows=2)
    cuts = (150,) if name == "namm at once" else (5, 83, 8, 1, 1, 52)
    cache = MemoryCache(chosen, 64)
    logits = fed(llama, cache, ids, cuts)
    assert {"forward", "observe_spectrum" if "namm" in name else "column_sums"} <= set(launches)
    monkeypatch.setattr(tiles, "TRITON_DEVICES", set())
    reference = MemoryCache(chosen, 64)
    want = fed(llama, reference, ids, cuts)
    assert retained(cache) == retained(reference)
    assert cache.stats().kept_fraction < 0.9
    torch.testing.assert_close(logits, want, atol=2e-4, rtol=2e-4)


def test_without_triton_all_works_and_says_so_once(
    llama, make_namm, tokens, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(kernels, "triton")
    monkeypatch.delitem(sys.modules, "namm_transfer.kernels.triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels.gpu.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = MemoryCache(policy("namm", namm=make_namm()), 64)
            fed(llama, cache, tokens(160), (160,))
        said = [str(x.message) for x in caught if "without its Triton kernels" in str(x.message)]
        assert len(said) == 1
        assert "ModuleNotFoundError" in said[0]
        assert cache.stats().kept_fraction < 0.9
        kernels.gpu.cache_clear()
        monkeypatch.setenv("NAMM_TRANSFER_KERNELS", "off")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.gpu() is None
    finally:
        kernels.gpu.cache_clear()
    assert not launches


# -- compiled without a GPU ----------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="the tests above run compiled kernels")
def test_they_compile_for_hopper() -> None:
    """The interpreter takes what the compiler refuses. In a process of its own, which does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-P", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["_forward", "_combine", "_spectrum", "_sums"]


def compile_all() -> None:
    """Compile each kernel for sm_90 as a bfloat16 model of width 128 would, with 4 (`_sums`: 32) query heads a KV head.

    What is compiled for 32 would not fit if it were pipelined.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    common = {"SOFTCAP": 0.0, "CAUSAL": True, "PRECISION": "ieee", "WIDEN": False, "SINKS": True}
    shared = 227 * 2**10
    sizes = {"D": 128, "V": 128, "BLOCK_D": 128, "BLOCK_V": 128, "BLOCK_P": 4}
    pointers = {"query": "bf16", "key": "bf16", "value": "bf16", "lengths": "i64", "out": "bf16"}
    pointers |= dict.fromkeys(("sinks", "lse", "parts_out", "parts_lse"), "fp32")
    pointers |= dict.fromkeys(("table", "ema", "previous"), "fp16")
    for kernel, blocks in (
        (gpu._forward, gpu._forward_blocks(torch.bfloat16, 128, 128, 512, shared)),
        (gpu._combine, {"num_warps": 1, "num_stages": 1}),
        (gpu._spectrum, gpu._observe_blocks(torch.bfloat16, 128, 4, shared) | {"GROUPS": 4}),
        (gpu._sums, gpu._observe_blocks(torch.bfloat16, 128, 32, shared) | {"GROUPS": 32}),
    ):
        signature, constants, attributes = {}, {}, {}
        for at, name in enumerate(kernel.arg_names):
            if name.isupper() or name in ("D", "V"):
                signature[name], constants[(at,)] = "constexpr", (common | sizes | blocks)[name]
            elif name in pointers:
                pointer = "fp32" if name == "out" and kernel is gpu._sums else pointers[name]
                signature[name], attributes[(at,)] = f"*{pointer}", [["tt.divisibility", 16]]
            elif name in ("scale", "decay", "state_scale"):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if name.startswith(("query_", "key_", "value_")):
                    attributes[(at,)] = [["tt.divisibility", 16]]
        made = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", 90, 32),
            options={name: blocks[name] for name in ("num_warps", "num_stages")},
        )
        if made.metadata.shared > shared:
            raise SystemExit(f"{kernel.__name__} needs {made.metadata.shared} bytes of shared memory")
        print(kernel.__name__)


if __name__ == "__main__":
    compile_all()
