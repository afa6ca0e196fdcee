"""Watching a run: records of all ranks in one file or dashboard, and a page that shows them. It stands above `optim`."""

from fusedfog.watch.monitor import Monitor, monitor

__all__ = ["Monitor", "monitor"]
