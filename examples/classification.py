"""Search sigma on labelled prompts, then classify others and say how sure the answer is.

python examples/classification.py [ADAPTER ANCHORS.jsonl QUESTIONS.jsonl]
"""

from __future__ import annotations

import sys

import tfb_ext
from tfb_ext.app.loading import load_adapter


def main(adapter: str, anchors: str, questions: str) -> tfb_ext.prediction.Prediction:
    loaded = load_adapter(adapter)
    bayesian = tfb_ext.bayesianize(loaded.model)
    print(tfb_ext.search_sigma(bayesian, tfb_ext.encode(tfb_ext.read_jsonl(anchors), loaded.tokenizer)))
    examples = tfb_ext.read_jsonl(questions)
    found = tfb_ext.predict(bayesian, tfb_ext.encode(examples, loaded.tokenizer), samples=10)
    for example, label, p, epistemic in zip(
        examples, found.labels.tolist(), found.probabilities.tolist(), found.epistemic.tolist(), strict=True
    ):
        print(f"{example.choices[label]!r} {p[label]:.1%}, epistemic {epistemic:.3f} nats: {example.prompt[:60]!r}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
