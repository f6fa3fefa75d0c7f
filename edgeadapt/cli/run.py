"""`edgeadapt run`: a bundle at work."""
