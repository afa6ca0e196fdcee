"""Bytes between ranks: process groups, transfers, membership and averages; knows no parameter and no graph's theory."""
