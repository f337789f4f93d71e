# %% [markdown]
# How sure is a fine-tuned adapter? Run cell by cell, or as a script: python examples/notebook.py ADAPTER DATA.jsonl

# %%
import sys

import tfb_ext
from tfb_ext.app.loading import load_adapter

loaded = load_adapter(sys.argv[1])
data = tfb_ext.encode(tfb_ext.read_jsonl(sys.argv[2]), loaded.tokenizer)
adapter = tfb_ext.bayesianize(loaded.model, sigma=0.05)

# %% The adapter as it is, and its posterior
before, after = tfb_ext.predict(adapter, data, samples=0), tfb_ext.predict(adapter, data, samples=10)

# %% Calibration before and after
for found in (before, after):
    print(tfb_ext.evaluate(found.probabilities, data.labels_tensor()))

# %% What the samples disagree about most
print(after.epistemic.topk(min(3, len(data))).indices.tolist())
