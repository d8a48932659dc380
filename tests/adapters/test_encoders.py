"""Encoders under a memory against their own forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2Model,
)

from namm_transfer import NAMM, adapt, policy
from namm_transfer.adapters.timesformer import TimesformerHost
from namm_transfer.adapters.timm_vit import TimmHost
from namm_transfer.adapters.video_encoder import VideoEncoderHost
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError
from namm_transfer.network import NUM_PARAMETERS

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def vivit() -> tuple[nn.Module, dict]:
    config = VivitConfig(image_size=32, num_frames=8, tubelet_size=[2, 8, 8], num_labels=5, **SMALL)
    return VivitForVideoClassification(config), {"pixel_values": torch.randn(2, 8, 3, 32, 32)}


def videomae() -> tuple[nn.Module, dict]:
    config = VideoMAEConfig(image_size=32, patch_size=8, num_frames=8, tubelet_size=2, num_labels=5, **SMALL)
    return VideoMAEForVideoClassification(config), {"pixel_values": torch.randn(2, 8, 3, 32, 32)}


def vjepa2() -> tuple[nn.Module, dict]:
    config = VJEPA2Config(
        patch_size=8, crop_size=32, frames_per_clip=8, tubelet_size=2, hidden_size=48, num_attention_heads=4,
        num_hidden_layers=2, mlp_ratio=2, pred_hidden_size=48, pred_num_attention_heads=4, pred_num_hidden_layers=1,
    )  # fmt: skip
    return VJEPA2Model(config), {"pixel_values_videos": torch.randn(2, 8, 3, 32, 32), "skip_predictor": True}


def timesformer(attention_type: str = "divided_space_time") -> tuple[nn.Module, dict]:
    config = TimesformerConfig(image_size=64, patch_size=8, num_frames=4, attention_type=attention_type, **SMALL)
    return TimesformerModel(config), {"pixel_values": torch.randn(2, 4, 3, 64, 64)}


def timesformer_joint() -> tuple[nn.Module, dict]:
    return timesformer("joint_space_time")


def vit() -> tuple[nn.Module, dict]:
    return ViTModel(ViTConfig(image_size=64, patch_size=8, **SMALL)), {"pixel_values": torch.randn(2, 3, 64, 64)}


def dinov2_registers() -> tuple[nn.Module, dict]:
    config = Dinov2WithRegistersConfig(image_size=64, patch_size=8, num_register_tokens=3, mlp_ratio=2, **SMALL)
    return Dinov2WithRegistersModel(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def timm_vit(name: str = "vit_tiny_patch16_224", **options: object) -> tuple[nn.Module, dict]:
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.create_model(name, **size, **options)
    return model, {"x": torch.randn(2, 3, 64, 64)}


def timm_registers() -> tuple[nn.Module, dict]:
    return timm_vit("vit_small_patch14_reg4_dinov2")


def timm_eva() -> tuple[nn.Module, dict]:
    return timm_vit("eva02_tiny_patch14_224")


def timm_map_pool() -> tuple[nn.Module, dict]:
    return timm_vit("vit_base_patch16_siglip_224")


class OwnViT(timm.models.VisionTransformer):
    """A class outside timm."""


def timm_own_class() -> tuple[nn.Module, dict]:
    model = OwnViT(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5, reg_tokens=2)
    return model, {"x": torch.randn(2, 3, 64, 64)}


def timm_within() -> tuple[nn.Module, dict]:
    model, inputs = timm_registers()
    return nn.Sequential(model, nn.LayerNorm(5)), {"input": inputs["x"]}


HOSTS: dict[str, tuple[Callable[[], tuple[nn.Module, dict]], type]] = {
    "vivit": (vivit, VideoEncoderHost),
    "videomae": (videomae, VideoEncoderHost),
    "vjepa2": (vjepa2, VideoEncoderHost),
    "vit": (vit, VideoEncoderHost),
    "dinov2_registers": (dinov2_registers, VideoEncoderHost),
    "timesformer": (timesformer, TimesformerHost),
    "timesformer_joint": (timesformer_joint, TimesformerHost),
    "timm_vit": (timm_vit, TimmHost),
    "timm_registers": (timm_registers, TimmHost),
    "timm_eva": (timm_eva, TimmHost),
    "timm_map_pool": (timm_map_pool, TimmHost),
    "timm_own_class": (timm_own_class, TimmHost),
    "timm_within": (timm_within, TimmHost),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, dict, type]:
    build, adapter = HOSTS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, inputs = build()
    return model.eval(), inputs, adapter


def output(call: Callable, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        out = call(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("name", ["full", "namm", "h2o", "tova", "snapkv", "key_norm", "streaming", "random"])
def test_nothing_evicted_is_the_model_itself(host: tuple[nn.Module, dict, type], name: str) -> None:
    model, inputs, adapter = host
    before = output(model, inputs)
    chosen = {
        "full": lambda: policy("full"),
        "namm": lambda: policy("namm", namm=NAMM()),  # all scores are zero: kept
    }.get(name, lambda: policy(name, budget=1.0))()
    with adapt(model, chosen, update_interval=16) as adapted:
        assert type(adapted) is adapter
        torch.testing.assert_close(output(adapted, inputs), before, atol=1e-5, rtol=0)
        assert adapted.stats().kept_fraction == 1.0
    assert torch.equal(output(model, inputs), before)


def test_evictions_happen_in_every_layer_and_change_the_output(host: tuple[nn.Module, dict, type]) -> None:
    model, inputs, _ = host
    before = output(model, inputs)
    flat = torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0)) * 0.1
    for chosen in (policy("namm", namm=NAMM.from_vector(flat), budget=0.3), policy("random", budget=0.3)):
        with adapt(model, chosen, update_interval=16) as adapted:
            after = output(adapted, inputs)
            stats = adapted.stats()
            passes = [done for calls in adapted.memory.layers.values() for done in calls]
        assert (after - before).norm() > 1e-3 * before.norm()
        for retained, done in zip(stats.retained, passes, strict=True):
            # a temporal module of TimeSformer sees few frames: fewer queries than an interval, so no decision
            expected = round(0.3 * done.count) if done.count > 16 else done.count
            assert retained.unique().tolist() == [expected * done.rows // 2]
    assert torch.equal(output(model, inputs), before)


def test_batch_neighbours_change_nothing(host: tuple[nn.Module, dict, type]) -> None:
    model, inputs, _ = host
    with adapt(model, policy("h2o", budget=0.4), update_interval=32) as adapted:
        both = output(adapted, inputs)
        alone = output(adapted, {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_special_tokens_are_read_out_last() -> None:
    """The class token's query must see only what the last decision left."""
    model, inputs = vivit()
    with adapt(model.eval(), policy("streaming", budget=4, sinks=0), update_interval=16) as adapted:
        output(adapted, inputs)
        retained = adapted.memory.retained()
    # 65 tokens: class token 0, then 64 tubelets in temporal order; the class token is the newest, so it stays
    assert retained[0][0][0].tolist() == [62, 63, 64, 0]


@pytest.mark.parametrize(("build", "special"), [(timm_vit, 1), (timm_own_class, 3), (timm_within, 5), (timm_eva, 1)])
def test_timms_special_tokens_are_counted_wherever_the_transformer_is(build: Callable, special: int) -> None:
    found = adapt(build()[0], policy("full")).modules()
    assert list(found.values()) == [special, special]


def test_statistics_of_layers_with_other_numbers_of_tokens() -> None:
    """TimeSformer's temporal modules see 64 patches over 4 frames and never decide, the spatial ones 65 tokens."""
    model, inputs = timesformer()
    with adapt(model.eval(), policy("full"), update_interval=16) as adapted:
        output(adapted, inputs)
        stats = adapted.stats()
    assert (stats.kept_fraction, stats.kept_fraction_by_row) == (1.0, [1.0, 1.0])
    assert (stats.kept_at_updates, stats.kept_by_row, stats.updates_by_row) == (None, [None, None], [0, 0])
    with adapt(model, policy("h2o", budget=0.2), update_interval=16) as adapted:
        output(adapted, inputs)
        stats = adapted.stats()
    # an input has 64 temporal sequences of 4 tokens, and 4 spatial ones of 65, of which 13 stay after a decision
    expected = (64 * 4 + 4 * 13) / (64 * 4 + 4 * 65)
    assert stats.kept_fraction == pytest.approx(expected)
    assert stats.kept_fraction_by_row == pytest.approx([expected] * 2)
    assert stats.kept_by_row == pytest.approx([13 / 65] * 2)
    assert stats.updates_by_row == [2 * 4 * 4] * 2  # layers, frames, decisions of each
    assert stats.kept_at_updates == pytest.approx(13 / 65)


def test_attention_work_shrinks() -> None:
    model, inputs = vivit()
    with adapt(model.eval(), policy("key_norm", budget=0.25), update_interval=16) as adapted:
        output(adapted, inputs)
        work = adapted.memory.attention_work()
    # 65 queries: 16 see 65 keys, 49 see 16
    assert work == pytest.approx((16 * 65 + 49 * 16) / 65**2)


CARRIES = [name for name in HOSTS if name != "timesformer"]


@pytest.mark.parametrize("name", CARRIES)
@pytest.mark.parametrize("chosen", ["full", "h2o"])
def test_carried_with_nothing_evicted_is_the_model_itself(name: str, chosen: str) -> None:
    model, inputs = HOSTS[name][0]()
    before = output(model.eval(), inputs)
    kept = policy("full") if chosen == "full" else policy("h2o", budget=1.0)
    with adapt(model, kept, update_interval=16, carried=True) as adapted:
        torch.testing.assert_close(output(adapted, inputs), before, atol=1e-5, rtol=0)
        assert adapted.memory.attention_work() == 1.0


@pytest.mark.parametrize("name", CARRIES)
@pytest.mark.parametrize("chosen", ["h2o", "random", "namm", "key_norm"])
def test_what_all_heads_evicted_is_gone_for_later_layers(name: str, chosen: str) -> None:
    model, inputs = HOSTS[name][0]()
    flat = torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0)) * 0.1
    options = {"namm": NAMM.from_vector(flat)} if chosen == "namm" else {}
    with adapt(model.eval(), policy(chosen, budget=0.2, **options), update_interval=16, carried=True) as adapted:
        both = output(adapted, inputs)
        carried, work = adapted.memory.retained(), adapted.memory.attention_work()
        assert set(adapted.stats().updates_by_row) != {0}
    with adapt(model, policy(chosen, budget=0.2, **options), update_interval=16) as adapted:
        output(adapted, inputs)
        alike, work_by_layer = adapted.memory.retained(), adapted.memory.attention_work()
    first, second = carried
    special = adapted.memory.modules[next(iter(adapted.memory.modules))]
    for row, (before, after) in enumerate(zip(first, second, strict=True)):
        left = set(torch.cat(before).tolist()) | set(range(special))
        assert set(torch.cat(after).tolist()) <= left
        assert [x.tolist() for x in before] == [x.tolist() for x in alike[0][row]], "the first layer is untouched"
    assert work < work_by_layer
    # rows of other lengths are read as they are alone
    with adapt(model, policy(chosen, budget=0.2, **options), update_interval=16, carried=True) as adapted:
        single = output(adapted, {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    if chosen != "random":  # which draws by row
        torch.testing.assert_close(both[1:], single, atol=1e-5, rtol=0)


def test_carried_work_is_that_of_the_tokens_left() -> None:
    """One head's choice is every head's, so that a fifth is left: 13 queries, and the class token, see 13 keys."""
    model, inputs = vivit()
    with adapt(model.eval(), policy("streaming", budget=13, sinks=0), update_interval=16, carried=True) as adapted:
        output(adapted, inputs)
        work = adapted.memory.attention_work()
    first = 16 * 65 + 49 * 13
    assert work == pytest.approx((first + 13 * 13) / 2 / 65**2)  # the class token is among the 13


def test_layers_over_other_tokens_cannot_carry() -> None:
    model, inputs = timesformer()
    with (
        adapt(model.eval(), policy("h2o", budget=0.5), update_interval=16, carried=True) as adapted,
        pytest.raises(UnsupportedModelError, match="8 rows to 65 tokens, an earlier layer in 128 rows to 4"),
    ):
        output(adapted, inputs)


def test_a_host_outside_its_block_is_no_silent_no_op() -> None:
    model, inputs = vivit()
    adapted = adapt(model.eval(), policy("key_norm", budget=0.5))
    with pytest.raises(CacheError, match="did nothing"):
        adapted(**inputs)


def test_an_interval_that_no_decision_falls_within_is_no_silent_no_op() -> None:
    model, inputs = vivit()
    with (
        adapt(model.eval(), policy("key_norm", budget=0.5), update_interval=80) as adapted,
        pytest.raises(CacheError, match="at most 65 tokens.*update_interval=80.*multiple of 16 below 65"),
    ):
        output(adapted, inputs)
    with adapt(model, policy("full"), update_interval=80) as adapted:  # has nothing to decide
        output(adapted, inputs)
        assert adapted.stats().kept_fraction == 1.0


def test_a_population_has_a_row_for_every_input() -> None:
    """Each row under its own parameters is what it gets alone under them; another number of rows is refused."""
    model, inputs = vivit()
    vectors = torch.randn(2, NUM_PARAMETERS, generator=torch.Generator().manual_seed(1)) * 0.1
    members = [policy("namm", namm=NAMM.from_vector(vector), budget=0.3) for vector in vectors]
    population = policy("namm", namm=NAMM(), vectors=vectors, budget=0.3)
    with adapt(model.eval(), population, update_interval=16) as adapted:
        together = output(adapted, inputs)
        for rows in (1, 3):
            with pytest.raises(ConfigError, match=f"vectors has 2 rows, but the batch has {rows}"):
                output(adapted, {"pixel_values": torch.randn(rows, 8, 3, 32, 32)})
    for row, member in enumerate(members):
        with adapt(model, member, update_interval=16) as adapted:
            alone = output(adapted, {"pixel_values": inputs["pixel_values"][row : row + 1]})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_a_layer_with_several_rows_per_input_cannot_carry_a_population() -> None:
    model, inputs = timesformer()
    population = policy("namm", namm=NAMM(), vectors=torch.zeros(2, NUM_PARAMETERS))
    with (
        adapt(model.eval(), population, update_interval=16) as adapted,
        pytest.raises(ConfigError, match="attends in 128 rows for 2 inputs.*cannot carry a population"),
    ):
        output(adapted, inputs)


def test_attention_among_channels_is_refused() -> None:
    model = timm.create_model("xcit_nano_12_p16_224", img_size=96, depth=2, num_classes=3).eval()
    with (
        adapt(model, policy("h2o", budget=0.5), 16) as host,
        pytest.raises(UnsupportedModelError, match="XCA was given 36 tokens and attends among 32 of something else"),
    ):
        host(torch.rand(1, 3, 96, 96))


@pytest.mark.parametrize("build", [timesformer, timesformer_joint, vivit, timm_vit])
def test_a_call_of_the_model_itself_is_not_evicted(build: Callable) -> None:
    model, inputs = build()
    with torch.no_grad(), adapt(model, policy("h2o", budget=0.3), 16) as host:
        first = output(model, inputs)
        host(**inputs)
        passes = {module: len(done) for module, done in host.memory.layers.items()}
        assert torch.equal(output(model, inputs), first)
        assert {module: len(done) for module, done in host.memory.layers.items()} == passes


def test_restored_after_an_error() -> None:
    for build, _ in HOSTS.values():
        model, inputs = build()
        before = output(model.eval(), inputs)
        with pytest.raises(RuntimeError), adapt(model, policy("random", budget=0.5), update_interval=16) as adapted:
            output(adapted, inputs)
            raise RuntimeError
        assert torch.equal(output(model, inputs), before)
