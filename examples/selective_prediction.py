"""Answer the surest questions and leave the others to someone else: what the error rate is then.

python examples/selective_prediction.py ADAPTER LABELLED.jsonl [SIGMA]
"""

from __future__ import annotations

import sys

import tfb_ext
from tfb_ext.app.loading import load_adapter


def main(adapter: str, labelled: str, sigma: float = 0.05) -> dict[str, tfb_ext.uncertainty.Selective]:
    loaded = load_adapter(adapter)
    bayesian = tfb_ext.bayesianize(loaded.model, sigma=sigma)
    data = tfb_ext.encode(tfb_ext.read_jsonl(labelled), loaded.tokenizer)
    found = tfb_ext.predict(bayesian, data, samples=10)
    wrong = found.labels != data.labels_tensor()
    curves = {
        name: tfb_ext.uncertainty.selective(score, wrong)
        for name, score in tfb_ext.uncertainty.uncertainty_scores(found).items()
    }
    for name, curve in curves.items():
        print(f"{name}: {curve.risk_at(0.8):.1%} errors among the surest 80 %, AURC {curve.aurc:.4f}")
    return curves


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
