"""Answer prompts, with the uncertainty of every token.

python examples/generation.py ADAPTER SIGMA PROMPT...
"""

from __future__ import annotations

import sys

import tfb_ext
from tfb_ext.app.loading import load_adapter


def main(adapter: str, sigma: float, *prompts: str) -> tfb_ext.generation.Generation:
    loaded = load_adapter(adapter)
    bayesian = tfb_ext.bayesianize(loaded.model, sigma=sigma)
    found = tfb_ext.generate(bayesian, list(prompts), loaded.tokenizer, samples=10, max_new_tokens=32, do_sample=False)
    for prompt, pieces, epistemic in zip(prompts, found.pieces, found.epistemic.tolist(), strict=True):
        print(prompt)
        for piece, nats in zip(pieces, epistemic, strict=False):
            print(f"  {nats:.3f}  {piece!r}")
    return found


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
