"""The benchmark measures what it says, goes on where it stopped, and its detector of Q x N matrices detects them."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer import kernels
from namm_transfer.configs import compose
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval import bench_host
from namm_transfer.eval.bench import bench
from namm_transfer.eval.bench_peer import Peer
from namm_transfer.network import NAMM, NUM_PARAMETERS

SMALL = [
    "layers=1",
    "lengths=[64,128]",
    "decode=2",
    "repeats=2",
    "update_interval=32",
    "dtype=float32",
    "executor.threads=1",
    "peak_length=0",
    "population=2",
    "population_length=64",
]


@pytest.fixture
def config(tmp_path):
    NAMM.from_vector(torch.ones(NUM_PARAMETERS) * 0.01).save_pretrained(tmp_path / "namm")
    settings = OmegaConf.to_container(compose("bench", SMALL), resolve=True)
    policies = {name: settings["policies"][name] for name in ("worst", "h2o")}
    policies["worst"]["namm"] = str(tmp_path / "namm")
    return settings | {"policies": policies}


def test_figures_come_with_ratios_and_provenance(config, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    summary = bench(config, tmp_path / "bench", console)
    assert json.loads((tmp_path / "bench" / "summary.json").read_text())["time"].keys() == summary["time"].keys()
    assert json.loads((tmp_path / "bench" / "provenance.json").read_text())["starts"][0]["versions"]["torch"]
    assert (tmp_path / "bench" / "ratios.png").stat().st_size > 10_000
    assert list(summary["time"]) == ["sdpa", "worst", "h2o"]
    rows = [json.loads(line) for line in (tmp_path / "bench" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 3 + 3 * 3  # lengths, repeats and a warm-up, columns; and the population
    for column, cells in summary["time"].items():
        for length, cell in cells.items():
            own, plain = (
                {r["repeat"]: r for r in rows if (r["kind"], r["column"], r["length"]) == ("time", c, length)}
                for c in (column, "sdpa")
            )
            ratios = sorted(own[i]["prefill"] / plain[i]["prefill"] for i in (1, 2))  # the warm-up does not count
            assert cell["prefill_ratio_range"] == pytest.approx(ratios)
            assert cell["prefill_ratio"] == pytest.approx(sum(ratios) / 2)
            assert cell["kept_fraction"] == pytest.approx({"h2o": 0.5}.get(column, 1.0), abs=0.02)
        assert column in console.file.getvalue()
        assert f"| {column} |" in (tmp_path / "bench" / "summary.md").read_text()
    half = summary["time"]["h2o"][128]["bytes"]
    assert half < summary["time"]["worst"][128]["bytes"]
    assert summary["population"]["population_over_one"] > 0


def test_it_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    out, console = tmp_path / "bench", Console(file=io.StringIO())
    bench(config, out, console)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:-3]) + lines[-3][:10])  # killed in the middle of a line
    measured = []
    whole = bench_host.BenchHost.population
    monkeypatch.setattr(bench_host.BenchHost, "time", lambda *a: pytest.fail("it was measured before"))
    monkeypatch.setattr(bench_host.BenchHost, "population", lambda *a: measured.append(a) or whole(*a))
    bench(config, out, console)
    assert len(measured) == 3
    assert (out / "rows.jsonl").read_text().startswith("".join(lines[:-3]))
    with pytest.raises(ConfigError, match="decode is 2 there, 3 here"):
        bench(config | {"decode": 3}, out, console)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"repeats": 0}, "repeats is 0; expected an integer of at least 1"),
        ({"lengths": []}, "lengths is"),
        ({"lengths": [64, "x"]}, "lengths is"),
        ({"dtype": "foo"}, "dtype is 'foo'"),
        ({"policies": None}, "policies holds no column"),
        ({"kvpress": "/nowhere/python"}, "expected the python of an environment that has kvpress"),
    ],
)
def test_settings_are_checked_first(config, tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        bench(config | change, tmp_path / "bench", Console(file=io.StringIO()))
    assert not (tmp_path / "bench").exists()


@pytest.fixture
def kvpress():
    """The python of an environment with kvpress, if the tester has one."""
    if python := os.environ.get("KVPRESS_PYTHON"):
        return python
    pytest.skip("KVPRESS_PYTHON is not set")


def test_kvpress_answers(config, kvpress):
    with Peer(kvpress, config) as peer:
        for column in peer.columns:
            answer = peer.time(column, 256)
            assert answer["prefill"] > 0
            assert answer["kept"] == pytest.approx(1.0 if column == "sdpa" else 0.5, abs=0.02)


def test_an_environment_without_kvpress_is_an_error(config, capfd):
    with Peer(sys.executable, config) as peer, pytest.raises(DataError, match="ended with code"):
        peer.time("SnapKV", 64)
    assert "No module named 'kvpress'" in capfd.readouterr().err


def test_an_eager_query_key_matrix_is_seen(config):
    model = bench_host.BenchHost(config).model
    model.set_attn_implementation("eager")
    with torch.inference_mode(), bench_host.LargestTensor() as largest:
        model.model.layers[0].self_attn(
            torch.randn(1, 4096, 576), position_embeddings=(torch.ones(1, 4096, 64),) * 2, attention_mask=None
        )
    assert largest.elements == 9 * 4096**2
    assert largest.shape == [1, 9, 4096, 4096]


def test_a_view_that_allocates_nothing_is_not_counted():
    with bench_host.LargestTensor() as largest:
        torch.zeros(1, 8).expand(1000, 8)
    assert largest.elements == 8


@pytest.mark.parametrize("column", ["worst", "h2o"])
@pytest.mark.parametrize("path", ["kernel", "torch"])
def test_no_policy_makes_a_query_key_matrix(config, column, path, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(kernels, "cpu", lambda: None)
    measured = bench_host._peak(config | {"peak_length": 4096, "update_interval": 512}, column, 4096)
    assert torch.Size(measured["largest"]).numel() < 4096**2
    # a Q x N matrix of one layer in float32 would be 576 MiB
    assert measured["growth"] < 400 * 2**20
