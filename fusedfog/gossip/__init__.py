"""One bucket's exchange with the other ranks: what is sent, where it arrives, and what it means there."""
