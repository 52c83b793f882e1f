"""Ways out: a trained model in the formats of others. A new format is a file here and a line in `scripts/export.py`."""
