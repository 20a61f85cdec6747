"""What leaves: the exported folder, its manifest, mask files, and the formats of others."""
