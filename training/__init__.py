"""Train bridges: frozen models in, a checkpoint out."""
