"""The picture lights what is retained and dims what is not, and the counts are those of the memory."""

import base64
import io
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from namm_transfer import policy
from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval.inspect import _rate, inspect, picture
from namm_transfer.eval.inspect_page import write_page
from namm_transfer.eval.lighting import scaled, write_lit_mp4
from namm_transfer.eval.video import decode, write_mp4
from namm_transfer.eval.video_classification.host import ARCHITECTURES


def config(task, kind, **more):
    settings = {"_target_": f"namm_transfer.eval.video_tasks.{kind}", **asdict(task)}
    base = {
        "task": settings,
        "policy": {"name": "streaming", "budget": 0.25, "sinks": 4},
        "clip": 0,
        "frames": 4,
        "seed": 0,
    }
    return base | more


def test_retained_tokens_land_on_their_frames_and_patches(qa):
    frames = decode(qa.clip_path(0)).frames
    retained = qa.retained(frames, policy("streaming", budget=257, sinks=17))
    assert retained.shape == (6, 2, 64, 4, 4)
    # 1,024 visual tokens behind one <bos>; the last decision falls after token 1,024, of which 17 sinks and the
    # newest 240 stay; then comes one more. Sinks: <bos> and the 16 patches of frame 0.
    flat = retained.reshape(6, 2, -1)
    assert flat[:, :, :16].all()
    assert not flat[:, :, 16:783].any()
    assert flat[:, :, 783:].all()
    assert (qa.retained(frames, policy("full"))).all()


@pytest.mark.parametrize("motion", list(ARCHITECTURES), indirect=True)
def test_encoder_patches_are_counted_without_the_class_token(motion):
    frames = decode(motion.clip_path(1)).frames
    assert motion.retained(frames, policy("full")).all()
    half = motion.retained(frames, policy("key_norm", budget=0.5))
    assert half.shape == (4, 4, 16, 4, 4)
    assert np.all(np.abs(half.sum(axis=(2, 3, 4)) - 128) <= 1)


@pytest.mark.parametrize("kind", ["ShapesQA", "Motion"])
def test_inspect_writes_picture_counts_and_provenance(request, tmp_path, kind):
    task = request.getfixturevalue({"ShapesQA": "qa", "Motion": "motion"}[kind])
    inspect(config(task, kind), tmp_path / "out", Console(file=io.StringIO()))
    counts = json.loads((tmp_path / "out" / "retained.json").read_text())
    assert sum(map(sum, counts["retained_by_layer_and_head"])) == counts["retained"]
    assert sum(map(sum, counts["retained_by_layer_and_time_step"])) == counts["retained"]
    assert 0.2 < counts["kept_fraction"] < 0.3
    assert (tmp_path / "out" / "retained.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "provenance.json").is_file()
    clip, video = decode(task.clip_path(0)), decode(tmp_path / "out" / "retained.mp4")
    assert len(video.frames) == len(clip.frames)
    np.testing.assert_allclose(video.timestamps, clip.timestamps, atol=0.01)
    page = (tmp_path / "out" / "retained.html").read_text()
    assert page.count("data:image/jpeg;base64,") == len(clip.frames)
    assert "http" not in page  # whole without a network
    assert page_data(page)["kept"] == pytest.approx(counts["kept_fraction"], abs=1e-9)


def test_a_file_is_told_by_its_own_digest(qa, tmp_path):
    for number in (0, 1):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(qa.clip_path(number).read_bytes())
        inspect(config(qa, "ShapesQA") | {"clip": str(path)}, tmp_path / str(number), Console(file=io.StringIO()))
    first, second = (
        json.loads((tmp_path / name / "provenance.json").read_text())["starts"][0]["inputs"] for name in "01"
    )
    assert first["clips"] != second["clips"] and first["host"] == second["host"]


def page_data(page):
    """What the page's script reads, and the fraction of its bits that are set."""
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["bits"]), np.uint8), bitorder="little")
    return data | {"kept": bits[: np.prod(data["shape"])].mean()}


def test_the_video_lights_each_head_beside_its_layer(tmp_path):
    frames = np.full((6, 40, 60, 3), 200, np.uint8)
    retained = np.zeros((2, 2, 3, 2, 2), bool)  # a step is two frames
    retained[1, 0, 2] = True  # of the second layer the first head, at the end of the clip
    write_lit_mp4(tmp_path / "lit.mp4", frames, retained, 8.0)
    video = decode(tmp_path / "lit.mp4").frames[..., 1].astype(int)
    height, width = scaled(frames[:1], 160).shape[1:3]
    middle = [
        [video[:, row * (height + 4) + height // 2, 64 + column * (width + 4) + width // 2] for column in range(3)]
        for row in range(3)
    ]
    assert np.all(np.abs(middle[0][0] - 200) < 8)  # the clip itself
    for row, column in ((1, 0), (1, 1), (1, 2), (2, 2)):
        assert np.all(np.abs(middle[row][column] - 40) < 8)
    np.testing.assert_allclose(middle[2][1], [40] * 4 + [200] * 2, atol=8)  # the head
    np.testing.assert_allclose(middle[2][0], [40] * 4 + [120] * 2, atol=8)  # half of its layer


def test_a_page_of_a_long_clip_shows_some_of_its_frames(tmp_path):
    frames = np.zeros((600, 8, 8, 3), np.uint8)
    retained = np.zeros((1, 1, 300, 1, 1), bool)
    retained[0, 0, 150:] = True
    write_page(tmp_path / "page.html", frames, np.arange(600) / 25, retained, "</script><b>")
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1
    data = page_data(page)
    assert data["title"] == "</script><b>"
    assert len(data["frames"]) == 256
    assert (data["numbers"][0], data["numbers"][-1], data["steps"][-1]) == (0, 599, 299)
    assert data["kept"] == 0.5


def test_the_picture_is_bright_exactly_where_tokens_are_retained(tmp_path):
    from matplotlib import image

    frames = np.full((2, 64, 64, 3), 255, np.uint8)
    retained = np.zeros((1, 1, 2, 2, 2), bool)
    retained[0, 0, :, 0, 0] = True
    shades = {}
    for name, kept in {"some": retained, "none": retained & False, "all": ~(retained & False)}.items():
        picture(frames, kept, 2, "", tmp_path / f"{name}.png")
        pixels = image.imread(tmp_path / f"{name}.png")[..., 0]
        shades[name] = int((np.abs(pixels - 0.2) < 0.01).sum())  # dimmed white
    assert shades["all"] < 100
    assert shades["none"] > 1000
    assert shades["some"] / shades["none"] == pytest.approx(0.75, abs=0.03)


def test_bad_clips_and_counts_are_refused(motion, tmp_path):
    console = Console(file=io.StringIO())
    for change, kind, message in [
        ({"clip": 24}, ConfigError, "clip is 24; expected 0 to 23"),
        ({"clip": str(tmp_path / "none.mp4")}, VideoError, "no such file"),
        ({"frames": 33}, ConfigError, "frames is 33; expected an integer from 1 to 32"),
    ]:
        with pytest.raises(kind, match=message):
            inspect(config(motion, "Motion", **change), tmp_path / "out", console)
    assert not (tmp_path / "out").exists()


def test_frames_of_one_time_have_a_rate():
    assert _rate(np.zeros(5)) == _rate(np.zeros(1)) == 1.0
    assert _rate(np.arange(9) / 4) == 4.0
    assert _rate(np.array([0.0, 0.1, 100.0])) == 1.0


def test_a_video_too_short_for_a_decision_is_refused(qa, tmp_path):
    write_mp4(tmp_path / "short.mp4", np.zeros((10, 64, 64, 3), np.uint8), 8)
    with pytest.raises(ConfigError, match="'streaming' took no decision: the video has 160 tokens"):
        qa.retained(decode(tmp_path / "short.mp4").frames, policy("streaming", budget=0.1))
