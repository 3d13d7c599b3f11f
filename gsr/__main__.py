"""`python -m gsr`: the command `gsr`."""

from gsr.cli import main

if __name__ == "__main__":
    main()
