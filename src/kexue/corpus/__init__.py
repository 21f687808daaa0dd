"""Documents in: readers for text, JSON lines, CSV, Parquet, folders and installed documentation."""
