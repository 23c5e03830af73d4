"""``python -m convlens`` is the ``convlens`` command."""

from convlens.cli.main import run

if __name__ == "__main__":
    run()
