"""The ``convlens`` command: one file a command."""
