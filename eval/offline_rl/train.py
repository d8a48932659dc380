"""Train a decision transformer on collected episodes, and write it as a host.

The wrapper shows a model K timesteps, a memory of the whole episode up to thousands of tokens; training mixes
window lengths so that one set of weights serves both.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.offline_rl.batches import Batch, WindowSampler
from namm_transfer.eval.offline_rl.behaviour import environment_of
from namm_transfer.eval.offline_rl.collect import MEASURED_SEEDS
from namm_transfer.eval.offline_rl.data import DATA, POLICIES, data_of, policy_of, return_to_ask
from namm_transfer.eval.offline_rl.episodes import Episode
from namm_transfer.eval.offline_rl.host import Normalisation, save_host
from namm_transfer.eval.offline_rl.measure import measure_host, measure_policy
from namm_transfer.eval.offline_rl.scores import ReturnSummary
from namm_transfer.eval.offline_rl.sources import check_environment, read_episodes
from namm_transfer.eval.provenance import digest
from namm_transfer.files import replacing, write_atomically


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Lengths are in timesteps (three tokens each); returns are raw.

    `behaviour` is the folder of the behaviour run; scores are measured against its best policy. What is learned from
    is `data` of it (see `data`), of which a policy's episodes are collected first, `data_timesteps` long; or
    `episodes`, files or data sets (see `sources`). `folder` receives the checkpoint, `host` the finished model.
    `contexts` pairs a window length with its share of the steps. Every step sees `timesteps_per_step`
    timesteps, whatever the length. `dataset` is the Minari id that a policy's episodes are collected under, where
    `namm-transfer/ENVIRONMENT/DATA-v0` is another run's already. `target_return` is what the host will ask for: by
    default what `return_to_ask` of `data` says, for other episodes the best policy's mean return.
    """

    behaviour: Path
    folder: Path
    host: Path
    data: str | None = None
    data_timesteps: int = 200_000
    dataset: str | None = None
    episodes: tuple[Path, ...] = ()
    steps: int = 1_500
    contexts: tuple[tuple[int, float], ...] = ((20, 0.5), (64, 0.2), (128, 0.15), (256, 0.15))
    timesteps_per_step: int = 2_560
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    gradient_norm: float = 1.0
    hidden_size: int = 128
    layers: int = 3
    heads: int = 1
    max_episode_length: int = 1_000
    window: int = 20
    return_scale: float = 1_000.0
    target_return: float | None = None
    start_fraction: float = 0.25
    checkpoint_every: int = 100
    evaluation_episodes: int = 50
    bfloat16: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.episodes):
            raise ConfigError(f"give either data, one of {', '.join(DATA)}, or episodes, a list of files or data sets")
        if self.data is not None and self.data not in DATA:
            raise ConfigError(f"data is {self.data!r}; expected one of {', '.join(DATA)}")
        if self.dataset is not None and self.data not in POLICIES:
            raise ConfigError(f"dataset is read with data={' or data='.join(POLICIES)} only; got {self.dataset!r}")
        shares = [share for _, share in self.contexts]
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"the shares of contexts {self.contexts} have to be >= 0 and add up to 1")
        if min(length for length, _ in self.contexts) < 1:
            raise ConfigError(f"contexts {self.contexts} holds a length below 1 timestep")
        counts = ("steps", "data_timesteps", "timesteps_per_step", "checkpoint_every", "window", "max_episode_length")
        check_at_least_one(self, *counts, "warmup_steps", "evaluation_episodes", "layers", "heads", "hidden_size")
        for name in ("learning_rate", "return_scale", "gradient_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a finite number above 0")
        if not 0 <= self.start_fraction <= 1:
            raise ConfigError(f"start_fraction is {self.start_fraction}; expected a number from 0 to 1")
        if self.hidden_size % self.heads:
            raise ConfigError(f"hidden_size is {self.hidden_size}; expected a multiple of heads, {self.heads}")


def train_decision_transformer(config: TrainingConfig, *, progress: bool = True) -> Path:
    """Collect what is to be learned from, train, or go on training, measure the result and return the host's folder.

    Writes `host` (weights, config.json, normalisation.json, training.json) and `folder`/checkpoint.pt, from
    which an interrupted run goes on as if it had not been interrupted.
    """
    env_id = environment_of(config.behaviour)
    sources: tuple[Path | str, ...] = config.episodes
    if config.data is not None:
        collected = data_of(
            config.behaviour, config.data, config.data_timesteps, dataset=config.dataset, progress=progress
        )
        sources = (collected,)
    read = {source: read_episodes(source) for source in sources}
    episodes = [episode for found in read.values() for episode in found]
    longest = max(episode.length for episode in episodes)
    if longest > config.max_episode_length:
        raise ConfigError(f"an episode has {longest} timesteps; max_episode_length is {config.max_episode_length}")
    for source, found in read.items():
        check_environment(source, found, env_id)
    sampler = WindowSampler(episodes, config.return_scale, config.start_fraction)
    model, losses, seconds = _fit(config, sampler, progress)
    seeds = range(MEASURED_SEEDS, MEASURED_SEEDS + config.evaluation_episodes)
    num_envs = config.evaluation_episodes
    random, behaviour = (
        measure_policy(policy, env_id, seeds, num_envs, progress=progress)
        for policy in (None, policy_of(config.behaviour))
    )
    target = behaviour.mean if config.target_return is None else config.target_return
    if config.target_return is None and config.data not in (None, "expert"):
        target = return_to_ask(config.behaviour, config.data, episodes, seeds, num_envs, progress=progress)
    normalisation = Normalisation(
        env_id=env_id,
        state_mean=tuple(sampler.mean.tolist()),
        state_std=tuple(sampler.std.tolist()),
        return_scale=config.return_scale,
        window=config.window,
        target_return=target,
        random=random,
        behaviour=behaviour,
    )
    save_host(config.host, model, normalisation)
    result = measure_host(config.host, seeds, num_envs, progress=progress)
    returns = {"random": random, "behaviour": behaviour, "window": result}
    _write_record(config, normalisation, episodes, losses, seconds, returns)
    return config.host


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.learning_rate * warm * 0.5 * (1.0 + float(np.cos(np.pi * step / config.steps)))


def action_loss(model: DecisionTransformerModel, batch: Batch) -> torch.Tensor:
    """Mean squared error of the actions over the windows' timesteps."""
    predictions = model(
        states=batch.states,
        actions=batch.actions,
        returns_to_go=batch.returns_to_go,
        timesteps=batch.timesteps,
        attention_mask=batch.mask,
    ).action_preds
    return (predictions.float() - batch.actions)[batch.mask.bool()].square().mean()


def _fit(
    config: TrainingConfig, sampler: WindowSampler, progress: bool
) -> tuple[DecisionTransformerModel, list[dict[str, float]], float]:
    """Return the model, its loss by step, and the seconds spent over all parts of an interrupted run."""
    model = _new_model(config, sampler)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    generator = np.random.default_rng(config.seed)
    losses: list[dict[str, float]] = []
    first, spent = 0, 0.0
    checkpoint = config.folder / "checkpoint.pt"
    config.folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(config, sampler)
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        if stored["settings"] != settings:
            raise CheckpointError(f"{checkpoint} is of other settings, {stored['settings']}; use a new folder")
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        generator.bit_generator.state = json.loads(stored["generator"])
        first, losses, spent = stored["step"], stored["losses"], stored["seconds"]
    lengths = [length for length, _ in config.contexts]
    shares = [share for _, share in config.contexts]
    model.train()
    started = time.perf_counter() - spent
    recent: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("decision transformer", total=config.steps, completed=first)
        for step in range(first, config.steps):
            length = int(generator.choice(lengths, p=shares))
            batch = sampler.batch(max(1, config.timesteps_per_step // length), length, generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                loss = action_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
            optimizer.step()
            recent.append(loss.item())
            bar.update(task, completed=step + 1, description=f"decision transformer, loss {recent[-1]:.4f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                losses.append({"step": step + 1, "action_mse": float(np.mean(recent))})
                recent.clear()
                state = {
                    "settings": settings,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": json.dumps(generator.bit_generator.state),
                    "step": step + 1,
                    "losses": losses,
                    "seconds": time.perf_counter() - started,
                }
                with replacing(checkpoint) as partial:
                    torch.save(state, partial)
    return model.eval(), losses, time.perf_counter() - started


def _new_model(config: TrainingConfig, sampler: WindowSampler) -> DecisionTransformerModel:
    # No dropout: a run passes over the data about ten times, and the noise in the actions regularises.
    settings = DecisionTransformerConfig(
        state_dim=sampler.states.shape[1],
        act_dim=sampler.actions.shape[1],
        hidden_size=config.hidden_size,
        n_layer=config.layers,
        n_head=config.heads,
        max_ep_len=config.max_episode_length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # weights are initialised from the global generator
        torch.manual_seed(config.seed)
        return DecisionTransformerModel(settings)


def _settings(config: TrainingConfig, sampler: WindowSampler) -> str:
    """What a checkpoint depends on, as text: not the places, nor what is only measured afterwards."""
    neutral = replace(config, behaviour=Path(), folder=Path(), host=Path(), window=1, target_return=None)
    fields = asdict(replace(neutral, evaluation_episodes=1))
    del fields["dataset"]  # a place, too; checkpoints from before there was one go on
    learned = (sampler.states, sampler.actions, sampler.returns_to_go, sampler.lengths)
    fields["episodes"] = sha256(b"".join(np.ascontiguousarray(array).data for array in learned)).hexdigest()[:16]
    fields["behaviour"] = digest(policy_of(config.behaviour))
    return json.dumps(fields, default=str, sort_keys=True)


def _write_record(
    config: TrainingConfig,
    normalisation: Normalisation,
    episodes: list[Episode],
    losses: list[dict[str, float]],
    seconds: float,
    results: dict[str, ReturnSummary],
) -> None:
    """Write training.json: settings, data, loss and measured returns; no paths, which are a machine's."""
    places = ("behaviour", "episodes", "folder", "host", "dataset")
    settings = {k: v for k, v in asdict(config).items() if k not in places}
    settings |= {"env_id": normalisation.env_id, "target_return": normalisation.target_return}
    returns = np.array([episode.return_raw for episode in episodes])
    quantiles = np.quantile(returns, (0, 0.25, 0.5, 0.75, 1)).tolist()
    record = {
        "settings": settings,
        "data": {
            "files": [path.name for path in config.episodes] if config.data is None else [config.data],
            "episodes": len(episodes),
            "timesteps": int(sum(episode.length for episode in episodes)),
            "return_raw_quantiles": dict(zip(("min", "25%", "50%", "75%", "max"), quantiles, strict=True)),
        },
        "loss": losses,
        "training_seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("gymnasium", "mujoco", "torch", "transformers")},
        "return_raw": {name: asdict(result) for name, result in results.items()},
    }
    write_atomically(config.host / "training.json", json.dumps(record, indent=2) + "\n")
