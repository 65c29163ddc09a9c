"""What surrounds a run: checks, pictures, the page. Each is started as `python -m tools.NAME`."""
