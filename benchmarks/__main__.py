"""Run every benchmark: ``python -m benchmarks``."""

from benchmarks import ablation, memory, real, service, training, world

world.main()
service.main()
training.main()
memory.main()
real.main()
ablation.main()
