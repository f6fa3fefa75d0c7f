"""Graph to graph: one file per pass, each changes a model in place."""
