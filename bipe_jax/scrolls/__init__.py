"""SCROLLS: fine-tuned models answer questions about long texts, or summarise them (docs/how-to/scrolls.md)."""
