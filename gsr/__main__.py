"""`python -m gsr`: the command `gsr`."""

from gsr.cli import command

if __name__ == "__main__":
    command()
