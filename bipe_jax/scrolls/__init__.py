"""SCROLLS: fine-tuned models answer questions about long texts, and summarise them; see docs/how-to/scrolls.md."""
