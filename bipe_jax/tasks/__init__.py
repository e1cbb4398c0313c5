"""Tasks with long context: facts hidden in a long text, that the model is to say at its end."""
