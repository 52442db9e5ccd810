"""Carrying requests out: pure decisions first, then steps that act and say why."""
