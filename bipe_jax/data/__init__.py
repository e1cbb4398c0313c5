"""Data: sources -> tokens -> blocks -> annotated batches."""
