"""Making Bayesian adapters: of a PEFT model's adapter, or of a saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from ..files import CONFIG_NAME
from ..forward.anatomy import find_anatomy
from ..posterior.canonical import canonical_name, unique_layer_ids
from ..posterior.config import TFBConfig, check_family, check_mode
from .adapter import BayesianAdapter, Depth, Span
from .layer import updates_of
from .loading import attach_adapter
from .supported import check_layer


def bayesianize(
    model: PeftModel,
    adapter: str = "default",
    depth: Depth = "all",
    sigma: float | None = None,
    seed: int = 0,
    antithetic: bool = True,
    mode: str | None = None,
    family: str = "low-rank",
    guard: bool = True,
    span: Span = "all",
) -> BayesianAdapter:
    """Attach the TFB posterior to a trained LoRA adapter; the model's outputs do not change until a context is opened.

    Args:
        model: PEFT model over a transformers model, adapter loaded and not merged.
        adapter: its name in the model.
        depth: which blocks are random, from the top: a number, a fraction, ``"all"`` (the paper) or ``"head"``.
        sigma: posterior scale if already known.
        seed: 64-bit noise seed.
        antithetic: draw samples in mirrored pairs, which lowers the Monte-Carlo error of the mean probability.
        mode: ``"weight"``, ``"flipout"`` or ``"token"``; see :class:`BayesianAdapter`. ``None`` is ``"weight"``, and ``"token"``
            for the family ``"full-rank"``.
        family: ``"low-rank"`` (the paper's posterior), ``"constant"`` or ``"full-rank"``; see :mod:`tfb_ext.research.families`.
        span: which tokens of a row are random: ``"all"`` (the paper), ``"answer"`` or a number of last ones; see
            :class:`BayesianAdapter`. Samples of few tokens share one forward of the prompt, so any number of them costs about that.
        guard: compare the model with separate passes on a tiny input in its first context at each depth. A few forwards;
            ``False`` (for models whose weights are offloaded, say) puts it off, and every context says so.

    Raises:
        ValueError: an unknown depth, mode or family, a mode that the family does not have, a bad sigma or seed.
        UnsupportedModelError: unknown adapter, no LoRA layer, or a layer that cannot carry a posterior (the message names it,
            the reason and the way out). Nothing has been changed then.
    """
    if mode is None:
        mode = "token" if family == "full-rank" else "weight"
    check_mode(mode, check_family(family))
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"expected a peft.PeftModel, got {type(model).__name__}; load the adapter with PeftModel.from_pretrained(base, folder)"
        )
    if adapter not in model.peft_config:
        raise UnsupportedModelError(f"no adapter {adapter!r} in the model; it has {sorted(model.peft_config)}")
    kind = model.peft_config[adapter].peft_type
    if getattr(kind, "value", kind) != "LORA":
        raise UnsupportedModelError(
            f"adapter {adapter!r} is of type {getattr(kind, 'value', kind)}; only LORA has a TFB posterior"
        )
    base = model.get_base_model()
    found: list[tuple[str, Any]] = [
        (canonical_name(n), m) for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in _adapters(m)
    ]
    if not found:
        raise UnsupportedModelError(
            f"adapter {adapter!r} has no LoRA layer in this model; its target_modules matched nothing"
        )
    for name, module in found:
        check_layer(name, module, adapter)
    unique_layer_ids(name for name, _ in found)
    anatomy = find_anatomy(base, [name for name, _ in found])
    for _, module in found:
        if adapter in updates_of(module):  # of a Bayesian adapter that is gone
            updates_of(module)[adapter].detach()
    return BayesianAdapter(
        model,
        adapter,
        anatomy,
        dict(found),
        depth=depth,
        span=span,
        sigma=sigma,
        seed=seed,
        antithetic=antithetic,
        mode=mode,
        family=family,
        guard=guard,
    )


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> BayesianAdapter:
    """Load a saved posterior: the adapter from ``folder`` (if the model does not hold it yet) and ``tfb_config.json``.

    Args:
        model: the base model, or a PEFT model.
        folder: what :meth:`BayesianAdapter.save_pretrained` returned.
        adapter: the name to give the adapter, or its name in the PEFT model.

    Raises:
        ConfigError: the file is missing, damaged, newer than this package, or of another adapter. The model is untouched
            unless the mismatch could only be seen after loading the adapter.
        UnsupportedModelError: the adapter's own files are damaged or do not fit the model.
    """
    config = TFBConfig.read(folder)
    peft_model = attach_adapter(model, Path(folder), adapter)
    bayesian = bayesianize(
        peft_model,
        adapter,
        sigma=config.sigma,
        seed=config.seed,
        antithetic=config.antithetic,
        mode=config.mode,
        family=config.family,
    )
    try:
        _restore(bayesian, config, Path(folder) / CONFIG_NAME)
    except ConfigError:
        bayesian.unload()
        raise
    return bayesian


def _restore(bayesian: BayesianAdapter, config: TFBConfig, path: Path) -> None:
    """Set what the file holds beside sigma and seed, once it is known to belong to this adapter."""
    if set(bayesian.layers) != set(config.layers):
        missing = sorted(set(config.layers) - set(bayesian.layers))
        extra = sorted(set(bayesian.layers) - set(config.layers))
        raise ConfigError(
            f"{path} belongs to another adapter: of its layers {missing[:3]} are not here, and {extra[:3]} are not in it; "
            "search sigma again for this adapter"
        )
    if config.fingerprint is not None and config.fingerprint != bayesian.fingerprint(config.format_version):
        scaling = " or another scaling (lora_alpha)" if config.format_version >= 3 else ""
        raise ConfigError(
            f"{path}: sigma was chosen for other weights than those of adapter {bayesian.name!r}{scaling} (their SHA-256 differs); "
            "search sigma again, or set fingerprint to null if the weights were only converted"
        )
    bayesian.search, bayesian.by, bayesian.searched_on = config.search, config.by, config.searched_on
    try:
        bayesian.depth, bayesian.span = config.depth, config.span
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _adapters(module: Any) -> set[str]:
    return {
        *module.lora_A,
        *module.lora_embedding_A,
        *getattr(module, "lora_variant", {}),
    }
