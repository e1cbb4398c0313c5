"""SCROLLS: fine-tuning on questions about long texts, and on summaries (docs/how-to/scrolls.md)."""
