"""What a reader of the paper needs and nobody else: variance families, the KL of Theorem 4.2, the head in closed form."""

from .head import HeadGaussian, head_gaussian
from .theory import ImpliedWeight, KLDivergence, PaperForm, implied_weight, kl_divergence, paper_form

__all__ = [
    "HeadGaussian",
    "ImpliedWeight",
    "KLDivergence",
    "PaperForm",
    "head_gaussian",
    "implied_weight",
    "kl_divergence",
    "paper_form",
]
