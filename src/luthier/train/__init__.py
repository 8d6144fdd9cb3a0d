"""From tokens to an adapter: an exact step, checkpoints that can be trusted, one process or several."""
