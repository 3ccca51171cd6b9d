"""Measurements behind the project's claims about speed: ratios of things measured side by side in one run."""
