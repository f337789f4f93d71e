"""tfb_ext: calibrated language models from the LoRA adapter you already have.

Training-Free Bayesianization (Shi, Wang, Han, Zhang, Wang, NeurIPS 2025, arXiv 2412.05723): a trained adapter becomes a
distribution over adapters with one scalar sigma, found by a search on anchors, and predictions average over samples.

What is not here is imported from its room: ``tfb_ext.search``, ``prediction``, ``uncertainty``, ``generation``, ``errors``,
``research`` and so on.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `tfb --help` and the training script need neither transformers nor the extension.
_PUBLIC = {
    "BayesianAdapter": "adapters.adapter",
    "bayesianize": "adapters.attach",
    "load": "adapters.attach",
    "search_sigma": "search",
    "predict": "prediction",
    "predict_multi_label": "prediction",
    "predict_regression": "prediction",
    "generate": "generation",
    "captured_decoding": "generation.decoding",
    "Example": "data",
    "encode": "data",
    "read_jsonl": "data",
    "read_dataset": "data",
    "evaluate": "metrics",
    "TFBError": "errors",
}

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from .adapters.adapter import BayesianAdapter
    from .adapters.attach import bayesianize, load
    from .data import Example, encode, read_dataset, read_jsonl
    from .errors import TFBError
    from .generation.decoding import captured_decoding
    from .generation.text import generate
    from .metrics import evaluate
    from .prediction import predict, predict_multi_label, predict_regression
    from .search import search_sigma


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
