"""Evaluation: a loaded model, which tokens are scored, perplexity by length, decoding with a cache."""
