"""How the pair of small language models that ships with the product is made: ``python -m training.builtin llama``."""
