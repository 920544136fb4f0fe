"""Numbers that the processes which answer HTTP add up."""


class Sum:
    """A number of which each process has a part.

    A process writes its own part alone, so that there is no lock for one that is killed to leave held, and what it had
    added goes when its part is set to zero. Two that add at the same moment may pass a limit together, by what they
    add.
    """

    def __init__(self, parts: "memoryview[int] | None" = None, own: int = 0) -> None:
        """``parts`` are in memory that the processes share; without any there is one process."""
        self._parts, self._own = memoryview(bytearray(8)).cast("q") if parts is None else parts, own

    @property
    def own(self) -> int:
        """The part of this process."""
        return self._parts[self._own]

    @own.setter
    def own(self, part: int) -> None:
        self._parts[self._own] = part

    @property
    def all(self) -> int:
        """The number."""
        return sum(self._parts)

    @property
    def processes(self) -> int:
        """Between how many it is divided."""
        return len(self._parts)
