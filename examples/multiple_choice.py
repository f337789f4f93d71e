"""Score answers of several tokens, draw samples until each answer is settled.

python examples/multiple_choice.py ADAPTER QUESTIONS.jsonl [SIGMA]
"""

from __future__ import annotations

import sys

import tfb_ext
from tfb_ext.app.loading import load_adapter


def main(adapter: str, questions: str, sigma: float = 0.05) -> tfb_ext.prediction.Prediction:
    loaded = load_adapter(adapter)
    bayesian = tfb_ext.bayesianize(loaded.model, sigma=sigma)
    examples = tfb_ext.read_jsonl(questions)
    data = tfb_ext.encode(examples, loaded.tokenizer, score="sequence", by_length=True)
    found = tfb_ext.predict(bayesian, data, samples=30, adaptive=0.95)
    for example, label, drawn in zip(examples, found.labels.tolist(), found.samples_drawn.tolist(), strict=True):
        print(f"{example.choices[label]!r} after {drawn} samples: {example.prompt[:60]!r}")
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
