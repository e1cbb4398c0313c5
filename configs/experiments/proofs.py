"""The base of the experiment on proofs: documents are kept apart, so that segments number the steps."""

from . import modalities


def get_config(size: str = "quick"):
    c = modalities.get_config(size)
    c.sequence_length = {"quick": 64, "laptop": 256, "paper": 512}[size]
    c.model.vocab_size = 384 if size == "quick" else 1024
    c.data.train = "data/proofs/train-*.jsonl"
    c.data.evaluation = "data/proofs/held-out.jsonl"
    c.data.packing = "document"
    c.data.separate_documents = True
    modalities.set_lengths(c, 2 if size == "quick" else 16)
    return c
