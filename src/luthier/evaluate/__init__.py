"""Did it get better? Metrics per example, paired intervals, a verdict, and the report that shows them."""
