"""Programs to run, to read and to change."""
