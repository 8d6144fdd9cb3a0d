"""Is a difference real: intervals, tests, power, families of comparisons, seeds. Values in, values out."""
