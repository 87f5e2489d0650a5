"""Figures by matplotlib, one module per subject, each with a function `draw`."""
