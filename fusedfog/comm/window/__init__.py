"""One-sided messages between the windows of a group's ranks: through shared memory inside a host, over TCP between hosts."""
