"""Motion clips and the packaged video encoders."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.video_classification.clips import FRAMES, MOTIONS, SIDE, make_clip, render
from namm_transfer.eval.video_classification.evaluate import accuracy_by_motion
from namm_transfer.eval.video_classification.host import (
    ARCHITECTURES,
    PACKAGED_HOSTS,
    VideoEncoderProcessor,
    build_model,
    load_host,
    save_host,
    token_grid,
)
from namm_transfer.eval.video_classification.packaged import packaged_clips
from namm_transfer.eval.video_classification.train import TrainConfig, train
from namm_transfer.eval.video_training import Stage

SEEDS = range(64)


def test_a_seed_is_a_clip() -> None:
    np.testing.assert_array_equal(render(make_clip(9)), render(make_clip(9)))
    assert not np.array_equal(render(make_clip(9)), render(make_clip(17)))


def test_any_block_of_seeds_is_balanced() -> None:
    assert set(Counter(make_clip(seed).motion for seed in range(100, 148)).values()) == {6}


def _turning(path: np.ndarray) -> float:
    """Signed area the path sweeps around its middle; positive is clockwise where y grows downwards."""
    x, y = (path - path.mean(axis=0)).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_move_as_labelled(seed: int) -> None:
    clip = make_clip(seed)
    frames = render(clip).astype(int)
    # The brightest channel tells every colour from the dark background.
    lit = frames.max(axis=-1) > 140
    path = np.stack([np.argwhere(mask).mean(axis=0)[::-1] for mask in lit])
    travelled, spread = path[-1] - path[0], np.ptp(path, axis=0)
    if clip.motion == "still":
        assert spread.max() < 0.5
    elif clip.motion in ("left", "right", "up", "down"):
        wanted = np.array({"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[clip.motion])
        assert travelled @ wanted > 20 and abs(travelled @ wanted[::-1]) < 2
    elif clip.motion == "bouncing":
        assert spread[0] < 2 and spread[1] > 15
        assert np.sum(np.diff(np.sign(np.diff(path[:, 1].round(1)))) != 0) >= 3
    else:
        assert spread.min() > 10
        assert (_turning(path) > 0) == (clip.motion == "clockwise")


def test_the_shape_stays_in_sight() -> None:
    for seed in SEEDS:
        clip = make_clip(seed)
        assert clip.path.min() >= 0 and clip.path.max() <= SIDE


def test_no_single_frame_tells_the_motion() -> None:
    """Middle frames of all classes look alike: the mean place of the shape is near the middle for each."""
    for motion in MOTIONS:
        places = [make_clip(seed).path[FRAMES // 2] for seed in range(800) if MOTIONS[seed % 8] == motion]
        np.testing.assert_allclose(np.mean(places, axis=0), SIDE / 2, atol=10)


@pytest.mark.parametrize("shape", [(31, 64, 64, 3), (32, 32, 64, 3), (32, 64, 64)])
def test_processor_refuses_other_frames(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected uint8 frames"):
        VideoEncoderProcessor()(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_host_loads_as_it_was(tmp_path: Path, architecture: str) -> None:
    model = build_model(1, architecture).half().float().eval()
    save_host(model, tmp_path)
    loaded, processor = load_host(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert processor == VideoEncoderProcessor()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # positions that are no weights count too
    pixels = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, states = loaded(pixel_values=pixels), loaded(pixel_values=pixels, output_hidden_states=True)
        torch.testing.assert_close(plain.logits, model(pixels).logits)
    torch.testing.assert_close(states.logits, plain.logits)
    assert all(state.shape[1] - 256 in (0, 1) for state in states.hidden_states)
    assert loaded.config.id2label == dict(enumerate(MOTIONS))
    assert token_grid(loaded) == (16, 4, 4)


def test_an_untrained_host_is_drawn_from_its_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for architecture in ARCHITECTURES:
        first, second = (build_model(seed, architecture).state_dict() for seed in (4, 4))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match="no video encoder 'videomea'; expected one of vivit, videomae, timm_vit"):
        build_model(0, "videomea")


def test_a_film_strip_is_every_second_frame_from_top_to_bottom() -> None:
    strip, seen = build_model(0, "timm_vit"), []
    strip.vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randn(1, FRAMES, 3, SIDE, SIDE)
    strip(pixels)
    for place, frame in enumerate(range(0, FRAMES, 2)):
        assert torch.equal(seen[0][:, :, place * SIDE : (place + 1) * SIDE], pixels[:, frame])


def test_missing_host_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        load_host(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_host_that_cannot_be_read_is_refused(tmp_path: Path, architecture: str) -> None:
    save_host(build_model(1, architecture), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:5000])
    with pytest.raises(CheckpointError, match="no readable video encoder"):
        load_host(tmp_path)
    save_file({"other": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit config.json"):
        load_host(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no readable video encoder"):
        load_host(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="a model of type 'llama'; expected one of vivit"):
        load_host(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_writes_a_host_and_says_how_good_it_is(tmp_path: Path, architecture: str) -> None:
    stages = (Stage("motion", 2, batch=2, learning_rate=1e-3), Stage("motion", 1, batch=2, learning_rate=1e-4))
    config = TrainConfig(architecture=architecture, stages=stages, pool=4, held_out_clips=2)
    model = train(config, tmp_path)
    assert type(model) is type(build_model(0, architecture))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["config"]["architecture"] == architecture
    assert record["held_out"]["all"]["n"] == 2
    assert [(entry["stage"], entry["step"]) for entry in record["history"]] == [(0, 0), (0, 1), (1, 0)]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_manifest_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        packaged_clips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"clips": [{"file": "a.mp4", "seed": 1, "motion": "sideways"}]}')
    with pytest.raises(DataError, match="sideways"):
        packaged_clips(tmp_path)


def test_packaged_clips_are_what_their_seeds_say() -> None:
    clips = packaged_clips()
    assert Counter(clip.motion for clip in clips) == dict.fromkeys(MOTIONS, 3)
    assert all(clip.path.is_file() and make_clip(clip.seed).motion == clip.motion for clip in clips)


@pytest.mark.parametrize(("architecture", "least"), [("vivit", 0.95), ("videomae", 0.8), ("timm_vit", 0.95)])
def test_packaged_host_names_packaged_motions(architecture: str, least: float) -> None:
    folder = PACKAGED_HOSTS[architecture]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    figures = accuracy_by_motion(*load_host(folder), packaged_clips(), total=24)
    assert figures["all"]["n"] == 24
    assert figures["all"]["accuracy"] >= least
