"""What runs inside vLLM's worker process. Only workers import the modules of this package."""
