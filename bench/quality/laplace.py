"""A Laplace approximation on an adapter, by laplace-torch: Kronecker-factored, linearised, as in Laplace-LoRA.

The posterior is the Gaussian around the adapter's A and B whose precision is the generalised Gauss-Newton matrix on the training
items, factored layer by layer (KFAC), plus a prior precision: that of the lowest NLL on labelled anchors, the very ones that sigma
is searched on. (The marginal likelihood is no guide here. Where the training items are memorised their curvature vanishes, so
it asks for a prior so wide that predictions are uniform.) Predictions are those of the linearised model, averaged over
samples of its logits (Yang, Robeyns, Wang, Aitchison, ICLR 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfb_ext.data import Encoded

SAMPLES = 1000  # of the logits; they cost next to nothing beside the Jacobians
PRIORS = tuple(10 ** (half / 2) for half in range(-2, 13))  # 0.1 to 1e6, for weights of about 0.02
JACOBIAN_BYTES, JACOBIAN_ROWS = 2**32, 256  # at once: of the Jacobians, and of the rows whose activations are kept


@dataclass(frozen=True)
class Found:
    """``probabilities`` (S, N, C) on the CPU, and the prior precision chosen."""

    probabilities: Tensor
    prior_precision: float

    @property
    def samples(self) -> int:
        return len(self.probabilities)


class LabelLogits(nn.Module):
    """A PEFT model as a classifier: logits (B, C) of the label tokens after each prompt of a batch.

    Attributes:
        precision: an empty weight in float32. laplace-torch does its own arithmetic in the type of a model's first weight, and
            sums over half a million weights mean nothing in the bfloat16 of the base model.
    """

    def __init__(self, model: Any, columns: Tensor) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.empty(0, device=columns.device), requires_grad=False)
        self.model = model
        self.columns = columns

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=causal_mask(batch["attention_mask"]),
            position_ids=batch["position_ids"],
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        return logits.index_select(-1, self.columns).float()


def causal_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) -> (B, 1, L, L) bool: what each position may look at, itself always.

    The usual mask leaves nothing to positions in the padding, and the gradient of attention over nothing is NaN in some kernels.
    """
    length = attention_mask.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device)
    seen = square.tril() & attention_mask.bool()[:, None, :]
    return (seen | square.tril().triu())[:, None]


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


def predict(model: Any, training: Encoded, anchors: Encoded, data: Encoded, seed: int = 0) -> Found:
    """Fit the approximation to the adapter on ``training``, choose its prior on ``anchors`` and predict ``data``.

    Args:
        model: a PEFT model whose adapter's weights are its only ones that require a gradient.

    Raises:
        ImportError: laplace-torch is not installed.
    """
    laplace = _library()
    device = model.device
    classifier = LabelLogits(model, torch.tensor(data.choice_ids, device=device)).eval()
    weights = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    classes = len(data.choices)
    batch_size = max(min(JACOBIAN_BYTES // (4 * weights * classes), JACOBIAN_ROWS // classes), 1)
    posterior = laplace.Laplace(
        classifier, "classification", subset_of_weights="all", hessian_structure="kron", backend=_backend()
    )
    posterior.fit(Loader(training, 64, device))
    torch.manual_seed(seed)
    posterior.prior_precision = best_prior(posterior, Loader(anchors, batch_size, device))
    result = torch.empty(SAMPLES, len(data), len(data.choices))
    for batch in Loader(data, batch_size, device):
        samples = posterior.predictive_samples(batch, pred_type="glm", n_samples=SAMPLES)
        result[:, batch["index"]] = samples.float().cpu()
    return Found(result, float(posterior.prior_precision.item()))


def best_prior(posterior: Any, anchors: Loader) -> float:
    """The prior precision in ``PRIORS`` with the lowest NLL on labelled anchors.

    The library's own grid search would take the Jacobians once more for every value.
    """
    nll = torch.zeros(len(PRIORS), dtype=torch.float64, device=anchors.device)
    for batch in anchors:
        for number, prior in enumerate(PRIORS):
            posterior.prior_precision = prior
            mean = posterior.predictive_samples(batch, pred_type="glm", n_samples=SAMPLES).mean(0)
            nll[number] += torch.nn.functional.nll_loss(mean.log(), batch["labels"], reduction="sum")
    return PRIORS[int(nll.argmin())]


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

        The library's own Jacobians take a backward pass over the whole batch for every item and class. An item's gradient of a
        weight is the product of what went into its layer and what came back to it, summed over tokens, so one pass does.
        """

        last: tuple[dict[str, Tensor], tuple[Tensor, Tensor]] | None = None

        def jacobians(self, x: dict[str, Tensor], enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
            """Those of the last batch are kept, for it is asked for again with every prior."""
            if enable_backprop:
                raise NotImplementedError("Jacobians without a graph only; pass enable_backprop=False")
            if self.last is None or self.last[0] is not x:
                self.last = None  # before the next ones are made: they are large
                self.last = (x, adapter_jacobians(self.model, list(self.params_dict), x))
            return self.last[1]

    return AdapterGGN


def adapter_jacobians(model: LabelLogits, names: list[str], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Jacobians of ``model(batch)`` (B, C) by the weights ``names``, each the weight of a ``Linear`` without bias.

    Returns:
        (B, C, P) with the weights flattened in the order of ``names``, and the model's output (B, C).
    """
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[layer], outputs[layer] = arguments[0].detach(), output

    classes = len(model.columns)
    # Row (c, b) is item b once more, for the gradient of its class c.
    repeated = {name: batch[name].repeat(classes, 1) for name in ("input_ids", "attention_mask", "position_ids")}
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.enable_grad():
            values = model(repeated).unflatten(0, (classes, -1)).diagonal(dim1=0, dim2=2)
    finally:
        for hook in hooks:
            hook.remove()
    back = torch.autograd.grad(values.sum(), [outputs[layer] for layer in layers])
    parts = [
        torch.einsum("rto,rti->roi", grad.float(), inputs[layer].float()).flatten(1)
        for layer, grad in zip(layers, back, strict=True)
    ]
    return torch.cat(parts, dim=1).unflatten(0, (classes, -1)).transpose(0, 1), values.detach()
