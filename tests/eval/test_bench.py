"""The benchmark measures what it says, and its detector of Q x N matrices detects them."""

import io
import json

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer.configs import compose
from namm_transfer.eval import bench
from namm_transfer.network import NAMM, NUM_PARAMETERS

SMALL = ["layers=1", "length=64", "decode=2", "repeats=2", "update_interval=32", "dtype=float32", "executor.threads=1"]


@pytest.fixture
def config(tmp_path):
    NAMM.from_vector(torch.zeros(NUM_PARAMETERS)).save_pretrained(tmp_path / "namm")
    overrides = [
        *SMALL,
        f"policies.namm.namm={tmp_path / 'namm'}",
        "peak_length=null",
        f"out={tmp_path / 'docs' / 'bench.json'}",
    ]
    settings = OmegaConf.to_container(compose("bench", overrides), resolve=True)
    return settings | {"policies": {name: settings["policies"][name] for name in ("namm", "h2o")}}


def test_figures_come_with_ratios_and_provenance(config, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    result = bench.bench(config, console)
    assert json.loads((tmp_path / "docs" / "bench.json").read_text()) == result
    assert set(result["figures"]) == {"sdpa", *config["policies"]}
    assert result["provenance"]["versions"]["torch"]
    for column, figures in result["figures"].items():
        assert figures["prefill_seconds"] > 0
        assert figures["decode_seconds_per_token"] > 0
        plain = result["figures"]["sdpa"]["prefill_seconds"]
        assert figures["prefill_ratio"] == pytest.approx(figures["prefill_seconds"] / plain)
        assert column in console.file.getvalue()


def test_an_eager_query_key_matrix_is_seen():
    model = bench._model({"layers": 1, "dtype": "float32", "seed": 0, "executor": {"device": "cpu"}}, 64)
    model.set_attn_implementation("eager")
    with torch.inference_mode(), bench.LargestTensor() as largest:
        model.model.layers[0].self_attn(
            torch.randn(1, 4096, 576), position_embeddings=(torch.ones(1, 4096, 64),) * 2, attention_mask=None
        )
    assert largest.elements == 9 * 4096**2
    assert largest.shape == [1, 9, 4096, 4096]


def test_a_view_that_allocates_nothing_is_not_counted():
    with bench.LargestTensor() as largest:
        torch.zeros(1, 8).expand(1000, 8)
    assert largest.elements == 8


@pytest.mark.parametrize("column", ["namm", "h2o"])
def test_no_policy_makes_a_query_key_matrix(config, column):
    peak = bench._peak(config | {"peak_length": 4096, "update_interval": 512}, column)
    assert peak["largest_tensor_elements"] < peak["query_key_matrix_elements"] == 4096**2
