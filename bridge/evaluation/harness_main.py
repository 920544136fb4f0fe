"""``latentwire-lm-eval``: lm-evaluation-harness with the model ``latentwire``; all else is the harness's own."""

import sys

from latentwire import missing_extra
from latentwire.bridge.errors import LatentWireError, first_line


def main() -> None:
    """Register the model, and run the harness's command line: bad input is one line and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import latentwire.bridge.evaluation.harness  # noqa: F401, registers the model

        cli_evaluate()
    except LatentWireError as error:
        print(f"latentwire-lm-eval: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (message := missing_extra(error, "lm-eval")) is None:
            raise
        print(f"latentwire-lm-eval: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
