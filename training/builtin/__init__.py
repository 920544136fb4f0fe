"""How the built-in pair of small language models is made: ``python -m latentwire.training.builtin llama``."""
