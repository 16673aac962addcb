"""``batchnorm`` and ``python -m batchnorm``."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line.

    Returns:
        The exit code: 0 fine, 1 a check found something, 2 wrong use or unreadable input, 130
        interrupted.
    """
    try:
        from batchnorm import cli
    except ModuleNotFoundError as error:
        print(
            f"batchnorm: the command line needs {error.name}, which is not installed; "
            "install it with pip install 'batchnorm[cli]'.",
            file=sys.stderr,
        )
        return 2
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
