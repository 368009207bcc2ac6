"""Processes: forked, kept alive, stopped in order; the memory they share."""
