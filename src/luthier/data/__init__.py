"""From a file of rows to token ids with one bit each: supervised or not. Nothing here imports torch."""
