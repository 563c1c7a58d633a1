"""Figures of a report and of `fit`: drawn with matplotlib, embedded as SVG with their data."""
