"""Untrained hosts on disk, and the tasks on them."""

import pytest
import torch
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from namm_transfer.eval.offline_rl.host import Normalisation, save_host
from namm_transfer.eval.offline_rl.scores import ReturnSummary
from namm_transfer.eval.rl_tasks import Episodes
from namm_transfer.eval.video_classification import host as encoder_host
from namm_transfer.eval.video_qa import host as llm_host
from namm_transfer.eval.video_tasks import Motion, ShapesQA
from namm_transfer.network import NAMM, NUM_PARAMETERS

ENCODERS = {"vivit": "video_encoder"}
"""Folders that are not called as their architecture."""


@pytest.fixture(scope="session")
def tiny_hosts(tmp_path_factory):
    """Folders of untrained hosts and a random NAMM, by name."""
    root = tmp_path_factory.mktemp("hosts")
    llm_host.save_host(llm_host.build_model(0), root / "video_llm")
    for name in encoder_host.ARCHITECTURES:
        encoder_host.save_host(encoder_host.build_model(0, name), root / ENCODERS.get(name, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DecisionTransformerConfig(
            state_dim=11, act_dim=3, hidden_size=32, n_layer=2, n_head=1, max_ep_len=1000
        )
        model = DecisionTransformerModel(config)
    summary = ReturnSummary(10.0, 1.0, 2)
    save_host(
        root / "dt", model, Normalisation("Hopper-v5", (0.0,) * 11, (1.0,) * 11, 1000.0, 20, 3600.0, summary, summary)
    )
    vector = torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(1)) * 0.1
    NAMM.from_vector(vector).save_pretrained(root / "namm")
    return root


@pytest.fixture
def qa(tiny_hosts):
    return ShapesQA(
        "qa", {"path": str(tiny_hosts / "video_llm"), "device": "cpu", "update_interval": 256}, "packaged", 1, 3
    )


@pytest.fixture
def motion(request, tiny_hosts):
    architecture = getattr(request, "param", "vivit")
    folder = tiny_hosts / ENCODERS.get(architecture, architecture)
    return Motion("motion", {"path": str(folder), "device": "cpu", "update_interval": 64}, "packaged", 2)


@pytest.fixture
def episodes(tiny_hosts):
    return Episodes("hopper", {"path": str(tiny_hosts / "dt"), "device": "cpu", "update_interval": 16}, 3)
