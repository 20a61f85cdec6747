"""Everything that is written for others: the exported folder, its manifest, and mask files."""
