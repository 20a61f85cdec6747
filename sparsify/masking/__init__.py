"""What a strategy is written against: patterns, noise, maskers, masked layers."""
