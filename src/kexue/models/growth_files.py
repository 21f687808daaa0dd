"""Growing a checkpoint on disk, tensor by tensor; the method is in ``growth.py``."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._files import atomic_path, replaced_folder, write_json
from kexue._transformers import AutoConfig, PreTrainedModel, find_class
from kexue.models.growth import GrowthPlan, plan_growth
from kexue.models.growth_check import GrowthReport, verify_growth

__all__ = ["grow_checkpoint"]

RECORD = "growth.json"
_SHARD = 1 << 30  # bytes of a file of weights; the memory that is needed beside the small model
# What describes the text and the talk rather than the weights; the rest is written anew or would be wrong.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "trainer_state.json", "generation_config.json", RECORD)


def grow_checkpoint(
    folder: str | Path,
    out: str | Path,
    width: int | None = None,
    *,
    seed: int = 0,
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> GrowthReport | None:
    """Write a larger model with the same outputs beside a saved one.

    Memory: the small model and one file of at most 1 GiB of the large one, which is never in memory as a whole unless
    it is verified. The new folder appears when it is complete; an older result in its place stays until then.

    Args:
        folder: What ``save_pretrained`` wrote: config.json and weights. Nothing is downloaded.
        out: The new folder: not there, empty, or an earlier result, which is replaced.
        width: As in :func:`kexue.models.grow`.
        seed: Of the noise.
        verify: Load the result and compare both models in float64 on random tokens before ``out`` is written.
        progress: Called with a line for each file of weights.
        **options: As in :func:`kexue.models.grow`: heads, depth, noise, exact, convention, rope, hidden_size,
            intermediate_size.

    Returns:
        What :func:`kexue.models.verify_growth` found, or None without ``verify``.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: No such checkpoint, a folder in the way, a model that :func:`kexue.models.grow` refuses, or a grown
            model whose outputs differ although ``exact`` is asked for.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with tempfile.TemporaryDirectory() as place:
        ...     model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8))
        ...     model.save_pretrained(place + "/small")
        ...     grow_checkpoint(place + "/small", place + "/large", width=2).max_abs < 1e-12
        True
    """
    check_int("seed", seed, 0)
    source, target = Path(folder), Path(out)
    model = _load(source)
    if source.resolve().is_relative_to(target.resolve()):  # it would be replaced, by whatever name it is called
        raise ValueError(f"out must be a folder that does not hold the small model; got {out} and {folder}")
    plan = plan_growth(model, width, **options)
    for note in plan.notes:
        warnings.warn(f"growth of {plan.model_class.__name__}: {note}", stacklevel=2)
    report = None
    with replaced_folder(target, RECORD, "model that was grown before") as place:
        _write(model, plan, place, torch.Generator().manual_seed(seed), progress)
        for file in sorted(source.iterdir()):
            wanted = file.suffix in _COPIED and file.name not in _NOT_COPIED
            if wanted and not file.name.endswith(".index.json") and file.is_file():
                shutil.copyfile(file, place / file.name)
        if verify:
            report = _verify(model, place, plan)
            same = report.max_rel <= 1e-9 or report.dtype_limited
            if plan.growth.options.exact and not plan.notes and not same:
                raise ValueError(f"the grown model is another function: {report}; nothing was written")
        write_json(place / RECORD, _record(source, plan, width, seed, options, report))
    return report


def _load(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json; expected what save_pretrained of a model writes")
    import kexue.models.gau_alpha as own  # registers its configuration

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    name = next(iter(config.architectures or ()), None)
    found: Any = None if name is None else find_class(name) or getattr(own, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} must name a model class in architectures; got {config.architectures}"
        )
    from safetensors import SafetensorError

    loader: Any = found  # asked for a report it returns a pair, which its annotation does not say
    try:
        model, report = loader.from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} has no weights of {name} that can be read: {error}") from error
    if missing := sorted(report["missing_keys"]):  # random values would be grown as if they were trained
        raise ValueError(f"{folder} lacks weights of {type(model).__name__}: {', '.join(missing[:4])}")
    return model.eval()


def _shards(plan: GrowthPlan, sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name in plan.tensors:
        if names and total + sizes[name] > _SHARD:
            yield names
            names, total = [], 0
        names.append(name)
        total += sizes[name]
    if names:
        yield names


@torch.no_grad()
def _write(
    model: Any, plan: GrowthPlan, place: Path, generator: torch.Generator, progress: Callable[[str], None] | None
) -> None:
    """Weights, configuration and generation settings."""
    from safetensors.torch import save_file

    parameters = dict(model.named_parameters())
    sizes = {
        name: math.prod(recipe.shape) * parameters[recipe.source].element_size()
        for name, recipe in plan.tensors.items()
    }
    shards = list(_shards(plan, sizes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            recipe = plan.tensors[name]
            source = parameters[recipe.source]
            tensors[name] = torch.empty(recipe.shape, dtype=source.dtype)
            recipe.write(source, tensors[name], generator)
            places[name] = file
        with atomic_path(place / file) as temporary:  # on the disk before an earlier result goes
            save_file(tensors, temporary, metadata={"format": "pt"})
        if progress is not None:
            progress(f"{file}: {len(names)} tensors, {sum(sizes[n] for n in names) / 2**20:.0f} MiB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(place / "model.safetensors.index.json", index)
    plan.config.architectures = [plan.model_class.__name__]
    plan.config.dtype = model.dtype
    plan.config.save_pretrained(place)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(place)


def _verify(model: Any, place: Path, plan: GrowthPlan) -> GrowthReport:
    """Compare on random tokens, as many as the positions allow."""
    large = _load(place)
    rows = 1 if getattr(model.config, "pad_token_id", None) is None else 2  # classifiers look for padding in batches
    length = min(32, int(getattr(model.config, "max_position_embeddings", 32)) - 2)
    ids = torch.randint(model.config.vocab_size, (rows, max(1, length)), generator=torch.Generator().manual_seed(0))
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None:
        ids = ids.masked_fill(ids == pad, (pad + 1) % model.config.vocab_size)
    if type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids[None]  # (B, choices, T)
    convention = plan.growth.options.convention
    return verify_growth(model, large, ids, convention=convention, attention_mask=torch.ones_like(ids))


def _record(
    source: Path, plan: GrowthPlan, width: int | None, seed: int, options: dict[str, Any], report: GrowthReport | None
) -> dict[str, Any]:
    from kexue import __version__

    return {
        "kexue": __version__,
        "from": source.name,
        "model": plan.model_class.__name__,
        "options": {"width": width, "seed": seed, **options},
        "notes": list(plan.notes),
        "verified": None if report is None else {
            "max_abs": report.max_abs, "max_rel": report.max_rel, "dtype_limited": report.dtype_limited,
        },
    }  # fmt: skip
