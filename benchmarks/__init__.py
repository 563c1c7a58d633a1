"""Measurements beside other projects, and of what only this project's developers run. Not installed."""
