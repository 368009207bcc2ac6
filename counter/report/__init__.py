"""A result judged and shown: table, JSON, page, percentiles, charts, thresholds, progress."""
