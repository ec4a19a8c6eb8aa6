"""Noise schedules and samplers: pure functions that own no parameters."""
