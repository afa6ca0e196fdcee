"""Time: the order of a step, the passes it makes, and the hooks that begin it inside backward."""
