"""Sequences that are not prose, as JSONL shards with their segments: music, proofs, code, chess, DNA.

Each comes from an installed package, or is computed from a seed (`registry`). `writing` makes the shards.
"""
