"""Synthetic text: requests made from natural documents, answered by a generator, filtered, and accounted for."""
