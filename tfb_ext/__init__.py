"""tfb_ext: calibrated language models from the LoRA adapter you already have.

Training-Free Bayesianization (Shi, Wang, Han, Zhang, Wang, NeurIPS 2025, arXiv 2412.05723): a trained adapter becomes a
distribution over adapters with one scalar sigma, found by a search on anchors, and predictions average over samples.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `tfb --help` and the training script need neither transformers nor the extension.
_PUBLIC = {
    "BayesianAdapter": "adapter",
    "bayesianize": "adapter",
    "load": "adapter",
    "search_sigma": "search",
    "SigmaSearch": "search",
    "predict": "prediction",
    "predict_multi_label": "prediction",
    "predict_regression": "prediction",
    "Prediction": "prediction",
    "generate": "generation",
    "Generation": "generation",
    "captured_decoding": "decoding",
    "CapturedDecoding": "decoding",
    "MultiLabelPrediction": "prediction",
    "RegressionPrediction": "prediction",
    "head_gaussian": "head",
    "HeadGaussian": "head",
    "kl_divergence": "theory",
    "KLDivergence": "theory",
    "implied_weight": "theory",
    "ImpliedWeight": "theory",
    "paper_form": "theory",
    "PaperForm": "theory",
    "Example": "data",
    "Encoded": "data",
    "encode": "data",
    "read_jsonl": "data",
    "read_dataset": "data",
    "evaluate": "metrics",
    "Metrics": "metrics",
    "uncertainty_scores": "uncertainty",
    "detection": "uncertainty",
    "Detection": "uncertainty",
    "selective": "uncertainty",
    "Selective": "uncertainty",
    "TFBError": "errors",
    "UnsupportedModelError": "errors",
    "SamplingError": "errors",
    "ConfigError": "errors",
}

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from .adapter import BayesianAdapter, bayesianize, load
    from .data import Encoded, Example, encode, read_dataset, read_jsonl
    from .decoding import CapturedDecoding, captured_decoding
    from .errors import ConfigError, SamplingError, TFBError, UnsupportedModelError
    from .generation import Generation, generate
    from .head import HeadGaussian, head_gaussian
    from .metrics import Metrics, evaluate
    from .prediction import (
        MultiLabelPrediction,
        Prediction,
        RegressionPrediction,
        predict,
        predict_multi_label,
        predict_regression,
    )
    from .search import SigmaSearch, search_sigma
    from .theory import ImpliedWeight, KLDivergence, PaperForm, implied_weight, kl_divergence, paper_form
    from .uncertainty import Detection, Selective, detection, selective, uncertainty_scores


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
