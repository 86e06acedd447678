"""`understudy`, and `python -m understudy`.

Source: none.  Invariant: next to nothing is loaded before an interrupt from the keyboard is a line.
"""

import sys


def main() -> int:
    """Run one command; the result is the status for the shell."""
    try:
        from understudy import cli

        return cli.main()
    except KeyboardInterrupt:  # while the commands were loaded, or once more while they ended
        sys.stderr.write("understudy: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
