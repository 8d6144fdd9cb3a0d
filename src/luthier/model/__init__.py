"""Base models: where they come from, how they run, what they generate. transformers is imported here only."""
