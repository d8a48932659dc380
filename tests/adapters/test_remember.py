"""A video that is remembered as it comes: the same as one prompt, in memory that does not grow with it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from math import prod

import pytest
import torch
from torch import Tensor

from namm_transfer import adapt, policy
from namm_transfer.adapters.video_memory import VideoMemory
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError

from . import checks
from .checks import INTERVAL, KEEPERS, TOLERANCE, evictor
from .hosts import VISION_END, VISION_START, causal_lm
from .video_hosts import FRAMES, SIZE, VIDEO_LLMS, pixels, row, video_llm

REFUSED = {
    "llava-next": "needs image_sizes",
    "paligemma": "whole prompt attends to itself",
}
GRIDS = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
SERVED = [name for name in VIDEO_LLMS if name not in REFUSED]
MARKS = ((VISION_START,), (VISION_END,))
HOST = "llava-next-video"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def parts(name: str) -> tuple[Tensor, Tensor, dict, Tensor]:
    """One prompt taken apart: what stands before the video, its frames [n, 3, S, S] (on a grid: steps of patches
    [n, P, D]), marks, and the question."""
    ids = row(name, 0)["input_ids"][0].tolist()
    case, shown = VIDEO_LLMS[name], pixels(name, 0)
    shape = (3, SIZE, SIZE) if name not in GRIDS else (prod(case.extra["video_grid_thw"][0][1:]), case.pixels[1][-1])
    frames = shown[case.pixels[0]].reshape(-1, *shape)
    start, end = ids.index(VISION_START), len(ids) - ids[::-1].index(VISION_END)
    if case.kind == "image" or case.spans > 1:
        return torch.tensor(ids[:start]), frames, {"marks": MARKS}, torch.tensor([ids[end:]])
    return torch.tensor(ids[: start + 1]), frames, {}, torch.tensor([ids[end - 1 :]])


def batches(name: str, frames: Tensor, sizes: int | list[int]) -> list:
    """The frames, cut into what a host takes."""
    cut = frames.split(sizes)
    if name not in GRIDS:
        return list(cut)
    height, width = VIDEO_LLMS[name].extra["video_grid_thw"][0][1:]
    grids = [torch.tensor([[len(part), height, width]]) for part in cut]
    return [{"pixel_values_videos": x.flatten(0, 1), "video_grid_thw": g} for x, g in zip(cut, grids, strict=True)]


def remembered(host, name: str = HOST, sizes: tuple[int, ...] = (2, 4)) -> VideoMemory:
    before, frames, marks, _ = parts(name)
    return host.remember(frames.split([*sizes, len(frames) - sum(sizes)]), before=before, **marks)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_remember_then_ask_is_the_unmodified_models_answer_to_one_prompt(name: str, keep) -> None:
    before, frames, marks, question = parts(name)
    model, whole = video_llm(name), row(name, 0)
    logits = model(**whole).logits[:, -question.shape[1] :]
    tokens, step_logits = checks.greedy(model.generate, whole)
    with adapt(model, keep, INTERVAL) as host:
        memory = host.remember(batches(name, frames, 1), before=before, **marks)
        assert checks.distance(host(input_ids=question, memory=memory).logits, logits) <= TOLERANCE
        ours, our_logits = checks.greedy(lambda **x: host.generate(**x, memory=memory), {"input_ids": question})
    assert memory.frames == len(frames) * (1 + (name in GRIDS))
    assert torch.equal(ours, tokens)
    assert checks.distance(our_logits, step_logits) <= TOLERANCE


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("rule", ["namm", "h2o"])
def test_any_batches_of_frames_give_what_one_prompt_gives_under_a_budget(name: str, rule: str) -> None:
    before, frames, marks, question = parts(name)
    with adapt(video_llm(name), evictor(rule), INTERVAL) as host:
        expected = host(**row(name, 0)).logits[:, -question.shape[1] :]
        stats = host.stats()
        for sizes in ([len(frames)], [1] * len(frames), [len(frames) // 2, len(frames) - len(frames) // 2]):
            memory = host.remember(iter(batches(name, frames, sizes)), before=before, **marks)
            held = memory.stats()
            assert checks.distance(host(input_ids=question, memory=memory).logits, expected) <= TOLERANCE
            ours = host.stats()
            assert torch.equal(ours.retained, stats.retained)
            assert (ours.seen, ours.updates, ours.kept_at_updates) == (stats.seen, stats.updates, stats.kept_at_updates)
            assert held.seen[0] + question.shape[1] + (name == "llava-onevision") == stats.seen[0]


@pytest.mark.parametrize("name", REFUSED)
def test_hosts_whose_structure_forbids_it_say_why(name: str) -> None:
    frames = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with (
        adapt(video_llm(name), evictor(), INTERVAL) as host,
        pytest.raises(UnsupportedModelError, match=REFUSED[name]),
    ):
        host.remember([frames], marks=MARKS)


def test_frames_that_depend_on_their_neighbours_are_noticed(monkeypatch) -> None:
    model = video_llm(HOST)
    encode = type(model.model).get_video_features

    def mixed(self, pixel_values_videos, **options):
        out = encode(self, pixel_values_videos, **options)
        out.pooler_output = out.pooler_output + out.pooler_output.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(type(model.model), "get_video_features", mixed)
    with adapt(model, evictor(), INTERVAL) as host, pytest.raises(UnsupportedModelError, match="depend on the frames"):
        remembered(host)


def contents(memory: VideoMemory) -> list[Tensor]:
    return [layer.tokens[name].clone() for layer in memory.cache.layers for name, _ in layer.tokens]


def test_asking_leaves_the_memory_as_it_is() -> None:
    question = parts(HOST)[3]
    with adapt(video_llm(HOST), evictor(), INTERVAL) as host:
        memory = remembered(host)
        before, stats = contents(memory), memory.stats()
        first, second = (
            host.generate(input_ids=question, memory=memory, max_new_tokens=40, min_new_tokens=40) for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.shape[1] == question.shape[1] + 40
        assert host.stats().seen[0] == stats.seen[0] + first.shape[1] - 1
    assert all(torch.equal(a, b) for a, b in zip(contents(memory), before, strict=True))
    assert memory.stats().seen == stats.seen


@pytest.mark.parametrize("name", [HOST, "llava-onevision", "internvl"])
def test_padded_questions_are_answered_as_each_alone(name: str) -> None:
    long = parts(name)[3]
    short = long[:, 7:]
    ids = torch.cat([long, torch.nn.functional.pad(short, (7, 0))])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with adapt(video_llm(name), evictor(), INTERVAL) as host:
        memory = remembered(host, name)

        def ask(**inputs):
            return checks.greedy(lambda **x: host.generate(**x, memory=memory), inputs)

        tokens, logits = ask(input_ids=ids, attention_mask=mask)
        for i, question in enumerate((long, short)):
            alone, alone_logits = ask(input_ids=question)
            assert torch.equal(alone[0], tokens[i])
            assert checks.distance(alone_logits[0], logits[i]) <= TOLERANCE


@pytest.mark.parametrize("name", [HOST, "llava-onevision", "gemma3"])
def test_a_saved_memory_goes_on_where_it_stood(name: str, tmp_path) -> None:
    before, frames, marks, question = parts(name)
    times = torch.arange(len(frames)) / 4
    stamped = list(zip(frames.split(1), times.split(1), strict=True))
    keep = evictor()
    with adapt(video_llm(name), keep, INTERVAL) as host:
        whole = host.remember(stamped, before=before, **marks)
        expected = host(input_ids=question, memory=whole).logits
        saved: list[int] = []

        def save(memory: VideoMemory) -> None:
            memory.save(tmp_path / "memory.safetensors")
            saved.append(memory.frames)

        host.remember(stamped[:3], memory=VideoMemory(host.new_cache(), about={"video": "a.mp4"}), before=before,
                      after_batch=save, **marks)  # fmt: skip
        assert saved == [1, 2, 3]
        again = VideoMemory.load(tmp_path / "memory.safetensors", keep)
        assert (again.frames, again.timestamp, again.about) == (3, 0.5, {"video": "a.mp4"})
        host.remember(stamped[again.frames :], memory=again)
        assert torch.equal(host(input_ids=question, memory=again).logits, expected)
    assert (again.frames, again.timestamp) == (whole.frames, whole.timestamp)


@pytest.mark.filterwarnings("ignore:the video passes token")
def test_memory_does_not_grow_with_the_video() -> None:
    """Neither the frames nor the features of the past are alive, and the tokens take the same bytes throughout."""
    model, alive, features, sizes = video_llm(HOST), weakref.WeakSet(), weakref.WeakSet(), []
    counts: list[tuple[int, int]] = []

    def camera(count: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            counts.append((len(alive), len(features)))
            frames = torch.randn(3, 3, SIZE, SIZE, generator=generator)
            alive.add(frames)
            yield frames

    hook = model.model.multi_modal_projector.register_forward_hook(lambda *x: features.add(x[2]))
    try:
        with adapt(model, evictor("namm", 40), INTERVAL) as host:
            memory = host.remember(camera(60), after_batch=lambda x: sizes.append(x.stats().bytes["total"]))
    finally:
        hook.remove()
    assert memory.frames == 180
    assert memory.stats().seen[0] == 180 * memory.layout.tokens
    assert max(sizes[5:]) <= max(sizes[:5])
    assert max(frames for frames, _ in counts) <= 2, "the one in hand, and the one before"
    assert max(tensors for _, tensors in counts[3:]) <= 2


def test_the_tower_may_have_a_policy_too() -> None:
    before, frames, _, question = parts(HOST)
    settings = {"vision": evictor("h2o"), "vision_interval": 16}
    with adapt(video_llm(HOST), evictor(), INTERVAL, **settings) as host:
        expected = host(**row(HOST, 0)).logits[:, -question.shape[1] :]
        memory = host.remember(frames.split(2), before=before)
        assert host.vision_stats().kept_fraction < 0.9
        assert checks.distance(host(input_ids=question, memory=memory).logits, expected) <= TOLERANCE


def test_a_video_beyond_the_hosts_positions_is_told_once() -> None:
    limit = video_llm(HOST).config.text_config.max_position_embeddings
    with adapt(video_llm(HOST), evictor("namm", 40), INTERVAL) as host, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memory = host.remember(torch.randn(4, 3, SIZE, SIZE) for _ in range(limit // 48))
    assert memory.stats().seen[0] > limit
    (warning,) = [w for w in said if "max_position_embeddings" in str(w.message)]
    assert str(limit) in str(warning.message)


def test_wrong_inputs_are_named() -> None:
    frames = parts(HOST)[1]
    question = parts(HOST)[3]
    with adapt(video_llm(HOST), evictor(), INTERVAL) as host:
        memory = host.remember([frames, frames[:0], frames[None]])
        assert memory.frames == 2 * FRAMES
        for inputs, message in [
            ({"batches": [frames.byte()]}, r"got torch.uint8 \[6, 3, 32, 32\]; see preprocess"),
            ({"batches": [frames[0]]}, r"got torch.float32 \[3, 32, 32\]"),
            ({"batches": [[1, 2]]}, "got list"),
            ({"batches": [], "memory": memory, "before": [1]}, "has begun already"),
            ({"batches": [], "memory": memory, "marks": MARKS}, "settled with the first frame"),
            ({"batches": [frames[..., :16]], "memory": memory}, r"of shape \(3, 32, 32\), but a batch came with"),
            ({"batches": [], "before": [[1], [2]]}, "before must be token ids"),
            ({"batches": [], "before": "hello"}, "before must be token ids .* got 'hello'"),
            ({"batches": [(frames,)]}, "a pair of them and their times; got 1 things"),
            ({"batches": [torch.zeros(2, 3, 32, 48)]}, r"does not take frames of shape \(3, 32, 48\): "),
        ]:
            with pytest.raises(ConfigError, match=message):
                host.remember(**inputs)
        for inputs, message in [
            ({"input_ids": question, "memory": memory.cache}, "what host.remember returned; got MemoryCache"),
            ({"input_ids": question, "past_key_values": host.new_cache()}, "two memories"),
            ({"max_new_tokens": 3}, "memory needs input_ids"),
            ({"input_ids": question, "attention_mask": question[:, 1:]}, r"expected \(1, 31\)"),
        ]:
            with pytest.raises(ConfigError, match=message):
                host.generate(**{"memory": memory} | inputs)
    with adapt(video_llm("gemma3"), evictor(), INTERVAL) as host, pytest.raises(ConfigError, match="marks="):
        host.remember([frames])


def test_a_memory_of_other_settings_is_refused() -> None:
    """A host would go on under the memory's policy, not its own."""
    before, frames, _, question = parts(HOST)
    with adapt(video_llm(HOST), evictor("namm", 40), INTERVAL) as host:
        memory = host.remember([frames], before=before)
    for keep, interval, message in [
        (evictor("h2o", 40), INTERVAL, "made with policy {'name': 'namm'"),
        (evictor("namm", 41), INTERVAL, "made with policy"),
        (evictor("namm", 40), 2 * INTERVAL, f"made with update_interval {INTERVAL}, but the host has {2 * INTERVAL}"),
    ]:
        with adapt(video_llm(HOST), keep, interval) as host:
            for call in (
                lambda host=host: host.remember([frames], memory=memory),
                lambda host=host: host.generate(input_ids=question, memory=memory, max_new_tokens=2),
                lambda host=host: host(input_ids=question, past_key_values=memory.cache),
            ):
                with pytest.raises(ConfigError, match=message):
                    call()


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_several_answers_a_row_are_refused(name: str) -> None:
    model = video_llm("llava-next-video")
    with adapt(model, policy("full"), 16) as host:
        memory = host.remember([torch.rand(4, 3, 32, 32)])
        with pytest.raises(ConfigError, match=f"{name} is 2: a memory is asked for one answer a row"):
            host.generate(input_ids=torch.tensor([[5, 6]]), memory=memory, max_new_tokens=2, **{name: 2})


def test_files_of_something_else_are_refused(tmp_path) -> None:
    keep = evictor()
    with adapt(causal_lm("llama"), keep, INTERVAL) as host:
        host(input_ids=parts(HOST)[3])
        host.cache.save(tmp_path / "text.safetensors")
    with pytest.raises(CacheError, match="not of a video"):
        VideoMemory.load(tmp_path / "text.safetensors", keep)
    with adapt(video_llm(HOST), keep, INTERVAL) as host:
        remembered(host).save(tmp_path / "video.safetensors")
    with pytest.raises(CacheError, match="was saved under the policy"):
        VideoMemory.load(tmp_path / "video.safetensors", evictor("h2o"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "video.safetensors").read_bytes()[:900])
    with pytest.raises(CacheError, match="cannot read a memory"):
        VideoMemory.load(tmp_path / "cut.safetensors", keep)
