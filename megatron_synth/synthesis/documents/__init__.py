"""Documents that prompts are made of: read, cut, counted, and made harmless."""
