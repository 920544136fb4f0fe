"""Run every benchmark: ``python -m benchmarks``."""

import sys

import torch

from benchmarks import (
    ablation,
    bytes,
    capacity,
    cost,
    fuzz,
    gate,
    gpu,
    memory,
    readback,
    real,
    residency,
    rolling,
    serve,
    service,
    texts,
    training,
    world,
)

if sys.argv[1:]:  # they would be read by the first one, hours before anybody sees it
    sys.exit(f"python -m benchmarks runs them all; for one: python -m benchmarks.{sys.argv[1]} --help")
world.main()
service.main()
serve.main()
texts.main()
fuzz.main()
residency.main()
training.main()
memory.main()
gate.main()
readback.main()
real.main()
bytes.main()
ablation.main()
cost.main()
capacity.main()
rolling.main()
if torch.cuda.is_available():
    gpu.main()
