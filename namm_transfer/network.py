"""The NAMM: 4,172 parameters that turn attention spectra into scores.

Shape legend: R rows of a batch, K KV heads, N retained tokens, P parameter vectors (1, or one a row), F = 25 features.

Source: Cetin et al., "An Evolved Universal Transformer Memory", section 3 (backward attention memory: 3.3);
DESIGN.md section 3, steps 5 to 7.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, constants
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from namm_transfer import kernels
from namm_transfer.errors import CheckpointError
from namm_transfer.spectrogram import BINS

__all__ = ["FEATURES", "NAMM", "NUM_PARAMETERS", "Weights", "features", "scores", "unflatten"]

RECENCY = 8
FEATURES = RECENCY + BINS
WIDTH = 32
"""Width of queries, keys and values of the backward attention."""
_SHAPES = {
    "w_qkv": (FEATURES, 3 * WIDTH),
    "b_qkv": (3 * WIDTH,),
    "w_o": (WIDTH, 2 * FEATURES),
    "b_o": (2 * FEATURES,),
    "w": (FEATURES,),
    "b": (),
}
NUM_PARAMETERS = sum(torch.Size(shape).numel() for shape in _SHAPES.values())
_TOKENS_AT_ONCE = 8192
"""Of a batch on the CPU: what is computed of them fits its cache, and memory that is taken once serves them all."""
PACKAGED = Path(__file__).parent / "weights"


class Weights(NamedTuple):
    """A parameter vector (or P of them) by name; the order is that of the flat vector."""

    w_qkv: Tensor
    """[P, 25, 96]"""
    b_qkv: Tensor
    """[P, 96]"""
    w_o: Tensor
    """[P, 32, 50]"""
    b_o: Tensor
    """[P, 50]"""
    w: Tensor
    """[P, 25]"""
    b: Tensor
    """[P]"""


def unflatten(vectors: Tensor) -> Weights:
    """Name the parts of flat parameter vectors [P, 4172]."""
    sizes = [torch.Size(shape).numel() for shape in _SHAPES.values()]
    parts = vectors.split(sizes, dim=-1)
    return Weights(*(p.reshape(-1, *shape) for p, shape in zip(parts, _SHAPES.values(), strict=True)))


def features(recency: Tensor, ema: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The network's input (step 5).

    Args:
        recency: [..., N] newest position minus own position, in tokens.
        ema: [..., N, BINS] moving average of the spectrum.
        mean, var: [BINS] the frozen normaliser.

    Returns:
        [..., N, F]: sines and cosines of the recency, then the normalised spectrum.
    """
    frequency = 50_000.0 ** (-torch.arange(RECENCY // 2, device=ema.device, dtype=torch.float32) / (RECENCY // 2))
    angle = recency.to(torch.float32).unsqueeze(-1) * frequency
    normalised = (ema.to(torch.float32) - mean) / var.sqrt().clamp_min(1e-7)
    return torch.cat([angle.sin(), angle.cos(), normalised], dim=-1)


def scores(
    weights: Weights, x: Tensor, lengths: Tensor | None = None, *, precision: torch.dtype = torch.float32
) -> Tensor:
    """Backward attention and the linear read-out (steps 6 and 7).

    Args:
        weights: of P = 1 network for all rows, or P = R networks, one a row.
        x: [R, K, N, F] features, oldest token first, padded at the end.
        lengths: [R, K] valid tokens of each head; None if all N are valid.
        precision: of the backward attention's products; its softmax and all else are float32.

    Returns:
        [R, K, N] scores; those of padding mean nothing.
    """
    rows, heads, width, _ = x.shape
    together = max(1, _TOKENS_AT_ONCE // max(1, heads * width))
    if rows > together and x.device.type == "cpu":
        each = len(weights.b) == rows
        return torch.cat(
            [
                scores(
                    Weights(*(part[at : at + together] for part in weights)) if each else weights,
                    x[at : at + together],
                    None if lengths is None else lengths[at : at + together],
                    precision=precision,
                )
                for at in range(0, rows, together)
            ]
        )
    # Token i attends to the tokens j >= i. Turned around, that is a causal attention, which never needs an
    # N x N mask; with the padding behind the oldest token, no valid token sees it.
    if lengths is None:
        x = x.flip(2)
        back = None
    else:
        index = torch.arange(width, device=x.device).expand(rows, heads, width)
        back = torch.where(index < lengths.unsqueeze(-1), lengths.unsqueeze(-1) - 1 - index, index)
        x = x.gather(2, back.unsqueeze(-1).expand_as(x))

    flat = x.reshape(rows, heads * width, -1)
    qkv = torch.matmul(flat, weights.w_qkv) + weights.b_qkv.unsqueeze(1)
    q, k, v = qkv.view(rows, heads, width, 3 * WIDTH).split(WIDTH, dim=-1)
    attended = _causal_attention(q.to(precision), k.to(precision), v.to(precision)).float()
    update = torch.matmul(attended.reshape(rows, heads * width, WIDTH), weights.w_o) + weights.b_o.unsqueeze(1)
    residual, factor = update.split(FEATURES, dim=-1)
    out = torch.matmul(flat * (1 + factor) + residual, weights.w.unsqueeze(-1)).squeeze(-1)
    out = (out + weights.b.unsqueeze(-1)).view(rows, heads, width)
    return out.flip(2) if back is None else out.gather(2, back)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[R, K, N, 32] three times -> [R, K, N, 32], scaled by 1 / sqrt(32), without an N x N matrix."""
    kernel = kernels.cpu() if query.device.type == "cpu" and not query.requires_grad else None
    if kernel is None:  # or it has no gradient
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    rows, heads, count, _ = key.shape
    lengths = torch.full((rows, heads), count)
    places = (
        key.reshape(-1, WIDTH),
        value.reshape(-1, WIDTH),
        torch.arange(rows * heads).view(rows, heads) * count,
        lengths,
    )
    packed = kernel.pack(*places, count)
    return kernel.attend(query, *places, count, *packed, count - 1, None, WIDTH**-0.5, 0.0, None, False)[0]


class NAMM(nn.Module, PyTorchModelHubMixin, library_name="namm-transfer", tags=["namm", "kv-cache"]):
    """A neural attention memory model, frozen: one flat parameter vector and the normaliser of its features.

    Attributes:
        vector: [4172] float32, in the order of :class:`Weights`.
        feature_mean, feature_var: [17] float32, frozen after the first generation of evolution.

    Examples:
        >>> namm = NAMM.from_pretrained("default")
        >>> namm.to_vector().shape
        torch.Size([4172])
    """

    feature_mean: Tensor
    feature_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(NUM_PARAMETERS), requires_grad=False)
        self.register_buffer("feature_mean", torch.zeros(BINS))
        self.register_buffer("feature_var", torch.ones(BINS))

    def forward(self, ema: Tensor, recency: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores [R, K, N] from spectra [R, K, N, 17] and recencies [R, K, N] in tokens."""
        return scores(self.weights(), features(recency, ema, self.feature_mean, self.feature_var), lengths)

    def weights(self) -> Weights:
        """The vector by name, with P = 1."""
        return unflatten(self.vector.unsqueeze(0))

    @classmethod
    def from_vector(
        cls, flat: Tensor, *, feature_mean: Tensor | None = None, feature_var: Tensor | None = None
    ) -> Self:
        """Build from a flat vector [4172] and, optionally, the normaliser's mean and variance [17].

        Raises:
            CheckpointError: a length is wrong, a value is not finite, or a variance is negative.
        """
        namm = cls()
        given = {"vector": flat, "feature_mean": feature_mean, "feature_var": feature_var}
        namm.load_state_dict(
            {**namm.state_dict(), **{k: torch.as_tensor(v) for k, v in given.items() if v is not None}}
        )
        return namm

    def to_vector(self) -> Tensor:
        """A copy of the flat parameter vector, [4172] float32."""
        return self.vector.detach().clone()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load, after a check of names, lengths and values.

        Raises:
            CheckpointError: naming what came and what was expected.
        """
        expected = {"vector": NUM_PARAMETERS, "feature_mean": BINS, "feature_var": BINS}
        if set(state_dict) != set(expected):
            raise CheckpointError(f"a NAMM holds the tensors {sorted(expected)}; got {sorted(state_dict)}")
        for name, size in expected.items():
            value = state_dict[name]
            if tuple(value.shape) != (size,):
                raise CheckpointError(f"NAMM tensor {name!r} must have shape ({size},); got {tuple(value.shape)}")
            if not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).sum())
                raise CheckpointError(f"NAMM tensor {name!r} holds {bad} values that are NaN or infinite")
        if (state_dict["feature_var"] < 0).any():
            raise CheckpointError("NAMM tensor 'feature_var' holds negative variances")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a packaged NAMM by name ("default"), a folder, or a repository of the Hub.

        Raises:
            CheckpointError: no such NAMM, or its file is corrupt, truncated, or does not fit.
        """
        given = str(pretrained_model_name_or_path)
        packaged = sorted(p.name for p in PACKAGED.iterdir() if p.is_dir()) if PACKAGED.is_dir() else []
        if given in packaged:
            given = str(PACKAGED / given)
        elif not given or (not Path(given).is_dir() and given.count("/") != 1):
            raise CheckpointError(
                f"no NAMM {given!r}: it is neither packaged (packaged are {packaged}), nor a folder, nor a Hub id "
                "'owner/name'"
            )
        try:
            if Path(given).is_dir():  # the mix-in would print that there is no config.json: a NAMM needs none
                file = str(Path(given) / constants.SAFETENSORS_SINGLE_FILE)
                return cls._load_as_safetensor(cls(), file, kwargs.get("map_location", "cpu"), strict=True)
            return super().from_pretrained(given, **kwargs)
        except (SafetensorError, OSError, KeyError, RuntimeError, HFValidationError) as error:
            raise CheckpointError(f"cannot load a NAMM from {given!r}: {error}") from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(model_file), strict=strict)
        return model.to(map_location)

    @classmethod
    def from_reference_checkpoint(cls, path: str | Path, *, best: bool = False) -> Self:
        """Import a checkpoint of the published implementation (``ckpt.pt``).

        Args:
            path: the file; it is read with weights only, no code in it is run.
            best: take the best member ever sampled instead of the mean of the search distribution.

        Raises:
            CheckpointError: the file is unreadable, or does not hold a NAMM of 4,172 parameters.
        """
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise CheckpointError(
                f"cannot read {str(path)!r} as a torch checkpoint with weights only: {error}"
            ) from error
        state = loaded.get("evolution_state", loaded) if isinstance(loaded, dict) else loaded
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{str(path)!r} holds a {type(state).__name__}; expected a dict with 'evolution_state', a state dict"
            )
        name = "best_member" if best else "mean"
        if not isinstance(state.get(name), Tensor):
            raise CheckpointError(f"{str(path)!r} holds no tensor {name!r}; it has {sorted(map(str, state))}")

        # old checkpoints lack buffers of the best member; the published code then takes those of the mean
        folders = ("best_stored_buffers_to_save.", "stored_buffers_to_save.")[0 if best else 1 :]

        def buffer(suffix: str) -> Tensor | None:
            found = [
                v
                for folder in folders
                for k, v in state.items()
                if k.startswith(folder) and k.endswith(suffix) and "online_new" not in k
            ]
            return found[0].flatten().float() if found else None

        return cls.from_vector(
            state[name].flatten().float(), feature_mean=buffer("output_mean"), feature_var=buffer("output_var")
        )

    def fingerprint(self) -> str:
        """A short hash of all values, to tell whether two files hold the same NAMM."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
