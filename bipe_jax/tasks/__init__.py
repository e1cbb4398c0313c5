"""Tasks with long context: facts hidden in a long text, which the model is asked for at its end."""
