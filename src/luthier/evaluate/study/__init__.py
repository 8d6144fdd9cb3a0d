"""Would more data help, and which setting is best: many small runs on one loaded base, judged together."""
