"""`edgeadapt profile`: how fast and how large a bundle is on a device."""
