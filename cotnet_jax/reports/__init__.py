"""Evaluations as reports, and runs as curves: JSON, CSV, one HTML page, PNGs.

matplotlib is imported when something is drawn, not before.
"""
