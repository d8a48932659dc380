"""The invariants of the memory over video LLMs, each against the unmodified model, with real pixel inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from namm_transfer import adapt, policy
from namm_transfer.adapters.causal_lm import CausalLMHost
from namm_transfer.adapters.video_llm import VideoLLMHost, vision_towers
from namm_transfer.attention import AttentionOptions
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import CacheError, ConfigError

from . import checks
from .checks import INTERVAL, KEEPERS, TOLERANCE, evictor
from .hosts import causal_lm, prompt
from .video_hosts import VIDEO_LLMS, batch, pixels, row, video_llm

every_model = pytest.mark.parametrize("name", VIDEO_LLMS)
POLICIES = {"all": KEEPERS["namm"], "namm": evictor("namm"), "h2o": evictor("h2o")}


def under(*names: str) -> pytest.MarkDecorator:
    """Once under each of the named policies; "all" keeps every token."""
    return pytest.mark.parametrize("keep", [POLICIES[n] for n in names], ids=names)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_model
def test_nothing_evicted_is_the_unmodified_model(name: str) -> None:
    assert checks.nothing_evicted(video_llm(name), batch([row(name, 0), row(name, 1)])) <= TOLERANCE


@every_model
@under("all", "namm", "h2o")
def test_text_after_the_video_may_be_split_anyhow(name: str, keep) -> None:
    if VIDEO_LLMS[name].prefix:
        pytest.skip("the whole prompt attends to itself: a prompt in pieces is another one")
    inputs = row(name, 0)
    with_video = inputs["input_ids"].shape[1] - 30
    cuts = ([with_video, 30], [with_video + 3, *[1] * 10, 17])
    assert checks.splits(video_llm(name), inputs, keep, cuts) <= TOLERANCE


@every_model
@under("all", "namm")
def test_left_padding_and_neighbours_change_nothing(name: str, keep) -> None:
    rows = [row(name, 0), row(name, 1, before=4, after=17)]
    assert checks.left_padding(video_llm(name), rows, batch(rows), keep) <= TOLERANCE


@pytest.mark.parametrize("keep", [KEEPERS["full"], POLICIES["namm"]], ids=["full", "namm"])
def test_an_image_within_a_hop_is_seen_whole_in_a_padded_batch(keep) -> None:
    """Few tokens in rows at different points: an image's tokens attend to the later ones of it all the same."""
    name = "gemma3-short"
    rows = [row(name, 0, before=3, after=2), row(name, 1, before=2, after=1)]
    together = batch(rows)
    assert together["input_ids"].shape[1] <= 16
    assert checks.left_padding(video_llm(name), rows, together, keep) <= TOLERANCE
    mask = together["attention_mask"].unsqueeze(-1)
    expected = video_llm(name)(**together).logits  # fewer tokens than an interval: nothing is evicted
    with adapt(video_llm(name), keep, INTERVAL) as host:
        assert checks.distance(host(**together).logits * mask, expected * mask) <= TOLERANCE


@every_model
def test_beam_search_is_the_unmodified_models(name: str) -> None:
    checks.beams(video_llm(name), row(name, 0))


@every_model
def test_a_budget_evicts_in_every_layer(name: str) -> None:
    checks.evicts_everywhere(video_llm(name), row(name, 0), layers=2)


@every_model
def test_the_model_is_restored_and_its_tower_left_alone(name: str) -> None:
    checks.restored(video_llm(name), row(name, 0))


def features(model, name: str) -> Tensor:
    """What the vision part gives the text decoder for one row's pixels."""
    case = VIDEO_LLMS[name]
    call = model.model.get_image_features if case.kind == "image" else model.model.get_video_features
    found = call(**pixels(name, 0), return_dict=True).pooler_output
    return torch.cat([x.flatten(0, -2) for x in found]) if isinstance(found, tuple | list) else found.flatten(0, -2)


@every_model
def test_a_tower_that_keeps_everything_gives_the_same_features(name: str) -> None:
    model, inputs = video_llm(name), row(name, 0)
    expected, logits = features(model, name), model(**inputs).logits
    for keep in KEEPERS.values():
        with adapt(model, KEEPERS["full"], INTERVAL, vision=keep, vision_interval=16) as host:
            assert checks.distance(host(**inputs).logits, logits) <= TOLERANCE
            assert host.vision_stats().kept_fraction == 1.0
            with host.vision_memory.listening():
                assert checks.distance(features(model, name), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["llava-siglip", "llava-next-video", "llava-onevision", "qwen2-vl", "internvl", "smolvlm"]
)
def test_a_tower_under_a_budget_evicts(name: str) -> None:
    model, inputs = video_llm(name), row(name, 0)
    before, logits = checks.implementations(model), model(**inputs).logits
    with adapt(model, KEEPERS["full"], INTERVAL, vision=evictor("h2o"), vision_interval=16) as host:
        ours = host(**inputs).logits
        stats, text = host.vision_stats(), host.stats()
    assert checks.implementations(model) == before
    assert text.kept_fraction == 1.0
    assert (stats.retained < torch.tensor(stats.seen).view(1, -1, 1)).all()
    assert checks.distance(ours, logits) > 1e-3


def test_a_tower_whose_policy_never_decides_is_no_silent_no_op() -> None:
    with (
        adapt(video_llm("llava"), KEEPERS["full"], INTERVAL, vision=evictor("h2o"), vision_interval=32) as host,
        pytest.raises(CacheError, match="CLIPVisionModel: its layers attend to at most 17 tokens"),
    ):
        host(**row("llava", 0))


def test_a_tower_is_asked_while_generating() -> None:
    model, inputs = video_llm("llava-next-video"), row("llava-next-video", 0)
    with adapt(model, evictor(), INTERVAL, vision=evictor("h2o"), vision_interval=16) as host:
        first = checks.greedy(host.generate, inputs)[1][:, 0]
        assert host.vision_stats().kept_fraction < 0.9
        assert host.stats().kept_fraction < 0.5
        assert checks.distance(first, host(**inputs).logits[:, -1]) <= TOLERANCE


def test_a_call_without_pixels_leaves_the_tower_alone() -> None:
    with adapt(video_llm("llava"), evictor(), INTERVAL, vision=evictor("h2o")) as host:
        host(input_ids=prompt(1, 50))
        with pytest.raises(CacheError, match="no call with images or videos"):
            host.vision_stats()


def test_pixels_that_are_none_leave_the_tower_alone() -> None:
    with adapt(video_llm("llava"), evictor(), INTERVAL, vision=evictor("h2o")) as host:
        host(input_ids=prompt(1, 50), pixel_values=None)
        assert host.vision_memory is None


@pytest.mark.parametrize("frames", [4, 5, 6])
def test_images_and_videos_in_one_call_are_one_input_of_the_tower(frames: int) -> None:
    module = torch.nn.Identity()
    memory = EncoderMemory(evictor("h2o"), 16, {module: 0})
    for rows in (3, frames):
        query = torch.randn(rows, 2, 40, 8, generator=torch.Generator().manual_seed(rows))
        memory.attend(module, query, query, query, None, AttentionOptions())
    stats = memory.stats()
    assert stats.seen == [3 * 40] and len(stats.retained) == 2
    assert 0 < stats.kept_fraction < 1


def test_towers_are_found_by_structure() -> None:
    found = {name: [type(t).__name__ for t in vision_towers(video_llm(name))] for name in VIDEO_LLMS}
    assert found["llava"] == ["CLIPVisionModel"]
    assert found["llava-siglip"] == found["gemma3"] == ["SiglipVisionModel"]
    assert len(found["video-llava"]) == 2
    assert all(found.values())
    assert isinstance(adapt(video_llm("llava"), policy("full")), VideoLLMHost)
    assert type(adapt(causal_lm("llama"), policy("full"))) is CausalLMHost


def test_wrong_vision_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="vision must be a policy"):
        adapt(video_llm("llava"), policy("full"), vision="h2o")
    with pytest.raises(ConfigError, match="vision_interval has no effect"):
        adapt(video_llm("llava"), policy("full"), vision_interval=16)
    with pytest.raises(ConfigError, match="multiple of 16"):
        adapt(video_llm("llava"), policy("full"), vision=policy("full"), vision_interval=20)
