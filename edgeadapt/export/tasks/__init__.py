"""How a kind of model is cut into graphs: one file each, found by name, asked in the order of `ORDER`."""
