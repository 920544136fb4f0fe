"""``python -m latentwire``."""

from latentwire.service.__main__ import main

main()
