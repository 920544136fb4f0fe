"""Run every benchmark: ``python -m benchmarks``."""

from benchmarks import (
    ablation,
    bytes,
    fuzz,
    gate,
    memory,
    readback,
    real,
    residency,
    serve,
    service,
    texts,
    training,
    world,
)

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
