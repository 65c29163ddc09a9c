"""What surrounds a run: checks, other data, pictures, the page, the benchmark."""
