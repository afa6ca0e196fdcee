"""The `fusedfog` command."""
