"""The bridges being served: admit → batch → run → answer. Knows no HTTP."""
