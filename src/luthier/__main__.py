"""The command `luthier`, and `python -m luthier`."""

import sys


def main() -> int:
    """The exit code. A Ctrl-C that comes before the command line is read ends it too, in a line."""
    try:
        from luthier import cli

        return cli.main()
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
