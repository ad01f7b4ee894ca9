"""Measure a guard: detector and detoxifier metrics, attack success before and after, utility, and a report."""
