"""The network against its definition, and the files it lives in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from namm_transfer import NAMM
from namm_transfer.errors import CheckpointError
from namm_transfer.network import FEATURES, NUM_PARAMETERS, Weights, features, scores, unflatten
from namm_transfer.spectrogram import BINS


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed)) * 0.3


def inputs(rows: int, heads: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, heads, width, FEATURES, generator=torch.Generator().manual_seed(seed))


def explicit(vector: Tensor, x: Tensor) -> Tensor:
    """Scores [N] of one head's features [N, 25] with the N x N mask written out, in float64."""
    vector, x = vector.double(), x.double()
    w_qkv, b_qkv = vector[:2400].view(25, 96), vector[2400:2496]  # input-major
    w_o, b_o = vector[2496:4096].view(32, 50), vector[4096:4146]
    w, b = vector[4146:4171], vector[4171]
    q, k, v = (x @ w_qkv + b_qkv).split(32, dim=1)
    logits = q @ k.T / math.sqrt(32)
    older = torch.ones(len(x), len(x), dtype=torch.bool).tril(-1)
    o = logits.masked_fill(older, -math.inf).softmax(-1) @ v @ w_o + b_o
    return (x * (1 + o[:, 25:]) + o[:, :25]) @ w + b


def test_size() -> None:
    assert NUM_PARAMETERS == 4172
    assert FEATURES == 25


def test_scores_follow_the_definition() -> None:
    vector, x = vectors(1), inputs(2, 3, 41)
    found = scores(unflatten(vector), x)
    for b in range(2):
        for k in range(3):
            torch.testing.assert_close(found[b, k].double(), explicit(vector[0], x[b, k]), atol=1e-4, rtol=1e-5)


def test_ragged_heads_score_as_if_alone() -> None:
    weights, x = unflatten(vectors(1)), inputs(2, 3, 30)
    lengths = torch.tensor([[30, 1, 17], [5, 29, 30]])
    found = scores(weights, x, lengths)
    junk = scores(weights, torch.where(torch.arange(30).view(1, 1, -1, 1) < lengths[..., None, None], x, 1e3), lengths)
    for b in range(2):
        for k in range(3):
            n = int(lengths[b, k])
            alone = scores(weights, x[b : b + 1, k : k + 1, :n])[0, 0]
            torch.testing.assert_close(found[b, k, :n], alone, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(junk[b, k, :n], alone, atol=1e-4, rtol=1e-5)  # padding changes nothing


def test_population_rows_score_as_if_alone() -> None:
    population, x = vectors(4), inputs(4, 2, 19)
    lengths = torch.tensor([[19, 3], [8, 19], [19, 19], [1, 1]])
    for given in (None, lengths):
        found = scores(unflatten(population), x, given)
        for p in range(4):
            alone = scores(unflatten(population[p : p + 1]), x[p : p + 1], None if given is None else given[p : p + 1])
            for k in range(2):
                n = 19 if given is None else int(given[p, k])
                torch.testing.assert_close(found[p, k, :n], alone[0, k, :n], atol=1e-4, rtol=1e-5)


def test_flat_order() -> None:
    named = unflatten(torch.arange(NUM_PARAMETERS, dtype=torch.float32).unsqueeze(0))
    assert [tuple(x.shape) for x in named] == [(1, 25, 96), (1, 96), (1, 32, 50), (1, 50), (1, 25), (1,)]
    assert Weights._fields == ("w_qkv", "b_qkv", "w_o", "b_o", "w", "b")
    assert named.w_qkv[0, 0, :3].tolist() == [0, 1, 2]  # input-major: the first input's 96 outputs come first
    assert named.w_qkv[0, 1, 0] == 96
    assert (named.b_qkv[0, 0], named.w_o[0, 0, 0], named.w_o[0, 1, 0]) == (2400, 2496, 2546)
    assert (named.b_o[0, 0], named.w[0, 0], named.b[0]) == (4096, 4146, 4171)


def test_features_follow_the_definition() -> None:
    recency = torch.tensor([0, 1, 100, 40_000])
    ema, mean, var = torch.rand(4, BINS), torch.rand(BINS), torch.rand(BINS)
    var[3] = 0.0  # divided by 1e-7, not by nothing
    found = features(recency, ema, mean, var)
    for n, r in enumerate(recency.tolist()):
        angles = [r * 50_000 ** (-i / 4) for i in range(4)]
        torch.testing.assert_close(found[n, :4], torch.tensor([math.sin(a) for a in angles]), atol=4e-3, rtol=0)
        torch.testing.assert_close(found[n, 4:8], torch.tensor([math.cos(a) for a in angles]), atol=4e-3, rtol=0)
        want = [(float(ema[n, f]) - float(mean[f])) / max(float(var[f]) ** 0.5, 1e-7) for f in range(BINS)]
        torch.testing.assert_close(found[n, 8:], torch.tensor(want), atol=1e-4, rtol=1e-5)


def test_module_equals_functions(make_namm) -> None:
    namm, ema, recency = make_namm(), torch.rand(1, 2, 9, BINS), torch.arange(8, -1, -1).expand(1, 2, 9)
    x = features(recency, ema, namm.feature_mean, namm.feature_var)
    assert torch.equal(namm(ema, recency), scores(namm.weights(), x))


# -- files -------------------------------------------------------------------------------------------------------


def same(a: NAMM, b: NAMM) -> bool:
    return a.fingerprint() == b.fingerprint() and all(
        torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items()
    )


def test_vector_round_trip() -> None:
    flat = vectors(1)[0]
    namm = NAMM.from_vector(flat, feature_mean=torch.full((BINS,), 0.5))
    assert torch.equal(namm.to_vector(), flat)
    assert namm.feature_mean.eq(0.5).all()
    assert namm.feature_var.eq(1).all()
    namm.to_vector().zero_()
    flat.zero_()
    assert namm.vector.abs().max() > 0  # copies both ways
    assert not namm.vector.requires_grad


def test_folder_round_trip_through_the_hub_mixin(make_namm, tmp_path: Path) -> None:
    namm = make_namm()
    namm.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert same(NAMM.from_pretrained(tmp_path / "mine"), namm)
    assert same(NAMM.from_pretrained(str(tmp_path / "mine")), namm)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "namm-transfer" in card
    assert "kv-cache" in card


def test_fingerprint_tells_values_apart(make_namm) -> None:
    namm = make_namm()
    other = NAMM.from_vector(namm.vector, feature_mean=namm.feature_mean, feature_var=namm.feature_var * 1.01)
    assert len({namm.fingerprint(), make_namm().fingerprint()}) == 1
    assert other.fingerprint() != namm.fingerprint()


def test_corrupt_files(make_namm, tmp_path: Path) -> None:
    folder = tmp_path / "namm"
    make_namm().save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:50], b"", b"\xff" * 4000):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"cannot load a NAMM from .*namm"):
            NAMM.from_pretrained(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot load a NAMM"):
        NAMM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"vector": torch.zeros(4171)}, r"'vector' must have shape \(4172,\); got \(4171,\)"),
        (
            lambda t: t | {"vector": t["vector"].index_fill(0, torch.tensor([5, 9]), math.nan)},
            "'vector' holds 2 values",
        ),
        (lambda t: t | {"feature_mean": torch.full((17,), math.inf)}, "'feature_mean' holds 17 values that are NaN"),
        (lambda t: t | {"feature_var": torch.full((17,), -1.0)}, "negative variances"),
        (lambda t: t | {"feature_var": torch.ones(16)}, r"\(17,\); got \(16,\)"),
        (
            lambda t: {"vector": t["vector"]},
            r"holds the tensors \['feature_mean', 'feature_var', 'vector'\]; got \['vector'\]",
        ),
        (lambda t: t | {"more": torch.ones(1)}, "got .*'more'"),
    ],
)
def test_files_that_hold_something_else(make_namm, tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "namm"
    make_namm().save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        NAMM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nothing-of-that-name", "/no/such/folder", "/nofolder", "a/b/c", ""])
def test_nothing_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"NAMM.*" + name):
        NAMM.from_pretrained(name, local_files_only=True)


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(CheckpointError, match="cannot load a NAMM from 'nobody/nothing'"):
        NAMM.from_pretrained("nobody/nothing", local_files_only=True)


@pytest.mark.parametrize("size", [0, 4171, 4173])
def test_wrong_flat_length(size: int) -> None:
    with pytest.raises(CheckpointError, match=rf"must have shape \(4172,\); got \({size},\)"):
        NAMM.from_vector(torch.zeros(size))


def test_wrong_flat_shape() -> None:
    with pytest.raises(CheckpointError, match=r"got \(1, 4172\)"):
        NAMM.from_vector(torch.zeros(1, 4172))


# -- checkpoints of the published implementation -----------------------------------------------------------------


def reference_checkpoint(*, best_buffers: bool = True) -> dict:
    generator = torch.Generator().manual_seed(5)
    prefix = "stored_buffers_to_save.policy_embedding_normalizer_"
    state = {
        "mean": vectors(1, 7)[0],
        "best_member": vectors(1, 8)[0],
        "C": torch.eye(3),
        "sigma": torch.tensor(0.1),
        prefix + "output_mean": torch.rand(1, 1, 1, BINS, generator=generator),
        prefix + "output_var": torch.rand(1, 1, 1, BINS, generator=generator),
        prefix + "online_new_output_mean": torch.full((1, 1, 1, BINS), 77.0),
        prefix + "online_new_output_var": torch.full((1, 1, 1, BINS), 78.0),
    }
    if best_buffers:
        state |= {"best_" + k: v + 1 for k, v in state.items() if k.startswith(prefix)}
    return {"evolution_state": state, "iter_num": 12, "best_val_loss": 1.5, "config": {"pop_size": 32}}


def test_reference_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    checkpoint = reference_checkpoint()
    torch.save(checkpoint, file)
    state = checkpoint["evolution_state"]
    prefix = "stored_buffers_to_save.policy_embedding_normalizer_"
    for best, vector, name in ((False, "mean", prefix), (True, "best_member", "best_" + prefix)):
        namm = NAMM.from_reference_checkpoint(file, best=best)
        assert torch.equal(namm.vector, state[vector])
        assert torch.equal(namm.feature_mean, state[name + "output_mean"].flatten())
        assert torch.equal(namm.feature_var, state[name + "output_var"].flatten())


def test_reference_checkpoint_without_buffers_of_the_best(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    torch.save(reference_checkpoint(best_buffers=False), file)
    best, mean = NAMM.from_reference_checkpoint(file, best=True), NAMM.from_reference_checkpoint(file)
    assert torch.equal(best.feature_var, mean.feature_var)  # never silently the unit normaliser
    assert not torch.equal(best.vector, mean.vector)


class Malicious:
    """Unpickling it runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    file, target = tmp_path / "ckpt.pt", tmp_path / "was-run"
    torch.save(reference_checkpoint() | {"config": Malicious(target)}, file)
    with pytest.raises(CheckpointError, match="weights only"):
        NAMM.from_reference_checkpoint(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; expected a dict"),
        ({"evolution_state": 3}, "holds a int; expected a dict"),
        ({"evolution_state": {"best_member": torch.zeros(4172)}}, "no tensor 'mean'; it has .*best_member"),
        ({"evolution_state": {"mean": torch.zeros(100)}}, r"must have shape \(4172,\); got \(100,\)"),
        ({"evolution_state": {"mean": torch.full((4172,), math.nan)}}, "4172 values that are NaN"),
    ],
)
def test_other_checkpoints(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "ckpt.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        NAMM.from_reference_checkpoint(file)


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        NAMM.from_reference_checkpoint(tmp_path / "missing.pt")
    file = tmp_path / "ckpt.pt"
    torch.save(reference_checkpoint(), file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot read"):
        NAMM.from_reference_checkpoint(file)
    file.write_text(json.dumps({"mean": [0.0]}))
    with pytest.raises(CheckpointError, match="cannot read"):
        NAMM.from_reference_checkpoint(file)
