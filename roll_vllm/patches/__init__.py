"""Changes to vLLM that no extension point allows: declared, checked before they are set, and reversible."""
