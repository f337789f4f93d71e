"""Prompts with a closed set of answers: reading them, and turning them into padded batches.

Every item asks a causal language model one question whose answer is the next token: ``choices`` are the answers, and the
model's classes are the tokens of the choices. ``encode(..., score="sequence")`` takes answers of several tokens. For a model
with a classification head the choices are the names of its classes.
"""

from .encoded import Encoded, pad_rows
from .encoding import encode
from .examples import Example, read_dataset, read_jsonl

__all__ = ["Encoded", "Example", "encode", "pad_rows", "read_dataset", "read_jsonl"]
