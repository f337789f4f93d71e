"""A Laplace approximation on an adapter, by laplace-torch: Kronecker-factored, linearised, as in Laplace-LoRA.

The posterior is the Gaussian around the adapter's A and B whose precision is the generalised Gauss-Newton matrix on the training
items, factored layer by layer (KFAC), plus a prior precision that maximises the marginal likelihood. Predictions are those of
the linearised model, averaged over samples of its logits (Yang, Robeyns, Wang, Aitchison, ICLR 2024).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfb_ext.data import Encoded

SAMPLES = 1000  # of the logits; they cost next to nothing beside the Jacobians
JACOBIAN_BYTES = 2**32


@dataclass(frozen=True)
class Found:
    """``probabilities`` (S, N, C) on the CPU, and the prior precision chosen."""

    probabilities: Tensor
    prior_precision: float

    @property
    def samples(self) -> int:
        return len(self.probabilities)


class LabelLogits(nn.Module):
    """A PEFT model as a classifier: logits (B, C) of the label tokens after each prompt of a batch."""

    def __init__(self, model: Any, columns: Tensor) -> None:
        super().__init__()
        self.model = model
        self.columns = columns

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.index_select(-1, self.columns).float()


@dataclass(frozen=True)
class Loader:
    """What laplace-torch wants of a loader: batches with their labels, and ``dataset`` with its length."""

    dataset: Encoded
    batch_size: int
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        labels = self.dataset.labels_tensor(self.device) if self.dataset.labelled else None
        for batch in self.dataset.batches(self.batch_size, self.device):
            index = batch["index"].to(self.device)
            yield batch if labels is None else {**batch, "labels": labels[index]}


def predict(model: Any, training: Encoded, data: Encoded, seed: int = 0) -> Found:
    """Fit the approximation to the adapter on ``training`` and predict ``data``.

    Args:
        model: a PEFT model whose adapter's weights are its only ones that require a gradient.

    Raises:
        ImportError: laplace-torch is not installed.
    """
    laplace = _library()
    device = model.device
    classifier = LabelLogits(model, torch.tensor(data.choice_ids, device=device)).eval()
    weights = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    batch_size = max(min(JACOBIAN_BYTES // (4 * weights * len(data.choices)), 128), 1)
    posterior = laplace.Laplace(
        classifier, "classification", subset_of_weights="all", hessian_structure="kron", backend=_backend()
    )
    posterior.fit(Loader(training, min(batch_size, 32), device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reminds of the link function, which is passed below
        posterior.optimize_prior_precision(pred_type="glm", method="marglik", prior_structure="scalar")
    torch.manual_seed(seed)
    result = torch.empty(SAMPLES, len(data), len(data.choices))
    for batch in Loader(data, batch_size, device):
        samples = posterior.predictive_samples(batch, pred_type="glm", n_samples=SAMPLES)
        result[:, batch["index"]] = samples.float().cpu()
    return Found(result, float(posterior.prior_precision.item()))


def _library() -> Any:
    try:
        logging.getLogger("root").setLevel(logging.WARNING)
        import laplace
    except ImportError as error:
        raise ImportError(
            "the Laplace approximation needs laplace-torch: pip install --no-deps laplace-torch==0.3 curvlinops-for-pytorch "
            "backpack-for-pytorch asdfghjkl==0.1a4 einconv einops unfoldNd linear_operator jaxtyping wadler-lindig "
            "opt-einsum; or leave it out with --no-laplace"
        ) from error
    return laplace


def _backend() -> type:
    from laplace.curvature import CurvlinopsGGN

    class AdapterGGN(CurvlinopsGGN):
        """Curvature by curvlinops; Jacobians from what passes through the adapter's two products.

        The library's own Jacobians take one backward pass for every item and class, these one for every class: an item's
        gradient of a weight is the product of what went into its layer and what came back to it, summed over tokens.
        """

        def jacobians(self, x: dict[str, Tensor], enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
            if enable_backprop:
                raise NotImplementedError("Jacobians without a graph only; pass enable_backprop=False")
            return adapter_jacobians(self.model, list(self.params_dict), x)

    return AdapterGGN


def adapter_jacobians(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Jacobians of ``model(batch)`` (B, C) by the weights ``names``, each the weight of a ``Linear`` without bias.

    Returns:
        (B, C, P) with the weights flattened in the order of ``names``, and the model's output (B, C).
    """
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[layer], outputs[layer] = arguments[0].detach(), output

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.enable_grad():
            values = model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for column in range(values.shape[1]):
        back = torch.autograd.grad(
            values[:, column].sum(), [outputs[layer] for layer in layers], retain_graph=column + 1 < values.shape[1]
        )
        parts = [
            torch.einsum("bto,bti->boi", grad.float(), inputs[layer].float()).flatten(1)
            for layer, grad in zip(layers, back, strict=True)
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows, dim=1), values.detach()
