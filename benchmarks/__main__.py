"""Run every benchmark: ``python -m benchmarks``."""

from benchmarks import real, service, world

world.main()
service.main()
real.main()
